"""The plays on Kafka: three brokers, of which two must have what is confirmed, and what is done to them and to workers.

A queue and a topic are used at once; the queue is served by a share group, or by a classic one where a play says so.
The cluster is shared, as a Java is heavy: each play has topics of its own, and leaves all brokers running.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from ..servers.kafka import KafkaCluster, Network
from . import plays
from .checker import Terms, Verdict
from .kafka_groups import be_classic, coordinator, group_of, meet, name_of, share_coordinator
from .kafka_watch import watched
from .stage import BOTH, PATIENCE, Stage
from .worker import ATTEMPTS, GROUP, TOPIC, queue

Action: TypeAlias = Callable[[Stage, KafkaCluster], Awaitable[Verdict]]
SESSION: Final = 2.0
"""Seconds that members of groups survive without a sign of life."""
LEASE: Final = 2.0 * PATIENCE
"""Seconds of the queue's: on a busy machine a broker may take two for the acknowledgement of one message."""
OPTIONS: Final = f"session={SESSION:g}&timeout={5 * PATIENCE:g}&connect_timeout={2 * PATIENCE:g}"
FAILOVER: Final = 20.0
"""Seconds in which everything must go on by itself after a fault of brokers: they notice a death after two, and elect."""
OF_TOPIC: Final = Terms(
    attempts=ATTEMPTS,
    unstored=2.0,
    uncounted=0.5,  # a note goes out 25 times a second at most, behind the one that is under way
    takeover=SESSION + 6.0,
    ordered=True,
    partitioned=True,
    atomic=False,
)
CLASSIC: Final = msgspec.structs.replace(OF_TOPIC, ordered=False, copied=True)
SHARE: Final = Terms(
    attempts=ATTEMPTS,
    unstored=2.0,
    takeover=SESSION + 6.0,
    copied=True,
    resets=True,
    atomic=False,
)
ENGINES: Final = {"share": SHARE, "classic": CLASSIC}
Engine: TypeAlias = Literal["share", "classic"]
DELAYS: Final = {"delays": (0.05, 2.5)}
"""Some wait in the hands of a consumer, some elsewhere."""


class Play(msgspec.Struct, frozen=True):
    """A play on Kafka."""

    action: Action
    of: tuple[str, ...] = BOTH
    engine: Engine = "share"
    """What serves the queue."""
    options: Mapping[str, Any] = msgspec.field(default_factory=lambda: DELAYS)
    """Of each `Order`."""
    long: bool = False
    """It takes too long for every day."""

    async def perform(self, cluster: KafkaCluster, seed: int, folder: Path, *, long: bool = False) -> Verdict:
        """Play it with a queue and a topic of its own."""
        url = cluster.endpoints.url(query=f"{OPTIONS}&prefix=p{secrets.token_hex(4)}.")
        terms = {"queue": ENGINES[self.engine], "topic": OF_TOPIC}
        with Stage(url, folder, seed, lease=LEASE, long=long, of=self.of, terms=terms, **self.options) as stage:
            for name in self.of:
                await asyncio.to_thread(meet, cluster, group_of(stage, name))
            try:
                if self.engine == "classic":
                    async with stage.broker() as broker:
                        await broker.declare(TOPIC)
                    await asyncio.to_thread(be_classic, cluster, group_of(stage, "queue"), name_of(stage, TOPIC.name))
                async with watched(stage, cluster, [name_of(stage, name) for name in self.of]):
                    return await self.action(stage, cluster)
            finally:
                await asyncio.to_thread(_heal, cluster)


def _heal(cluster: KafkaCluster) -> None:
    for node in cluster.nodes:
        if cluster.running(node):
            cluster.thaw(node)
        else:
            cluster.revive(node)


@contextmanager
def broken(stage: Stage, what: str, **more: Any) -> Generator[None]:
    """Note that something is done to brokers for as long as the block lasts: partitions may move because of it."""
    with stage.fault(what, moves=True, **more):
        yield


def topic_of(stage: Stage) -> str:
    """Return what Kafka calls one of the topics that messages flow through."""
    return name_of(stage, stage.random.choice(stage.of))


async def flows(stage: Stage) -> None:
    """Wait until everything goes on by itself."""
    await stage.flow(timeout=FAILOVER)
    await stage.published(timeout=FAILOVER)


# ---------------------------------------------------------------------- brokers


async def kill_leader(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Kill the leader of a partition, and start it again."""
    await stage.start("service", "hand", "producer")
    for number in stage.rounds(range(1), range(4)):
        await stage.flow()
        with broken(stage, "leader killed"):
            node = cluster.leader(topic_of(stage), number)
            cluster.kill(node)
            await flows(stage)
            await asyncio.to_thread(cluster.revive, node)
        await flows(stage)
    return await stage.finish()


async def kill_coordinator(
    stage: Stage, cluster: KafkaCluster, find: Callable[[Stage, KafkaCluster], int] = coordinator
) -> Verdict:
    """Kill the coordinator of a group, and start it again."""
    await stage.start("service", "hand", "producer")
    for _ in stage.rounds(range(1), range(4)):
        await stage.flow()
        with broken(stage, "coordinator killed"):
            node = find(stage, cluster)
            cluster.kill(node)
            await flows(stage)
            await asyncio.to_thread(cluster.revive, node)
        await flows(stage)
    return await stage.finish()


async def kill_share_coordinator(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Kill who keeps what is done of the queue, and start it again."""
    return await kill_coordinator(stage, cluster, share_coordinator)


async def freeze_share_coordinator(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Stop who keeps what is done of the queue."""
    return await freeze_coordinator(stage, cluster, share_coordinator)


async def freeze_coordinator(
    stage: Stage, cluster: KafkaCluster, find: Callable[[Stage, KafkaCluster], int] = coordinator
) -> Verdict:
    """Stop the coordinator of a group, for longer than the others wait for it."""
    await stage.start("service", "hand", "producer")
    for _ in stage.rounds(range(1), range(4)):
        await stage.flow()
        with broken(stage, "coordinator frozen"):
            node = find(stage, cluster)
            cluster.freeze(node)
            await flows(stage)
            await asyncio.sleep(stage.random.choice((0.0, 3.0)))
            cluster.thaw(node)
        await flows(stage)
    return await stage.finish()


async def freeze_leader(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Stop the leader of a partition for ten seconds."""
    await stage.start("service", "hand", "producer")
    for number in stage.rounds(range(1), range(4)):
        await stage.flow()
        with broken(stage, "leader frozen"):
            node = cluster.leader(topic_of(stage), number)
            cluster.freeze(node)
            await asyncio.sleep(10)
            await flows(stage)
            cluster.thaw(node)
        await flows(stage)
    return await stage.finish()


async def kill_two(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Kill two of three: publishing is not confirmed until one of them is back."""
    await stage.start("service", "hand", "producer", timeout=1.0)
    await stage.flow()
    victims = stage.random.sample(cluster.nodes, 2)
    with broken(stage, "two brokers killed"):
        for node in victims:
            cluster.kill(node)
        begin = time.monotonic()
        await asyncio.sleep(4)
        end = time.monotonic()
        for node in victims:
            await asyncio.to_thread(cluster.revive, node)
        await flows(stage)
    published = {entry.id: entry.at for entry in stage.entries if entry.what == "publish"}
    lies = [e for e in stage.entries if e.what == "confirmed" and begin < published[e.id] and e.at < end]
    assert not lies, stage.report(f"confirmed with one broker of three: {lies[:3]}")
    told = [e for e in stage.entries if e.what in {"unknown", "refused"} and begin < e.at < end]
    assert told, stage.report("nobody was told that nothing can be stored")
    return await stage.finish()


async def rolling_restart(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Restart all brokers as their operator would, one after the other."""
    await stage.start("service", "hand", "producer")
    await stage.flow()
    for node in cluster.nodes:
        with broken(stage, "broker restarted"):
            await asyncio.to_thread(cluster.restart, node)
            await flows(stage)
    return await stage.finish()


# ---------------------------------------------------------------------- topics and groups


async def delete_topic(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Delete the topics while they are read and written, and make them anew."""
    await stage.start("service", "hand", "producer")
    for _ in stage.rounds(range(1), range(4)):
        await stage.flow()
        with stage.fault("topic deleted", wipes=True, moves=True):
            with cluster.endpoints.wire() as admin:
                admin.delete([name_of(stage, name) for name in stage.of])
            await asyncio.sleep(stage.random.choice((0.0, 1.0)))
            async with stage.broker() as broker:
                await broker.declare(*(TOPIC if name == "topic" else queue(stage.lease) for name in stage.of))
        await flows(stage)
    return await stage.finish()


async def add_partitions(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Give what messages flow through more partitions, behind everybody's back."""
    await stage.start("service", "hand", "producer")
    await stage.flow()
    await stage.stop(*stage.living("producer"))  # its keys would move
    await stage.until(lambda: not stage.pending(), FAILOVER, "what is stored is not consumed")
    admin = AdminClient({"bootstrap.servers": cluster.endpoints.bootstrap()})
    with stage.fault("partitions added", clean=True):
        wanted = [NewPartitions(name_of(stage, name), 9) for name in stage.of]
        for each in admin.create_partitions(wanted).values():
            each.result(FAILOVER)
        await stage.start("producer", keys=12)
        await stage.flow(60, timeout=2 * FAILOVER)
    return await stage.finish(drain=60)


async def create_later(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Read a topic before it is there."""
    names = await stage.start("hand", "hand", waiting=True)
    await asyncio.sleep(2)
    await stage.start("producer")
    await stage.ready(*names)
    await stage.flow(40, timeout=FAILOVER)
    return await stage.finish()


async def forget_group(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Remove the positions of the group, as a broker does when it has had no members for a week: all begins anew."""
    await stage.start("service", "producer")
    await stage.flow()
    await stage.stop(*stage.living("producer"))
    await stage.until(lambda: not stage.pending(), FAILOVER, "what is stored is not consumed")
    await stage.stop(*stage.consumers)
    with stage.fault("positions removed", loses=1e6, moves=True):
        async with stage.broker() as broker:
            await broker.delete(TOPIC, GROUP)
        await stage.start("service", "hand", "producer")
        await stage.flow(40, timeout=FAILOVER)
    return await stage.finish()


async def one_instance(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Start two members with one name: the older one ends, and says why."""
    await stage.start("producer", "hand")
    url = f"{stage.url}&instance=twin"
    (older,) = await stage.start("hand", url=url)
    await stage.flow()
    with stage.fault("the name given to another", to=older, moves=True):
        await stage.start("hand", url=url)
        await stage.fails(older, "instance=", FAILOVER)
    await stage.flow(60)
    return await stage.finish()


async def storm(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Let a member join or leave twice a second, for a minute."""
    members = await stage.start("service", "hand", work=0.02)
    await stage.start("producer")

    async def join() -> None:
        members.extend(await stage.start(stage.random.choice(("service", "hand")), work=0.02))

    async with asyncio.TaskGroup() as tasks:
        for _ in stage.rounds(range(8), range(120)):
            if len(members) > 2 and stage.random.random() < 0.6:
                tasks.create_task(stage.stop(members.pop(stage.random.randrange(len(members)))))
            elif len(stage.consumers) < 6:
                tasks.create_task(join())
            await asyncio.sleep(0.5)
    await stage.flow(timeout=FAILOVER)
    return await stage.finish()


# ---------------------------------------------------------------------- delays


async def delays(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Let clocks be wrong, by a minute: what is delayed is neither early nor late, and comes once."""
    first, second = stage.random.sample((60.0, -60.0), 2)
    await stage.start("hand", skew=first)
    await stage.start("service", "producer", skew=second)
    await stage.flow(100, timeout=FAILOVER)
    terms = {name: msgspec.structs.replace(each, prompt=2.0 * PATIENCE) for name, each in stage.terms().items()}
    return await stage.finish(terms=terms)


async def nobody_there(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Let delays end while all processes are down."""
    await stage.start("service", "hand", "producer")
    for _ in stage.rounds(range(1), range(3)):
        await stage.published(40)
        for name in stage.living("producer", "service", "hand"):
            stage.kill(name)
        await asyncio.sleep(stage.random.choice((1.0, 5.0)))
        await stage.start("service", "hand", "producer")
        await flows(stage)
    return await stage.finish()


# ---------------------------------------------------------------------- the network


async def break_network(stage: Stage, cluster: KafkaCluster) -> Verdict:
    """Put a network between that slices, delays, freezes, and breaks connections, of one broker or of all."""
    async with Network(cluster.endpoints) as net:
        stage.url = net.url(query=stage.url.partition("?")[2])
        await stage.start("service", "hand", "producer")
        harm: list[Callable[[Network, random.Random], Awaitable[None]]] = [_outage, _reset, _slow, _hang, _drop]
        stage.random.shuffle(harm)
        for number in stage.rounds(range(3), range(20)):
            await stage.flow(5)
            with broken(stage, "network broken", times=10):
                await harm[number % len(harm)](net, stage.random)
            await stage.flow(5, timeout=FAILOVER)
        await flows(stage)
        return await stage.finish()


async def _outage(net: Network, draw: random.Random) -> None:
    for proxy in draw.sample(list(net.nodes.values()), draw.randint(1, 3)):
        proxy.disconnect()
    await asyncio.sleep(draw.random() * 1.5)
    net.accept()


async def _reset(net: Network, draw: random.Random) -> None:
    for _ in range(8):
        draw.choice(list(net.nodes.values())).reset()
        await asyncio.sleep(draw.random() / 5)


async def _slow(net: Network, draw: random.Random) -> None:
    for proxy in net.nodes.values():
        proxy.slice, proxy.delay = 50, draw.random() / 50
    await asyncio.sleep(1)
    for proxy in net.nodes.values():
        proxy.slice, proxy.delay = 0, 0.0


async def _hang(net: Network, draw: random.Random) -> None:
    for proxy in draw.sample(list(net.nodes.values()), draw.randint(1, 3)):
        proxy.freeze()
    await asyncio.sleep(draw.random() * 3)
    net.thaw()


async def _drop(net: Network, draw: random.Random) -> None:
    net.lose_replies(3)
    async with asyncio.timeout(FAILOVER):
        while net.replies:
            await asyncio.sleep(0.02)


TOPIC_ALONE: Final = ("topic",)
QUEUE_ALONE: Final = ("queue",)
WAITING: Final = {"delays": (0.5, 4.0), "delayed": 0.7}
"""Most messages wait, and most of those elsewhere."""

PLAYS: Final[dict[str, Play]] = {
    "kill consumers": Play(plays.kill_consumers),
    "kill leader": Play(kill_leader),
    "storm of the group": Play(storm, TOPIC_ALONE),
    "calm": Play(plays.calm, long=True),
    "kill producers": Play(plays.kill_producers, long=True),
    "freeze consumers": Play(plays.freeze_consumers, long=True),
    "freeze producers": Play(plays.freeze_producers, long=True),
    "deadly messages": Play(plays.deadly_messages, long=True),
    "come and go": Play(plays.come_and_go, QUEUE_ALONE, long=True),
    "wrong clocks": Play(plays.wrong_clocks, long=True),
    "storm": Play(storm, long=True),
    "freeze leader": Play(freeze_leader, long=True),
    "kill coordinator": Play(kill_coordinator, long=True),
    "freeze coordinator": Play(freeze_coordinator, long=True),
    "kill share coordinator": Play(kill_share_coordinator, long=True),
    "freeze share coordinator": Play(freeze_share_coordinator, long=True),
    "kill two": Play(kill_two, long=True),
    "rolling restart": Play(rolling_restart, long=True),
    "delete topic": Play(delete_topic, TOPIC_ALONE, long=True),
    "delete queue": Play(delete_topic, QUEUE_ALONE, long=True),
    "add partitions": Play(add_partitions, long=True),
    "create later": Play(create_later, long=True),
    "forget group": Play(forget_group, TOPIC_ALONE, long=True),
    "one instance": Play(one_instance, TOPIC_ALONE, long=True),
    "break network": Play(break_network, long=True),
    "delays": Play(delays, QUEUE_ALONE, options=WAITING, long=True),
    "delays while nobody is there": Play(nobody_there, QUEUE_ALONE, options=WAITING, long=True),
    "delays, kill consumers": Play(plays.kill_consumers, QUEUE_ALONE, options=WAITING, long=True),
    "delays, kill leader": Play(kill_leader, QUEUE_ALONE, options=WAITING, long=True),
    "classic, kill consumers": Play(plays.kill_consumers, QUEUE_ALONE, "classic", long=True),
    "classic, freeze consumers": Play(plays.freeze_consumers, QUEUE_ALONE, "classic", long=True),
    "classic, deadly messages": Play(plays.deadly_messages, QUEUE_ALONE, "classic", long=True),
    "classic, storm": Play(storm, QUEUE_ALONE, "classic", long=True),
    "classic, kill leader": Play(kill_leader, QUEUE_ALONE, "classic", long=True),
    "classic, kill coordinator": Play(kill_coordinator, QUEUE_ALONE, "classic", long=True),
    "classic, delays": Play(delays, QUEUE_ALONE, "classic", options=WAITING, long=True),
    "classic, delays while nobody is there": Play(nobody_there, QUEUE_ALONE, "classic", options=WAITING, long=True),
}
