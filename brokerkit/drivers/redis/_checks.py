"""What is asked of a server on each new connection, before anything is stored on it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from ...errors import AuthorizationError, BrokerError, BrokerUnavailable, ConfigError
from ._errors import translate
from ._options import Settings
from ._wire import Wire

logger = logging.getLogger("brokerkit")

OLDEST: Final = (7, 0)
PROBE: Final = b"bk:{bk}:c"
"""A channel that nobody listens to."""
_SECTIONS: Final = ("server", "memory", "replication", "persistence")
_VERSION = re.compile(r"(\d+)\.(\d+)")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is."""

    server: str
    """Its name and version, for texts: "Redis 7.0.15"."""
    aof: bool
    """It keeps what it stores in a file, and has it again after a restart."""
    waitaof: bool
    """It can tell when that is on disk: with ``durability="aof"`` every store is followed by WAITAOF."""


async def check(wire: Wire, settings: Settings, warned: set[str]) -> Facts:
    """Return what the server at the other end of *wire*, which nobody else uses yet, is.

    Warns of what is dangerous only in time, each thing once; *warned* remembers.

    Raises:
        ConfigError: it is too old, a replica, drops messages when it is full, or is not as durable as asked for.
        AuthorizationError: it may not be asked.
        BrokerUnavailable: it does not answer in time, or is still loading.
    """
    what = f"looking at {settings.shown}"
    failure: BrokerError
    try:
        async with asyncio.timeout(settings.connect_timeout):
            return await _check(wire, settings, warned)
    except TimeoutError:
        failure = BrokerUnavailable(f"{what}: no answer within {settings.connect_timeout:g} s")
    except BrokerError:
        raise
    except Exception as error:
        failure = translate(error, what)
    raise failure


async def _check(wire: Wire, settings: Settings, warned: set[str]) -> Facts:
    info: dict[str, str] = {}
    for reply in await _ask(wire, *(("INFO", section) for section in _SECTIONS)):
        info |= _lines(reply)
    server = _server(info)
    _refuse_wrong_kinds(info, server, settings)
    _check_memory(info, server, settings, warned)
    aof = info.get("aof_enabled") == "1"
    waitaof = False
    if settings.durability == "aof":
        if not aof:
            raise ConfigError(
                f'{settings.shown}: durability="aof" is asked for, but this {server} has appendonly no; '
                "set appendonly yes in its configuration"
            )
        waitaof = await _check_fsync(wire, server, settings)
    # Without it everything works, only slowly: better to say so at once.  Since Redis 7 a new user may use no channel.
    await _ask(wire, ("SPUBLISH", PROBE, b""))
    return Facts(server=server, aof=aof, waitaof=waitaof)


def _server(info: Mapping[str, str]) -> str:
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info.get('redis_version', 'of unknown version')}"


def _refuse_wrong_kinds(info: Mapping[str, str], server: str, settings: Settings) -> None:
    found = _VERSION.match(info.get("redis_version", ""))
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise ConfigError(f"{settings.shown} is {server}; brokerkit needs Redis 7.0 or newer, or Valkey")
    mode = info.get("redis_mode") or info.get("server_mode")
    if mode in {"cluster", "sentinel"}:
        raise ConfigError(f"{settings.shown} runs in {mode} mode, which this release cannot use")
    if info.get("loading") == "1":
        raise BrokerUnavailable(f"{settings.shown} is loading its data")
    if info.get("role", "master") != "master":
        primary = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        raise ConfigError(f"{settings.shown} is a replica, which takes no writes; connect to its primary, {primary}")


def _check_memory(info: Mapping[str, str], server: str, settings: Settings, warned: set[str]) -> None:
    policy, limit = info.get("maxmemory_policy", ""), info.get("maxmemory", "0")
    if policy in {"", "noeviction"}:
        return
    if policy.startswith("allkeys-") and limit != "0":
        raise ConfigError(
            f"{settings.shown}: this {server} drops any key when it is full (maxmemory-policy {policy}), "
            "so messages would be lost; set maxmemory-policy noeviction"
        )
    if policy not in warned:
        warned.add(policy)
        when = "as soon as it gets a maxmemory" if limit == "0" else "when it is full"
        which = "any key" if policy.startswith("allkeys-") else "keys that have a time to live"
        logger.warning(
            "%s: this %s would drop %s %s (maxmemory-policy %s); set maxmemory-policy noeviction",
            settings.shown,
            server,
            which,
            when,
            policy,
        )


async def _check_fsync(wire: Wire, server: str, settings: Settings) -> bool:
    """Return whether the server has WAITAOF; without it, it must write to disk before it answers."""
    # Probed, not looked up: the user may then run it, and a version says nothing about what a fork can do.
    (probed,) = await _ask(wire, ("WAITAOF", 0, 0, 1), refused=True)
    has = not isinstance(probed, Exception)
    if isinstance(probed, Exception):
        problem = translate(probed, "WAITAOF")
        if isinstance(problem, AuthorizationError):
            raise problem
    (answer,) = await _ask(wire, ("CONFIG", "GET", "appendfsync"), refused=True)
    policy = _configured(answer)
    if policy == "always" or (has and policy in {"everysec", None}):
        return has
    if policy is None:
        raise ConfigError(
            f'{settings.shown}: durability="aof" is asked for; this {server} has no WAITAOF, so it must have appendfsync '
            "always, and this user may not ask for that: allow it config|get"
        )
    needed = "always or everysec" if has else "always (everysec is enough from Redis 7.2 on)"
    raise ConfigError(
        f'{settings.shown}: durability="aof" is asked for, but this {server} has appendfsync {policy}; set appendfsync {needed}'
    )


def _configured(answer: object) -> str | None:
    """Return the value in the reply to CONFIG GET of one name, None if it was refused."""
    if isinstance(answer, Mapping):
        values: list[object] = list(answer.values())  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(answer, Sequence) and not isinstance(answer, (str, bytes)):
        values = list(answer[1:])  # pyright: ignore[reportUnknownArgumentType]
    else:
        values = []
    return _text(values[0]) if values else None


async def _ask(wire: Wire, *commands: tuple[str | int | bytes, ...], refused: bool = False) -> list[object]:
    """Send *commands* at once and return their replies; with *refused*, what the server said no with is a reply too."""
    await wire.send_packed_command([part for command in commands for part in wire.pack_command(*command)])
    replies: list[object] = []
    for _ in commands:
        try:
            replies.append(await wire.read_response())
        except Exception as error:
            if not refused or not wire.is_connected:
                raise
            replies.append(error)
    return replies


def _lines(reply: object) -> dict[str, str]:
    """Return the fields of a reply to INFO."""
    pairs = (line.partition(":") for line in _text(reply).splitlines() if not line.startswith("#"))
    return {name: value.strip() for name, colon, value in pairs if colon}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
