"""Publishing to real brokers that are killed, frozen and restarted: nothing is lost or doubled, and nothing hangs."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from brokerkit.address import AnyTopic
from brokerkit.driver import Receipt
from brokerkit.drivers.kafka import KafkaDriver
from brokerkit.errors import AuthorizationError, BrokerUnavailable, NotAttempted, NotFound, PublishUnknown, TooLarge
from tests.servers.kafka import KafkaCluster, Network

from .guests import guest
from .publishing import cluster_of, driver, kinds, outboxes_of, read, record, topic

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def one() -> Iterator[KafkaCluster]:
    """A broker that tests may kill; it would create topics for those who let it."""
    with KafkaCluster(autocreate=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three() -> Iterator[KafkaCluster]:
    """Three brokers, of which two must have what is published."""
    with KafkaCluster(brokers=3, config={"min.insync.replicas": "2", "broker.session.timeout.ms": "3000"}) as cluster:
        yield cluster


def create(cluster: KafkaCluster, partitions: int = 1, settings: dict[str, str] | None = None) -> AnyTopic:
    made = topic(partitions=partitions)
    with cluster.endpoints.wire() as admin:
        admin.create(made.name, partitions, settings)
    return made


class Storm:
    """Publishes numbers, key by key, one after the other, for as long as an ``async with`` lasts."""

    def __init__(self, made: KafkaDriver, to: AnyTopic, *, keys: int = 8, timeout: float = 30.0) -> None:
        self.made = made
        self.to = to
        self.keys = [b"key%d" % number for number in range(keys)]
        self.timeout = timeout
        self.outcomes: dict[tuple[bytes, bytes], Any] = {}
        self.slowest = 0.0
        self.ending = False
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Storm:
        self.tasks = [asyncio.ensure_future(self.publish(key)) for key in self.keys]
        await self.more(20)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.ending = True
        async with asyncio.timeout(self.timeout + 10):
            await asyncio.gather(*self.tasks)

    async def publish(self, key: bytes) -> None:
        number = 0
        while not self.ending:
            number += 1
            began = time.monotonic()
            body = b"%d" % number
            (self.outcomes[key, body],) = await self.made.publish([record(self.to, body, key)], timeout=self.timeout)
            self.slowest = max(self.slowest, time.monotonic() - began)
            await asyncio.sleep(0.01)  # a broker that starts needs this machine, too

    @property
    def stored(self) -> int:
        return sum(isinstance(outcome, Receipt) for outcome in self.outcomes.values())

    async def more(self, count: int = 100) -> None:
        """Return when so many more are stored."""
        wanted = self.stored + count
        end = time.monotonic() + 40
        while self.stored < wanted:
            assert time.monotonic() < end, f"publishing does not go on: {Counter(map(type, self.outcomes.values()))}"
            await asyncio.sleep(0.01)

    async def check(self, cluster: KafkaCluster) -> None:
        """See that what was said is what another client finds."""
        messages = await asyncio.to_thread(read, cluster.endpoints, self.to.name)
        found = Counter((message.key(), message.value()) for message in messages)
        places = {
            (m.key(), m.value()): f"{m.topic()}[{m.partition()}]@{m.timestamp()[1]}-{m.offset()}" for m in messages
        }
        assert max(found.values()) == 1, f"stored twice: {[each for each in found if found[each] > 1]}"
        for each, outcome in self.outcomes.items():
            if isinstance(outcome, Receipt):
                assert found[each] == 1, f"{each} is lost"
                assert outcome.position in {None, places[each]}
            elif isinstance(outcome, PublishUnknown):
                continue
            else:
                assert isinstance(outcome, BrokerUnavailable), outcome
                assert found[each] == 0, f"{each} is stored, and was said not to be"
        for key in self.keys:
            order = [
                int(m.value())
                for m in messages
                if m.key() == key and isinstance(self.outcomes[key, m.value()], Receipt)
            ]
            assert order == sorted(order), f"{key!r} is out of order"


async def test_nothing_is_lost_when_a_broker_is_killed_and_restarted(one: KafkaCluster) -> None:
    to = create(one, 4)
    async with driver(one.endpoints.url()) as made:
        async with Storm(made, to) as storm:
            for _ in range(2):
                await asyncio.to_thread(one.kill)
                await asyncio.to_thread(one.revive)
                await storm.more()
        assert all(isinstance(outcome, Receipt) for outcome in storm.outcomes.values())
        await storm.check(one)


async def test_nothing_is_lost_when_a_broker_is_frozen_for_a_while(one: KafkaCluster) -> None:
    to = create(one, 4)
    async with driver(one.endpoints.url()) as made:
        async with Storm(made, to) as storm:
            one.freeze()
            await asyncio.sleep(3)
            one.thaw()
            await storm.more()
        assert all(isinstance(outcome, Receipt) for outcome in storm.outcomes.values())
        await storm.check(one)


async def test_a_broker_that_is_frozen_for_longer_than_a_deadline_leaves_it_open(one: KafkaCluster) -> None:
    """The requests of before are carried out after the thaw; no number is used for anything else."""
    to = create(one, 4)
    async with driver(one.endpoints.url(), timeout=1.0) as made:
        async with Storm(made, to, timeout=0.5) as storm:
            for pause in (0.8, 3.0):
                one.freeze()
                await asyncio.sleep(pause)
                one.thaw()
                await storm.more()
        assert storm.slowest < 2.5
        assert any(isinstance(outcome, PublishUnknown) for outcome in storm.outcomes.values())
        await storm.check(one)


async def test_nothing_is_doubled_when_answers_are_lost(one: KafkaCluster) -> None:
    to = create(one, 4)
    async with Network(one.endpoints) as network, driver(network.url()) as made:
        async with Storm(made, to) as storm:
            for _ in range(5):
                network.lose_replies(1)
                await storm.more(30)
                network.reset()
                await storm.more(30)
        assert sum(proxy.lost for proxy in network.nodes.values()) == 5
        assert all(isinstance(outcome, Receipt) for outcome in storm.outcomes.values())
        await storm.check(one)


async def test_a_refused_record_fails_alone(one: KafkaCluster) -> None:
    """Larger than the topic takes, or from a clock that is days ahead: aiokafka's issue 1017."""
    to = create(one, 1, {"max.message.bytes": "100000"})
    async with driver(one.endpoints.url()) as made:
        records = [record(to, f"v{n}") for n in range(30)]
        records[7] = record(to, "7" * 150_000)
        records[19] = record(to, "v19", timestamp=time.time() + 5 * 86400)
        results = await made.publish(records, timeout=10)
        assert isinstance(results[7], TooLarge)
        assert "clock" in str(results[19])
        assert {n for n, result in enumerate(results) if not isinstance(result, Receipt)} == {7, 19}
        assert kinds(await made.publish([record(to, "after")], timeout=10)) == [Receipt]
        found = [message.value() for message in read(one.endpoints, to.name)]
        assert found == [b"v%d" % n for n in range(30) if n not in {7, 19}] + [b"after"]


async def test_a_look_creates_no_topic(one: KafkaCluster) -> None:
    absent = topic()
    async with driver(one.endpoints.url()) as made:
        assert kinds(await made.publish([record(absent, "a")], timeout=5)) == [NotFound]
        cluster_of(made).watch(absent.name)
        await cluster_of(made).refreshed(5)
    with one.endpoints.wire() as admin:
        assert absent.name not in admin.cluster(None).topics


async def test_a_topic_that_is_made_again_is_published_to(one: KafkaCluster) -> None:
    to = create(one, 2)
    async with driver(one.endpoints.url()) as made:
        assert kinds(await made.publish([record(to, "old", b"k")], timeout=5)) == [Receipt]
        with one.endpoints.wire() as admin:
            admin.delete([to.name])
            # A leader that has not heard of it yet stores, and one that is about to give up a partition says no more.
            outcome: Any = None
            while not isinstance(outcome, NotFound):
                (outcome,) = await made.publish([record(to, "a", b"k")], timeout=5)
                assert type(outcome) in {NotFound, PublishUnknown, Receipt}
            results = await made.publish([record(to, "b", b"k"), record(to, "c", b"k")], timeout=5)
            assert kinds(results) == [NotFound, NotAttempted]
            admin.create(to.name, 4)
            (result,) = await made.publish([record(to, "new", b"k")], timeout=5)
            assert isinstance(result, Receipt)
            # And in between two publishes: what is said to be stored is in the new one.
            admin.delete([to.name])
            admin.create(to.name, 1)
        (result,) = await made.publish([record(to, "newer", b"k")], timeout=5)
        assert isinstance(result, Receipt)
        assert [message.value() for message in read(one.endpoints, to.name)] == [b"newer"]


async def test_partitions_that_are_added_are_used(one: KafkaCluster) -> None:
    to = create(one, 1)
    async with driver(one.endpoints.url()) as made:
        await made.publish([record(to, "first", b"k")], timeout=5)
        admin: Any = AdminClient({"bootstrap.servers": one.endpoints.bootstrap()})
        admin.create_partitions([NewPartitions(to.name, 5)])[to.name].result(10)
        while len(outboxes_of(made)._boxes[to.name].lanes) < 5:
            await cluster_of(made).refreshed(5)
        await made.publish([record(to, f"v{n}", b"key%d" % n) for n in range(40)], timeout=5)
        assert len({message.partition() for message in read(one.endpoints, to.name)}) == 5


async def test_rights_that_are_taken_and_given_back() -> None:
    """Told at once each time; the numbers go on."""
    with guest() as who:
        who.create("orders", 1)
        to = topic(who.prefix + "orders")
        network = who.url().partition("?")[0]
        async with driver(network) as made:
            assert kinds(await made.publish([record(to, "a", b"k")], timeout=5)) == [AuthorizationError]
            describe, write = who.right("topic", "describe"), who.right("topic", "write")
            who.allow(describe)
            (result,) = await made.publish([record(to, "a", b"k")], timeout=5)
            assert isinstance(result, AuthorizationError)
            assert "WRITE on topic" in str(result)
            for turn in range(2):
                who.allow(write)
                assert kinds(await made.publish([record(to, f"good {turn}", b"k")], timeout=5)) == [Receipt]
                who.forbid(write)
                began = time.monotonic()
                results = await made.publish([record(to, f"bad {turn}", b"k"), record(to, "c", b"k")], timeout=5)
                assert kinds(results) == [AuthorizationError, NotAttempted]
                assert time.monotonic() - began < 2
            who.forbid(describe)
            await cluster_of(made).refreshed(5)
            (result,) = await made.publish([record(to, "bad", b"k")], timeout=5)
            assert isinstance(result, AuthorizationError)
            who.allow(write)
            assert kinds(await made.publish([record(to, "last", b"k")], timeout=5)) == [Receipt]
            assert [m.value() for m in read(who.endpoints, to.name)] == [b"good 0", b"good 1", b"last"]


# ---------------------------------------------------------------------- three brokers


async def test_nothing_is_lost_when_leaders_are_killed(three: KafkaCluster) -> None:
    to = create(three, 6)
    async with driver(three.endpoints.url()) as made:
        async with Storm(made, to, keys=24) as storm:
            for number in (0, 3):
                node = three.leader(to.name, number)
                await asyncio.to_thread(three.kill, node)
                await storm.more(200)
                await asyncio.to_thread(three.revive, node)
                await storm.more(200)
        assert all(isinstance(outcome, Receipt) for outcome in storm.outcomes.values())
        await storm.check(three)


async def test_a_frozen_leader_is_left_as_soon_as_another_leads(three: KafkaCluster) -> None:
    to = create(three, 6)
    async with driver(three.endpoints.url()) as made:
        async with Storm(made, to, keys=24) as storm:
            node = three.leader(to.name, 0)
            three.freeze(node)
            await asyncio.sleep(0.5)
            await asyncio.wait_for(storm.more(300), 25)
            three.thaw(node)
            await storm.more(200)
        assert all(isinstance(outcome, Receipt) for outcome in storm.outcomes.values())
        await storm.check(three)


async def test_publishing_is_refused_while_copies_are_missing(three: KafkaCluster) -> None:
    to = create(three, 6)
    async with driver(three.endpoints.url()) as made:
        async with Storm(made, to, keys=24, timeout=1.0) as storm:
            gone = [node for node in three.nodes if node != three.leader(to.name, 0)]
            for node in gone:
                three.kill(node)
            await asyncio.sleep(1.5)  # longer than the deadline of what was under way
            before, said = storm.stored, len(storm.outcomes)
            await asyncio.sleep(1.5)
            assert storm.stored == before, "stored without copies"
            assert len(storm.outcomes) >= said + len(storm.keys)
            for node in gone:
                await asyncio.to_thread(three.revive, node)
            await storm.more(200)
        assert storm.slowest < 3.0
        await storm.check(three)


async def test_with_one_copy_too_few_nothing_is_stored_and_nothing_in_doubt(three: KafkaCluster) -> None:
    """The leader says so itself, when it has given up the others."""
    to = create(three, 1, {"min.insync.replicas": "3"})
    async with driver(three.endpoints.url()) as made:
        assert kinds(await made.publish([record(to, "first")], timeout=10)) == [Receipt]
        node = next(node for node in three.nodes if node != three.leader(to.name))
        await asyncio.to_thread(three.shutdown, node)
        refused: list[Any] = []
        end = time.monotonic() + 30
        while sum(type(result) is BrokerUnavailable for result in refused) < 3:
            refused += await made.publish([record(to, f"refused {len(refused)}")], timeout=0.5)
            assert time.monotonic() < end, refused
        assert "min.insync.replicas" in str(refused[-1])
        await asyncio.to_thread(three.revive, node)
        assert kinds(await made.publish([record(to, "last")], timeout=20)) == [Receipt]
        found = [message.value() for message in await asyncio.to_thread(read, three.endpoints, to.name)]
        certain = {b"refused %d" % n for n, result in enumerate(refused) if type(result) is BrokerUnavailable}
        assert not certain & set(found)
        assert (found[0], found[-1]) == (b"first", b"last")
