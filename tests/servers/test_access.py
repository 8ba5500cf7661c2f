"""The rights that README documents are those that the driver needs: nothing is missing, and nothing is more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from . import FLAVORS, Flavor, RedisServer, access

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "brokerkit" / "drivers" / "redis"
LITERAL = re.compile(r"""b?(["'])([A-Z]+)\1""")
CONTAINERS = {"CLIENT", "CONFIG", "SCRIPT", "XINFO"}
each = pytest.mark.parametrize("flavor", FLAVORS)


def commands(files: Iterator[Path], known: set[str]) -> set[str]:
    """Return the commands that are named in *files*: texts in capitals that *known* has."""
    found: set[str] = set()
    for path in files:
        container = ""
        for _, word in LITERAL.findall(path.read_text(encoding="utf-8")):
            name = f"{container}|{word}".lower()
            if container and name in known:
                found.add(name)
            elif word not in CONTAINERS and word.lower() in known:
                found.add(word.lower())
            container = word if word in CONTAINERS else ""
    return found


def known(server: RedisServer) -> set[str]:
    names = {name.decode() for name in server.command_now("COMMAND", "LIST")}
    for container in CONTAINERS:
        (told,) = server.command_now("COMMAND", "INFO", container)
        names |= {sub[0].decode() for sub in told[9]}
    return names


def test_the_scripts_call_what_is_allowed_and_nothing_more() -> None:
    with RedisServer("valkey") as server:
        assert sorted(commands(DRIVER.glob("lua/*.lua"), known(server))) == sorted(access.SCRIPTED)


def test_the_driver_sends_what_is_allowed_and_nothing_more() -> None:
    with RedisServer("valkey") as server:
        texts = (path for path in DRIVER.glob("*.py") if path.name != "_errors.py")  # there they are errors
        sent = commands(texts, known(server))
        assert sorted(sent) == sorted({*access.CALLED, *access.NEWER, "ping"})


def test_the_lists_are_in_order() -> None:
    for names in (access.CONNECTING, access.CALLED, access.SCRIPTED, access.NEWER):
        assert list(names) == sorted(set(names))


@each
def test_the_user_of_the_tests_may_do_that_and_nothing_else(flavor: Flavor) -> None:
    with RedisServer(flavor) as server, redis.Redis.from_url(server.url()) as client:
        assert client.ping()
        assert client.get("bk:{any}") is None
        refused: list[list[str]] = [["KEYS", "*"], ["FLUSHALL"], ["CONFIG", "SET", "maxmemory", "1"], ["GET", "other"]]
        for command in refused:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)


@each
def test_readme_shows_the_line_that_the_tests_run_with(flavor: Flavor) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{access.line()}\n" in text, f"README has to show\n{access.line()}"
    words = [word.strip("'") for word in access.line().replace("\\\n", " ").split()[4:]]
    for name in access.NEWER:
        assert f"`+{name}`" in text
    with RedisServer(flavor) as server:
        server.command_now("ACL", "SETUSER", "another", *words)
        assert server.command_now("ACL", "DRYRUN", "another", "GET", "bk:{any}") == b"OK"
        assert server.command_now("ACL", "DRYRUN", "another", "GET", "other") != b"OK"
