"""Which servers are refused, warned of and taken, on each new connection."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import pytest

from brokerkit.drivers._url import Options, parse
from brokerkit.drivers.redis._checks import Facts, check
from brokerkit.drivers.redis._options import Settings, settings
from brokerkit.drivers.redis._wire import Wire, close, connect
from brokerkit.errors import AuthorizationError, BrokerUnavailable, ConfigError
from tests.servers import ADMIN, FLAVORS, Flavor, RedisServer

pytestmark = pytest.mark.asyncio


def read(url: str, **options: object) -> Settings:
    """Return the settings of a URL."""
    parsed = parse(url)
    return settings(parsed, Options({**parsed.query, **options}, "redis://"))


async def look(made: Settings, warned: set[str] | None = None) -> Facts:
    """Connect and check."""
    wire = await connect(made)
    try:
        return await check(wire, made, set() if warned is None else warned)
    finally:
        await close(wire)


class Told:
    """A connection to a server that says of itself what it is told to."""

    def __init__(self, changed: Mapping[str, str], answer: Callable[[str], object] = lambda _: None) -> None:
        usual = {"redis_version": "7.0.15", "redis_mode": "standalone", "role": "master", "aof_enabled": "0"}
        self._info = {**usual, "maxmemory": "0", "maxmemory_policy": "noeviction", "loading": "0", **changed}
        self._answer = answer
        self._asked: list[str] = []
        self.is_connected = True

    def pack_command(self, *args: object) -> list[bytes]:
        return [" ".join(map(str, args)).encode()]

    async def send_packed_command(self, command: Iterable[bytes], check_health: bool = True) -> None:
        self._asked += [part.decode() for part in command]

    async def read_response(self, **options: object) -> object:
        asked = self._asked.pop(0)
        if asked.startswith("INFO"):
            return "\r\n".join(("# Part", *(f"{name}:{value}" for name, value in self._info.items()))).encode()
        answer = self._answer(asked)
        if isinstance(answer, Exception):
            raise answer
        return answer


def told(**changed: str) -> Wire:
    return cast("Wire", Told(changed))


# ---------------------------------------------------------------------- real servers


@pytest.mark.parametrize("flavor", FLAVORS)
async def test_what_a_server_is(flavor: Flavor) -> None:
    with RedisServer(flavor) as plain:
        facts = await look(read(plain.url()))
        assert (facts.aof, facts.waitaof) == (False, False)
        assert re.fullmatch(r"Redis [78]\.\d+\.\d+" if flavor == "redis" else r"Valkey 9\.\d+\.\d+", facts.server)


@pytest.mark.parametrize("flavor", FLAVORS)
async def test_durability_asked_for_is_durability_got_or_a_refusal(flavor: Flavor) -> None:
    with RedisServer(flavor) as plain, RedisServer(flavor, appendonly=True) as kept:
        with pytest.raises(ConfigError, match="set appendonly yes"):
            await look(read(plain.url(), durability="aof"))
        facts = await look(read(kept.url()))
        assert (facts.aof, facts.waitaof) == (True, False)
        asked = read(kept.url(), durability="aof")
        has_waitaof = flavor == "valkey"
        if has_waitaof:
            assert (await look(asked)).waitaof
        else:
            with pytest.raises(ConfigError, match="appendfsync everysec; set appendfsync always"):
                await look(asked)
        await kept.command("CONFIG", "SET", "appendfsync", "always")
        facts = await look(asked)
        assert (facts.aof, facts.waitaof) == (True, has_waitaof)
        await kept.command("CONFIG", "SET", "appendfsync", "no")
        with pytest.raises(ConfigError, match="appendfsync no; set appendfsync always"):
            await look(asked)


async def test_a_user_who_may_not_ask_is_told_what_to_allow() -> None:
    least = "+hello +client|setname +info ~bk:* +spublish &bk:*"
    users = {"blind": "+hello +client|setname", "least": least}
    with (
        RedisServer("redis", appendonly=True, users=users) as old,
        RedisServer("valkey", appendonly=True, users={**users, "most": f"{least} +waitaof"}) as new,
    ):
        with pytest.raises(AuthorizationError, match=r"'info'.*README"):
            await look(read(old.url(user="blind")))
        with pytest.raises(ConfigError, match=r"no WAITAOF.*config\|get"):
            await look(read(old.url(user="least"), durability="aof"))
        with pytest.raises(AuthorizationError, match=r"'waitaof'"):
            await look(read(new.url(user="least"), durability="aof"))
        assert (await look(read(new.url(user="most"), durability="aof"))).waitaof


@pytest.mark.parametrize("flavor", FLAVORS)
async def test_a_server_that_would_drop_messages_is_refused(flavor: Flavor, caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(flavor) as server:
        made = read(server.url())
        await server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "maxmemory", "100mb")
        with pytest.raises(ConfigError, match=r"allkeys-lru.*set maxmemory-policy noeviction"):
            await look(made)
        warned: set[str] = set()
        await server.command("CONFIG", "SET", "maxmemory", "0")
        for _ in range(3):
            await look(made, warned)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "any key as soon as it gets a maxmemory (maxmemory-policy allkeys-lru)" in caplog.text
        await server.command("CONFIG", "SET", "maxmemory-policy", "volatile-ttl", "maxmemory", "100mb")
        for _ in range(3):
            await look(made, warned)
        assert "keys that have a time to live when it is full (maxmemory-policy volatile-ttl)" in caplog.text
        assert len(caplog.records) == 2


@pytest.mark.parametrize("flavor", FLAVORS)
async def test_a_replica_is_refused(flavor: Flavor) -> None:
    with RedisServer(flavor) as server:
        await server.command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(ConfigError, match=r"is a replica.*connect to its primary, 127.0.0.1:1"):
            await look(read(server.url()))


async def test_a_node_of_a_cluster_is_refused() -> None:
    with RedisServer("redis", config={"cluster-enabled": "yes"}) as server:
        with pytest.raises(ConfigError, match="runs in cluster mode"):
            await look(read(server.url(user=ADMIN)))


async def test_a_server_that_stops_answering_is_unavailable_in_time() -> None:
    with RedisServer("redis") as server:
        made = read(server.url(), connect_timeout=0.3)
        wire = await connect(made)
        server.freeze()
        try:
            with pytest.raises(BrokerUnavailable, match=r"no answer within 0.3 s"):
                await check(wire, made, set())
        finally:
            await close(wire)
        server.thaw()
        wire = await connect(made)
        server.kill()
        try:
            with pytest.raises(BrokerUnavailable, match="looking at redis://"):
                await check(wire, made, set())
        finally:
            await close(wire)


# ---------------------------------------------------------------------- servers that are not here


@pytest.mark.parametrize(
    "changed, kind, text",
    [
        ({"redis_version": "6.2.14"}, ConfigError, "is Redis 6.2.14; brokerkit needs Redis 7.0"),
        ({"redis_version": ""}, ConfigError, "brokerkit needs Redis 7.0"),
        ({"redis_mode": "sentinel"}, ConfigError, "sentinel mode"),
        ({"server_mode": "cluster", "redis_mode": ""}, ConfigError, "cluster mode"),
        ({"loading": "1"}, BrokerUnavailable, "loading"),
        ({"role": "slave", "master_host": "h", "master_port": "7"}, ConfigError, "primary, h:7"),
        ({"maxmemory_policy": "allkeys-lfu", "maxmemory": "1"}, ConfigError, "allkeys-lfu"),
    ],
)
async def test_what_is_refused(changed: dict[str, str], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        await check(told(**changed), read("redis://h"), set())


async def test_what_is_taken() -> None:
    for version, server in (("7.0.0", "Redis 7.0.0"), ("8.6.3", "Redis 8.6.3"), ("10.1", "Redis 10.1")):
        assert (await check(told(redis_version=version), read("redis://h"), set())).server == server
    facts = await check(told(redis_version="7.2.4", valkey_version="8.1.8"), read("redis://h"), set())
    assert facts.server == "Valkey 8.1.8"


@pytest.mark.parametrize("answer", [{b"appendfsync": b"always"}, [b"appendfsync", b"always"]])
async def test_a_setting_is_read_in_either_form(answer: object) -> None:
    def answers(asked: str) -> object:
        return answer if asked.startswith("CONFIG") else [1, 0]

    wire: Any = Told({"aof_enabled": "1"}, answers)
    assert (await check(wire, read("redis://h", durability="aof"), set())).waitaof
