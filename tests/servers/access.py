"""The least that a program with brokerkit needs to be allowed on a Redis server: all tests run with it."""

from __future__ import annotations

import textwrap
from typing import Final

USER: Final = "brokerkit"
"""The user of the tests, with the rights of the line in README and no others."""
ADMIN: Final = "default"
"""The user that may do anything, for what tests do to a server behind the back of brokerkit."""

KEYS: Final = ("~bk:*",)
CHANNELS: Final = ("&bk:*",)
CONNECTING: Final = ("auth", "client|setname", "hello", "ping", "select")
"""What each connection begins with, and is kept alive by."""
CALLED: Final = (
    "config|get",
    "evalsha",
    "hmget",
    "info",
    "script|load",
    "spublish",
    "ssubscribe",
    "sunsubscribe",
    "xlen",
)
"""What the driver itself sends."""
SCRIPTED: Final = (
    "del", "exists", "get", "hdel", "hexists", "hget", "hincrby", "hkeys", "hlen", "hmget", "hrandfield", "hscan",
    "hset", "hvals", "llen", "lpush", "lrange", "ltrim", "rename", "rpush", "sadd", "scard", "set",
    "sismember", "smembers", "spublish", "srem", "time", "type", "unlink", "xadd", "xdel", "xinfo|stream", "xlen",
    "xrange", "xtrim", "zadd", "zcard", "zcount", "zrange", "zrem", "zscore",
)  # fmt: skip
"""What the scripts call."""
NEWER: Final = ("waitaof",)
"""Sent where the server has it: Redis from 7.2 on, and Valkey."""

COMMANDS: Final = tuple(sorted({*CONNECTING, *CALLED, *SCRIPTED}))


def rules(*, newer: bool) -> str:
    """Return the rights as ``ACL SETUSER`` and the configuration file take them; *newer* for servers with `NEWER`."""
    commands = sorted({*COMMANDS, *NEWER}) if newer else COMMANDS
    return " ".join(("resetkeys", *KEYS, "resetchannels", *CHANNELS, "-@all", *(f"+{name}" for name in commands)))


def line() -> str:
    """Return the command of README that makes such a user on any server, as a shell takes it."""
    quoted = (f"'{word}'" if set(word) & set(">~&|*") else word for word in rules(newer=False).split())
    words = f"redis-cli ACL SETUSER {USER} on '>password' {' '.join(quoted)}"
    parts = textwrap.wrap(words, width=126, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(parts)
