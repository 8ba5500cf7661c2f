"""The plays: what is done to workers and servers while messages flow.

Each play handles a queue and a topic's group at once; in the end `Stage.finish` judges both.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from ..servers import FLAVORS, USER, Flavor, Proxy, RedisServer
from .checker import DEADLY, Verdict
from .stage import PATIENCE, Stage

Action: TypeAlias = Callable[[Stage, RedisServer], Awaitable[Verdict]]
LEASE: Final = 2.0
"""Seconds, of queues and of members of groups."""
OPTIONS: Final = f"session={LEASE:g}&timeout=2"
RESUMED: Final = 8.0
"""Seconds in which consumption must go on by itself after a fault; what a dead consumer had comes after its lease."""


class Play(msgspec.Struct, frozen=True):
    """A play, and the servers that it is for."""

    action: Action
    flavors: tuple[Flavor, ...] = FLAVORS
    query: str = ""
    server: dict[str, Any] = {}
    long: bool = False
    """It takes too long for every day."""

    async def perform(self, flavor: Flavor, seed: int, folder: Path, *, long: bool = False) -> Verdict:
        """Play it on a server of its own."""
        with RedisServer(flavor, **self.server) as server:
            query = f"{OPTIONS}&{self.query}" if self.query else OPTIONS
            with Stage(server.url(query=query), folder, seed, lease=LEASE, long=long) as stage:
                return await self.action(stage, server)


async def calm(stage: Stage, server: object) -> Verdict:
    """Do nothing: nothing may be repeated."""
    await stage.start("service", "hand", "producer")
    await stage.flow(60)
    return await stage.finish()


# ---------------------------------------------------------------------- processes


async def kill_consumers(stage: Stage, server: object) -> Verdict:
    """Kill consumers with messages in hand, one after the other, the last time both."""
    await stage.start("service", "hand", "producer", work=0.03)
    for victims in stage.rounds((1, 2), (1, 1, 2, 1, 2)):
        await stage.flow()
        for name in stage.random.sample(stage.consumers, victims):
            stage.kill(name)
            await stage.start(stage.random.choice(("service", "hand")), work=0.03)
        await stage.flow(timeout=RESUMED)
    return await stage.finish()


async def kill_producers(stage: Stage, server: object) -> Verdict:
    """Kill producers while they publish."""
    await stage.start("service", "hand", "producer", "producer")
    for _ in stage.rounds(range(2), range(8)):
        await stage.published()
        await asyncio.sleep(stage.random.random() / 10)
        stage.kill(stage.random.choice(stage.living("producer")))
        await stage.start("producer")
    await stage.flow()
    return await stage.finish()


async def freeze_consumers(stage: Stage, server: object) -> Verdict:
    """Stop a consumer for longer than its lease: another one takes over, and what it does when it wakes has no effect."""
    await stage.start("producer", keys=2)
    await stage.published(60)  # so that consumers have more in hand than they can begin
    await stage.start("service", "hand", work=0.04)
    await stage.flow(5)
    frozen = stage.random.choice(stage.consumers)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stage.freeze(frozen, stage.lease + 2.5))
        tasks.create_task(stage.flow(40, timeout=RESUMED))
    await stage.flow()
    return await stage.finish()


async def freeze_producers(stage: Stage, server: object) -> Verdict:
    """Stop a producer for longer than its calls may take."""
    await stage.start("service", "producer", timeout=1.0)
    await stage.flow()
    await stage.freeze(stage.living("producer")[0], 2.0)
    await stage.published()
    return await stage.finish()


async def freeze_idle_consumers(stage: Stage, server: object) -> Verdict:
    """Stop one of two consumers that have little to do: who is told of a message may be the one that sleeps."""
    await stage.start("service", "hand")
    await stage.start("producer", keys=1, pause=0.25)
    await stage.flow(5)
    frozen = stage.random.choice(stage.consumers)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stage.freeze(frozen, stage.lease + 2.5))
        tasks.create_task(stage.flow(10, timeout=RESUMED))
    await stage.flow(5)
    prompt = {"queue": 2.5, "topic": stage.lease + 3.0}
    terms = {name: msgspec.structs.replace(each, prompt=prompt[name]) for name, each in stage.terms().items()}
    return await stage.finish(terms=terms)


async def deadly_messages(stage: Stage, server: object) -> Verdict:
    """Handle messages that end their process: they die at their limit, and no other message with them."""
    limit = 4  # what others have in hand at one crash, or even two, is not to die with it
    await stage.start("service", "service", limit=limit)
    await stage.start("producer")
    await stage.flow()
    await stage.start("producer", keys=1, deadly=stage.random.choice(stage.of), pause=0.3)
    deadline = asyncio.get_running_loop().time() + 10 * limit * PATIENCE
    while await _deadly_left(stage):
        assert asyncio.get_running_loop().time() < deadline, stage.report("they do not die")
        for _ in stage.died():
            await stage.start("service", limit=limit)
        await asyncio.sleep(0.2)
    stage.died()
    await stage.start("service", limit=limit)
    await stage.flow(timeout=RESUMED)
    terms = {name: msgspec.structs.replace(each, limit=limit) for name, each in stage.terms().items()}
    return await stage.finish(terms=terms)


async def _deadly_left(stage: Stage) -> set[str]:
    dead = [id for ids in (await stage.letters()).values() for id in ids]
    return {entry.id for entry in stage.entries if entry.failures == DEADLY} - set(dead)


async def come_and_go(stage: Stage, server: object) -> Verdict:
    """Let consumers join and leave as they should: of a queue nothing may be repeated."""
    await stage.start("service", "hand", "producer", work=0.02)
    for _ in stage.rounds(range(2), range(10)):
        await stage.flow()
        await stage.start(stage.random.choice(("service", "hand")), work=0.02)
        await stage.stop(stage.random.choice(stage.consumers))
    await stage.flow()
    return await stage.finish()


async def wrong_clocks(stage: Stage, server: object) -> Verdict:
    """Let the wall clocks of all processes be wrong, by a minute: only the server's counts."""
    first, second = stage.random.sample((60.0, -60.0), 2)
    await stage.start("producer", skew=first)
    await stage.start("service", "producer", skew=second)
    await stage.start("hand", skew=first)
    await stage.flow(80)
    return await stage.finish(drain=15)


# ---------------------------------------------------------------------- the server


async def kill_server(stage: Stage, server: RedisServer) -> Verdict:
    """Kill the server, which writes everything to disk before it answers: nothing that was confirmed is lost."""
    await stage.start("service", "hand", "producer")
    for _ in stage.rounds(range(1), range(4)):
        await stage.flow()
        with stage.fault("server killed"):
            server.kill()
            await asyncio.sleep(stage.random.choice((0.0, 1.5)))
            server.start()
        await stage.flow(timeout=RESUMED)
        await stage.published(timeout=RESUMED)
    return await stage.finish()


async def kill_forgetful_server(stage: Stage, server: RedisServer) -> Verdict:
    """Kill a server that writes to disk every second: at most the last second is lost, and the one that a write takes."""
    await stage.start("service", "hand", "producer")
    await stage.flow()
    with stage.fault("server killed", loses=2.0):
        server.kill()
        server.start()
    await stage.flow(timeout=RESUMED)
    await stage.published(timeout=RESUMED)
    return await stage.finish()


async def restart_server(stage: Stage, server: RedisServer) -> Verdict:
    """Restart the server as its operator would."""
    await stage.start("service", "hand", "producer")
    await stage.flow()
    with stage.fault("server restarted"):
        server.shutdown()
        await asyncio.sleep(stage.random.choice((0.0, 1.5)))
        server.start()
    await stage.flow(timeout=RESUMED)
    await stage.published(timeout=RESUMED)
    return await stage.finish()


async def freeze_server(stage: Stage, server: RedisServer) -> Verdict:
    """Stop the server for longer than leases, and than clients wait for an answer."""
    await stage.start("service", "hand", "producer")
    await stage.flow()
    with stage.fault("server frozen"):
        server.freeze()
        await asyncio.sleep(stage.random.choice((1.0, stage.lease + 1.5)))
        server.thaw()
    await stage.flow(timeout=RESUMED)
    await stage.published(timeout=RESUMED)
    return await stage.finish()


async def kill_connections(stage: Stage, server: RedisServer) -> Verdict:
    """Have the server end all connections, again and again."""
    await stage.start("service", "hand", "producer")
    for _ in stage.rounds(range(5), range(30)):
        await stage.flow(3)
        with stage.fault("connections killed"):
            for kind in stage.random.sample(("normal", "pubsub"), 2):
                await server.command("CLIENT", "KILL", "TYPE", kind)
        await asyncio.sleep(stage.random.random() / 5)
    await stage.flow(timeout=RESUMED)
    await stage.published(timeout=RESUMED)
    return await stage.finish()


async def flush_scripts(stage: Stage, server: RedisServer) -> Verdict:
    """Have the server forget all scripts, again and again: nobody may notice."""
    await stage.start("service", "hand", "producer")
    for _ in stage.rounds(range(20), range(100)):
        with stage.fault("scripts flushed", excuses=False):
            await server.command("SCRIPT", "FLUSH")
        await asyncio.sleep(stage.random.random() / 10)
    await stage.flow()
    return await stage.finish()


async def flush_all(stage: Stage, server: RedisServer) -> Verdict:
    """Remove all keys: what was stored is gone, as somebody wanted it; working goes on by itself."""
    await stage.start("service", "hand", "producer")
    for _ in stage.rounds(range(1), range(4)):
        await stage.flow()
        with stage.fault("all keys removed", wipes=True):
            await server.command("FLUSHALL")
        await stage.published(timeout=RESUMED)
        await stage.flow(timeout=RESUMED)
    return await stage.finish()


async def full_server(stage: Stage, server: RedisServer) -> Verdict:
    """Let the server be full: publishing is refused, consuming goes on to the end, and then publishing works again."""
    await stage.start("service", "hand", work=0.03)
    await stage.start("producer", timeout=0.5)
    await stage.flow()
    with stage.fault("server full", excuses=False):
        await server.command("CONFIG", "SET", "maxmemory", "1mb")
        await stage.until(
            lambda: (
                {e.of for e in stage.entries if e.what == "refused" and e.text.startswith("BufferFull")}
                == {"queue", "topic"}
            ),
            RESUMED,
            "publishing is not refused",
        )
        await stage.until(lambda: not stage.pending(), RESUMED, "what is stored is not consumed")
        await server.command("CONFIG", "SET", "maxmemory", "0")
    await stage.published(timeout=RESUMED)
    await stage.flow(timeout=RESUMED)
    return await stage.finish()


async def change_password(stage: Stage, server: RedisServer) -> Verdict:
    """Change the password, end all connections, and tell the clients the new one a moment later, in its file."""
    with tempfile.NamedTemporaryFile("w", suffix=".password") as file:
        Path(file.name).write_text(server.passwords[USER] + "\n", encoding="utf-8")
        where = server.url().rpartition("@")[2]
        stage.url = f"redis://{where}?password_file={file.name}&username={USER}&{OPTIONS}"
        await stage.start("service", "hand", "producer")
        for _ in stage.rounds(range(1), range(4)):
            await stage.flow()
            with stage.fault("password changed"):
                await server.passwd(USER, f"new {stage.random.random()} ü")
                for kind in ("normal", "pubsub"):
                    await server.command("CLIENT", "KILL", "TYPE", kind)
                await asyncio.sleep(stage.random.random())
                Path(file.name).write_text(server.passwords[USER] + "\n", encoding="utf-8")
            await stage.flow(timeout=RESUMED)
            await stage.published(timeout=RESUMED)
        return await stage.finish()


# ---------------------------------------------------------------------- the network


async def break_network(stage: Stage, server: RedisServer) -> Verdict:
    """Put a network between that slices, delays, freezes, and breaks connections anywhere."""
    async with Proxy(server.host, server.port) as proxy:
        stage.url = server.url(port=proxy.port, query=OPTIONS)
        await stage.start("service", "hand", "producer")
        harm: list[Callable[[random.Random], Awaitable[None]]] = [
            lambda draw: _cut(proxy, draw),
            lambda draw: _outage(proxy, draw),
            lambda draw: _slow(proxy, draw),
            lambda draw: _hang(proxy, draw),
            lambda draw: _drop(proxy, draw),
        ]
        stage.random.shuffle(harm)
        for number in stage.rounds(range(5), range(20)):
            await stage.flow(5)
            with stage.fault("network broken"):
                await harm[number % len(harm)](stage.random)
            await stage.flow(5, timeout=RESUMED)
        await stage.published(timeout=RESUMED)
        return await stage.finish()


async def _cut(proxy: Proxy, draw: random.Random) -> None:
    for _ in range(5):
        proxy.cut_after(draw.randrange(600), draw.choice(("up", "down")))
        await asyncio.sleep(draw.random() / 10)


async def _outage(proxy: Proxy, draw: random.Random) -> None:
    proxy.disconnect()
    await asyncio.sleep(draw.random() * 1.5)
    proxy.accept()


async def _slow(proxy: Proxy, draw: random.Random) -> None:
    proxy.slice, proxy.delay = 1, draw.random() / 20
    await asyncio.sleep(1)
    proxy.slice, proxy.delay = 0, 0.0


async def _hang(proxy: Proxy, draw: random.Random) -> None:
    proxy.freeze()
    await asyncio.sleep(draw.random() * 3)
    proxy.thaw()


async def _drop(proxy: Proxy, draw: random.Random) -> None:
    lost = proxy.lost
    proxy.lose_replies(3, [b"EVALSHA"])
    async with asyncio.timeout(RESUMED):
        while proxy.lost < lost + 3:
            await asyncio.sleep(0.02)


AOF: Final = {"appendonly": True, "appendfsync": "always"}
EVERYSEC: Final = {"appendonly": True, "appendfsync": "everysec"}
DURABLE: Final = "durability=aof"

PLAYS: Final[dict[str, Play]] = {
    "calm": Play(calm),
    "kill consumers": Play(kill_consumers),
    "kill producers": Play(kill_producers),
    "freeze consumers": Play(freeze_consumers),
    "freeze idle consumers": Play(freeze_idle_consumers, long=True),
    "freeze producers": Play(freeze_producers, long=True),
    "deadly messages": Play(deadly_messages, long=True),
    "come and go": Play(come_and_go),
    "wrong clocks": Play(wrong_clocks),
    "kill server, always": Play(kill_server, query=DURABLE, server=AOF),
    "kill server, every second, sealed": Play(kill_server, ("valkey",), query=DURABLE, server=EVERYSEC),
    "kill server, every second": Play(kill_forgetful_server, server=EVERYSEC),
    "restart server": Play(restart_server, server=EVERYSEC, long=True),
    "freeze server": Play(freeze_server),
    "kill connections": Play(kill_connections),
    "flush scripts": Play(flush_scripts),
    "flush all": Play(flush_all),
    "full server": Play(full_server),
    "change password": Play(change_password),
    "break network": Play(break_network),
}
