"""NAMES: the same names are allowed everywhere, and each is a thing of its own."""

from __future__ import annotations

import pytest

from ...address import MAX_NAME, Queue, Topic
from ...errors import ConfigError, InvalidName
from ...message import Message
from ...service import Service
from ._harness import Harness, Kind
from ._runner import Suite, needs

GOOD = [
    "a",
    "A",
    "0",
    "_",
    "-",
    "a.b",
    "a_b",
    "a-b",
    "A.B",
    "x" * MAX_NAME,
    "bk.x",
    "bkx",
    "__x",
    "con",
    "nul",
    "a.b.c.d",
]
BAD = [
    "",
    ".",
    "..",
    "a..b",
    ".a",
    "a.",
    "bk",
    "x" * (MAX_NAME + 1),
    "a b",
    "a/b",
    "a\\b",
    "a\n",
    "a\0b",
    "a*",
    "a?",
    "[a]",
    "{a}",
    "a:b",
    "a'b",
    'a"b',
    "a;b",
    "ä",
    "a\u200b",
    "%41",
    "a|b",
    "$(id)",
    "KEYS[1]",
]


class Naming(Suite):
    async def test_every_allowed_name_is_an_address_of_its_own(self, system: Harness, kind: Kind) -> None:
        """V1, V2: also those that differ in case, or in a dot for an underscore; at full length too."""
        names = [name for name in GOOD if system.dots or "_" not in name or name.replace("_", ".") not in GOOD]
        async with system.connect() as broker:
            for name in names:
                await system.publish(broker, system.address(kind, name), [f"for {name}"])
            for name in names:
                async with system.subscribe(broker, system.address(kind, name)) as messages:
                    assert [m.value for m in await system.drain(messages)] == [f"for {name}"]

    async def test_asking_whether_an_address_exists_creates_nothing(self, system: Harness, kind: Kind) -> None:
        """V1: it does from its first use on, until it is deleted."""
        address = system.address(kind)
        async with system.connect() as broker, system.connect() as other:
            assert not await other.exists(address)
            assert not await other.exists(address)
            await system.publish(broker, address, ["v"])
            assert await other.exists(address)
            await broker.delete(address)
            assert not await other.exists(address)

    async def test_every_other_name_is_refused_before_any_io(self, system: Harness, kind: Kind) -> None:
        """V1, V3: by the address itself, without a broker."""
        make = Topic if kind == "topic" else Queue
        for name in BAD:
            with pytest.raises(InvalidName):
                make(name, str)

    @needs("topic")
    async def test_names_of_groups_follow_the_same_rule(self, system: Harness) -> None:
        """V4: each allowed one is a group of its own, the others are refused before any I/O."""
        topic = system.topic()
        async with system.connect() as broker:
            await broker.publish(topic, "v")
            for name in GOOD:
                async with broker.subscribe(topic, group=name) as messages:
                    assert len(await system.drain(messages)) == 1, name
            for name in BAD:
                with pytest.raises(InvalidName):
                    topic.dead_letters(name)
                with pytest.raises(InvalidName):
                    Service(name)
                with pytest.raises(InvalidName):
                    async with broker.subscribe(topic, group=name):
                        pass
                with pytest.raises(InvalidName):
                    await broker.backlog(topic, name)

    async def test_the_longest_names_have_dead_letters_too(self, system: Harness, kind: Kind) -> None:
        """V1: there is room for what is derived from a name, whatever the backend's own limit is."""
        address = system.address(kind, "n" * MAX_NAME)
        group = "g" * MAX_NAME

        async def handler(message: Message[str]) -> None:
            handled.append(message.value)
            if len(handled) == 1:
                await message.reject("no")

        handled: list[str] = []
        async with system.connect() as broker, system.serve(broker, address, handler, name=group):
            await system.publish(broker, address, ["v"])

            async def dead() -> bool:
                return bool(await system.browse(broker, system.letters(address, group)))

            await system.eventually(dead)
            await broker.redrive(system.letters(address, group))
            await system.eventually(lambda: len(handled) == 2)

    @needs("topic", "queue")
    async def test_one_name_with_two_meanings_is_refused(self, system: Harness) -> None:
        """V1: another kind, type or setting under a name that the broker knows: ConfigError naming both."""
        async with system.connect() as broker:
            await broker.publish(Topic("name", str, partitions=4), "v")
            others: list[Topic[int] | Topic[str] | Queue[str]] = [
                Topic("name", int, partitions=4),
                Topic("name", str, partitions=5),
                Queue("name", str),
            ]
            for other in others:
                with pytest.raises(ConfigError, match="name"):
                    await broker.declare(other)
            await broker.publish(Topic("name", str, partitions=4), "v")

    async def test_a_prefix_keeps_programs_apart(self, system: Harness, kind: Kind) -> None:
        """?prefix=: it goes before every owned address and group; programs with different ones do not meet."""
        address = system.address(kind)
        async with (
            system.connect(options={"prefix": "one."}) as one,
            system.connect(options={"prefix": "two."}) as two,
        ):
            await system.publish(one, address, ["for one"])
            await system.publish(two, address, ["for two"])
            for broker, expected in ((one, "for one"), (two, "for two")):
                async with system.subscribe(broker, address) as messages:
                    assert [m.value for m in await system.drain(messages)] == [expected]
                assert address.name in repr(address)

    async def test_a_bad_prefix_is_refused(self, system: Harness) -> None:
        """?prefix=: it follows the rules for names, behind which others must still fit."""
        for prefix in ("..", ".x", "a b", "ü", "x" * 21, "{x}", "a/"):
            with pytest.raises(InvalidName):
                system.connect(options={"prefix": prefix})
