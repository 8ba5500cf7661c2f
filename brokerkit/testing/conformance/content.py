"""CONTENT: what is published is what arrives, byte for byte, and what cannot be is refused before it is sent."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ... import clock
from ...address import AnyQueue, AnyTopic, Queue, Topic
from ...broker import Broker
from ...errors import BrokerError, ConfigError, DecodeError, EncodeError, TooLarge
from ...message import Message
from ...policy import MAX_BODY, MAX_HEADER_BYTES, MAX_HEADERS, MAX_ID, MAX_KEY
from ._harness import Harness, Kind
from ._raw import Raw
from ._runner import Suite, needs, seeds

WEIRD = [
    "/foo/bar",
    "../../etc/passwd",
    "back\\slash",
    'it\'s "quoted"',
    " spaces  everywhere ",
    "4 begins with a digit",
    "ünïcödé ☺ 日本語 🎉",
    "{braces} [brackets] (parens)",
    "a=b;c:d,e",
    "line\nbreak\r\nand\ttab",
    "".join(map(chr, range(1, 64))),
    "".join(map(chr, range(64, 128))),
]
"""Go Cloud's list: what breaks somebody's encoding."""


@dataclass
class Order:
    """A payload."""

    id: str
    total: float = 0.0
    lines: tuple[int, ...] = ()


async def one(
    system: Harness, broker: Broker, address: AnyTopic | AnyQueue, value: Any, **options: Any
) -> Message[Any]:
    """Publish *value* and return it as it arrives, acknowledged."""
    publish: Any = broker.publish
    async with system.subscribe(broker, address) as messages:
        await publish(address, value, **options)
        (message,) = await system.take(messages, 1)
        await message.ack()
        return message


class Content(Suite):
    async def test_every_byte_arrives(self, system: Harness, kind: Kind) -> None:
        """F1: a body is bytes, not text."""
        address = system.address(kind, type=bytes)
        async with system.connect() as broker:
            body = bytes(range(256)) * 5
            message = await one(system, broker, address, body)
            assert (message.value, message.body) == (body, body)

    async def test_an_empty_body_is_an_empty_body(self, system: Harness, kind: Kind) -> None:
        """F2: not None, and not lost."""
        address = system.address(kind, type=bytes)
        async with system.connect() as broker:
            message = await one(system, broker, address, b"")
            assert (message.value, message.body) == (b"", b"")

    async def test_none_is_published_where_the_type_admits_it(self, system: Harness, kind: Kind) -> None:
        """F2: and refused where it does not."""
        optional: Any = str | None
        address = system.address(kind, "optional", type=optional)
        async with system.connect() as broker:
            assert (await one(system, broker, address, None)).value is None
            assert (await one(system, broker, address, "text")).value == "text"
            with pytest.raises(EncodeError):
                await broker.publish(system.address(kind), None)

    @needs("topic")
    async def test_a_null_is_none_where_the_type_admits_it(self, system: Harness) -> None:
        """F2: others may write a null body: it is None, or it is dead-lettered; it is never an empty body."""
        optional: Any = str | None
        admits, refuses = system.topic("admits", optional), system.topic("refuses", str)
        async with system.connect() as broker:
            await broker.declare(admits, refuses)
            raw = Raw(system, broker)
            for topic in (admits, refuses):
                (result,) = await raw.publish([raw.record(system.native(broker, topic), "null", None)])
                assert not isinstance(result, BrokerError)
            async with broker.subscribe(admits, group="workers") as messages:
                (message,) = await system.take(messages, 1)
                assert message.value is None
                await message.ack()
            async with broker.subscribe(refuses, group="workers") as messages:
                await system.nothing(messages)
            (letter,) = await system.browse(broker, refuses.dead_letters("workers"))
            assert letter.id == "null"

    async def test_weird_texts_survive_as_names_and_values_of_headers(self, system: Harness, kind: Kind) -> None:
        """F3: whatever the backend's own syntax is."""
        address = system.address(kind)
        async with system.connect() as broker:
            headers = {f"{text}": f"value {text}" for text in WEIRD} | {"empty": ""}
            assert (await one(system, broker, address, "v", headers=headers)).headers == headers

    async def test_a_header_that_is_no_unicode_is_refused(self, system: Harness, kind: Kind) -> None:
        """F4: as name and as value, before anything is sent."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            bad: list[Any] = [
                {"a": "\ud800"},
                {"\udcff": "v"},
                {"a": b"bytes"},
                {1: "v"},
                {"": "v"},
                {"a": None},
                ["a"],
            ]
            for headers in bad:
                with pytest.raises(ConfigError):
                    await broker.publish(address, "v", headers=headers)
            await system.nothing(messages)

    async def test_headers_are_told_apart_by_case_and_keep_their_order(self, system: Harness, kind: Kind) -> None:
        """F5: names are case-sensitive."""
        address = system.address(kind)
        async with system.connect() as broker:
            headers = {"b": "1", "B": "2", "a": "3", "A": "4", "Content-Type": "5", "content-type": "6"}
            found = (await one(system, broker, address, "v", headers=headers)).headers
            assert list(found.items()) == list(headers.items())

    @needs("topic")
    async def test_of_a_header_that_comes_twice_the_last_counts(self, system: Harness) -> None:
        """F5: others may write duplicates, and values that are no text; they are readable all the same."""
        topic = system.topic(type=bytes)
        async with system.connect() as broker:
            await broker.declare(topic)
            raw = Raw(system, broker)
            headers = (("a", b"1"), ("a", b"2"), ("bin", b"\xff\xfe"))
            await raw.publish([raw.record(system.native(broker, topic), "m", headers=headers)])
            async with broker.subscribe(topic, group="workers") as messages:
                (message,) = await system.take(messages, 1)
                assert message.headers["a"] == "2"
                assert message.headers["bin"].encode("utf-8", "surrogateescape") == b"\xff\xfe"
                assert message.value == b"body"

    async def test_the_headers_of_brokerkit_are_not_for_users(self, system: Harness, kind: Kind) -> None:
        """F5: names that begin with bk- cannot be set, and are not shown."""
        address = system.address(kind, type=Order)
        async with system.connect() as broker:
            for name in ("bk-content-type", "bk-x", "BK-x", "Bk-inbox", "bk-dead-reason", "bk-"):
                with pytest.raises(ConfigError, match="bk-"):
                    await broker.publish(address, Order("o"), headers={name: "v"})
            assert (await one(system, broker, address, Order("o"), headers={"mine": "v"})).headers == {"mine": "v"}

    @seeds(1)
    async def test_a_body_at_its_limit_arrives_and_one_byte_more_is_refused(self, system: Harness, kind: Kind) -> None:
        """F6: TooLarge at once, nothing sent, and the connection lives."""
        address = system.address(kind, type=bytes)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            for size in (MAX_BODY - 1, MAX_BODY):
                body = random.Random(size).randbytes(size)
                await broker.publish(address, body)
                (message,) = await system.take(messages, 1)
                assert message.value == body
                await message.ack()
            with pytest.raises(TooLarge, match=str(MAX_BODY)):
                await broker.publish(address, b"x" * (MAX_BODY + 1))
            await system.nothing(messages)
            await broker.publish(address, b"alive")
            assert (await system.take(messages, 1))[0].value == b"alive"

    @seeds(1)
    async def test_a_message_at_all_its_limits_is_retried_and_dead_lettered(self, system: Harness, kind: Kind) -> None:
        """F6: what was accepted fits with brokerkit's own headers added, wherever it goes."""
        address = system.address(kind, type=bytes)
        headers = {f"h{n:02}": "x" * (MAX_HEADER_BYTES // MAX_HEADERS - 3) for n in range(MAX_HEADERS)}
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            options: dict[str, Any] = {"headers": headers, "id": "i" * MAX_ID}
            if kind == "topic":
                options["key"] = "k" * MAX_KEY
            publish: Any = broker.publish
            await publish(address, b"x" * MAX_BODY, **options)
            (message,) = await system.take(messages, 1)
            await message.nack()
            (message,) = await system.take(messages, 1)
            assert message.attempt == 2
            await message.reject("y" * 100_000)
            await system.nothing(messages)

            async def stored() -> bool:
                return bool(await system.browse(broker, system.letters(address)))

            await system.eventually(stored)
            (letter,) = await system.browse(broker, system.letters(address))
            assert letter.body == b"x" * MAX_BODY
            assert letter.headers == headers
            assert (letter.id, letter.key) == (options["id"], options.get("key"))

    async def test_limits_of_headers_id_and_key_are_checked_before_sending(self, system: Harness, kind: Kind) -> None:
        """F7: at the limit it arrives, beyond it is TooLarge."""
        address = system.address(kind)
        fits: list[dict[str, Any]] = [
            {"headers": {f"h{n}": "" for n in range(MAX_HEADERS)}},
            {"headers": {"h": "x" * (MAX_HEADER_BYTES - 1)}},
            {"id": "x" * MAX_ID},
        ]
        over: list[dict[str, Any]] = [
            {"headers": {f"h{n}": "" for n in range(MAX_HEADERS + 1)}},
            {"headers": {"h": "x" * MAX_HEADER_BYTES}},
            {"headers": {"h": "ü" * (MAX_HEADER_BYTES // 2)}},
            {"id": "x" * (MAX_ID + 1)},
        ]
        if kind == "topic":
            fits.append({"key": "x" * MAX_KEY})
            over += [{"key": "x" * (MAX_KEY + 1)}, {"key": b"x" * (MAX_KEY + 1)}]
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            publish: Any = broker.publish
            for options in fits:
                await publish(address, "v", **options)
            for options in over:
                with pytest.raises(TooLarge):
                    await publish(address, "v", **options)
            assert len(await system.drain(messages)) == len(fits)

    @needs("topic")
    async def test_keys_are_texts_or_bytes_or_nothing(self, system: Harness) -> None:
        """F8: None, empty and binary keys arrive as they were; None is not the empty key."""
        topic = system.topic()
        async with system.connect() as broker:
            for key, shown in ((None, None), ("", ""), ("ü", "ü"), (b"raw", "raw"), (b"\xff\x00", "\udcff\x00")):
                message = await one(system, broker, topic, "v", key=key)
                assert message.key == shown
                assert shown is None or message.key is not None
            publish: Any = broker.publish
            for bad in (1, 1.5, ["k"]):
                with pytest.raises(ConfigError):
                    await publish(topic, "v", key=bad)

    async def test_the_id_arrives_as_it_was_given(self, system: Harness, kind: Kind) -> None:
        """F9: any printable text; what is none is refused."""
        address = system.address(kind)
        async with system.connect() as broker:
            for id in ("1", "a b", "ü☺", "{x}*?[a]", "-" * 200, "urn:uuid:1", "'; DROP"):
                assert (await one(system, broker, address, "v", id=id)).id == id
            publish: Any = broker.publish
            for bad in ("", "new\nline", "nul\0", "\ud800", 5):
                with pytest.raises(ConfigError):
                    await publish(address, "v", id=bad)

    async def test_the_timestamp_is_the_publishers_in_utc(self, system: Harness, kind: Kind) -> None:
        """F9: to the millisecond, aware; retries and dead letters keep it."""
        address = system.address(kind)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            before = datetime.fromtimestamp(clock.current().time(), UTC)
            await broker.publish(address, "v")
            after = datetime.fromtimestamp(clock.current().time(), UTC)
            (message,) = await system.take(messages, 1)
            stamp = message.timestamp
            assert stamp.tzinfo is UTC
            slack = timedelta(milliseconds=2)
            assert before - slack <= stamp <= after + slack
            await system.settle_down()
            await message.nack()
            (again,) = await system.take(messages, 1)
            assert abs(again.timestamp - stamp) < slack
            await again.reject("no")
            await system.settle_down()
            (letter,) = await system.browse(broker, system.letters(address))
            assert abs(letter.timestamp - stamp) < slack

    async def test_a_value_that_is_not_of_the_addresss_type_is_not_sent(self, system: Harness, kind: Kind) -> None:
        """F10: EncodeError at the publisher, instead of a dead letter at the consumer."""
        address = system.address(kind, type=Order)
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            bad: list[Any] = ["text", {"id": "o"}, None, Order("o", float("nan")), Order("o", float("inf")), Message]
            for value in bad:
                with pytest.raises(EncodeError):
                    await broker.publish(address, value)
            await system.nothing(messages)

    async def test_what_cannot_be_read_goes_to_the_dead_letters_untouched(self, system: Harness, kind: Kind) -> None:
        """F10: with its bytes and the reason; the consumer lives."""
        address = system.address(kind, type=Order)
        bodies = [
            b"",
            b"not json",
            b"[]",
            b'{"id": 5}',
            b'{"id": "o", "total": NaN}',
            b'{"id": "o", "total": "much"}',
            b'{"id": "\xff"}',
            b"[" * 100_000,
            b'{"id": ' * 2000 + b"1" + b"}" * 2000,
        ]
        handled: list[str] = []

        async def handler(message: Message[Order]) -> None:
            handled.append(message.value.id)

        async with system.connect() as broker:
            await broker.declare(address)
            raw = Raw(system, broker)
            native = system.native(broker, address)
            await raw.publish([raw.record(native, f"bad{n}", body) for n, body in enumerate(bodies)])
            async with system.serve(broker, address, handler):
                await broker.publish(address, Order("good"))
                await system.eventually(lambda: handled == ["good"])

                async def all_dead() -> bool:
                    return len(await system.browse(broker, system.letters(address))) == len(bodies)

                await system.eventually(all_dead)
            letters = {letter.id: letter for letter in await system.browse(broker, system.letters(address))}
            assert {id: letter.body for id, letter in letters.items()} == {f"bad{n}": b for n, b in enumerate(bodies)}
            for letter in letters.values():
                assert letter.dead.error == "DecodeError"
                with pytest.raises(DecodeError):
                    _ = letter.value

    async def test_another_content_type_is_not_guessed_at(self, system: Harness, kind: Kind) -> None:
        """F10: a body of another codec is dead-lettered, naming both types."""
        address = system.address(kind, type=Order)
        async with system.connect() as broker:
            await broker.declare(address)
            raw = Raw(system, broker)
            headers = (("bk-content-type", b"application/x-unknown"),)
            record = raw.record(system.native(broker, address), "m", b'{"id": "o"}', headers=headers)
            await raw.publish([record])
            async with system.subscribe(broker, address) as messages:
                await system.nothing(messages)
            (letter,) = await system.browse(broker, system.letters(address))
            assert "application/x-unknown" in letter.dead.text
            assert "json" in letter.dead.text

    async def test_a_foreign_message_without_a_content_type_is_read(self, system: Harness, kind: Kind) -> None:
        """F10: by its address's codec; unknown fields are ignored, missing ones take their default."""
        address = system.address(kind, type=Order)
        async with system.connect() as broker:
            await broker.declare(address)
            raw = Raw(system, broker)
            body = b' {"id": "o", "unknown": {"deep": [1]}, "lines": [1, 2]} '
            await raw.publish([raw.record(system.native(broker, address), "m", body)])
            async with system.subscribe(broker, address) as messages:
                (message,) = await system.take(messages, 1)
                assert message.value == Order("o", 0.0, (1, 2))

    async def test_whatever_is_published_arrives_equal(self, system: Harness, kind: Kind) -> None:
        """F11: random bodies and headers, a hundred of them at once."""
        address = system.address(kind, type=bytes)
        draw = random.Random(system.now())

        def text() -> str:
            return "".join(chr(draw.choice([draw.randint(32, 126), draw.randint(0xA0, 0x2FFF)])) for _ in range(12))

        sent = {
            f"m{n}": (draw.randbytes(draw.randint(0, 2000)), {text(): text() for _ in range(draw.randint(0, 8))})
            for n in range(100)
        }
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            items: list[Any] = [address.outgoing(body, id=id, headers=h) for id, (body, h) in sent.items()]
            await broker.publish_many(address, items)
            found = {m.id: (m.value, dict(m.headers)) for m in await system.drain(messages)}
            assert found == sent

    async def test_trace_headers_pass_through(self, system: Harness, kind: Kind) -> None:
        """F12: traceparent and tracestate are the user's, and kept by retry and dead letter."""
        address = system.address(kind)
        headers = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "a=1,b=2"}
        async with system.connect() as broker, system.subscribe(broker, address) as messages:
            await broker.publish(address, "v", headers=headers)
            (message,) = await system.take(messages, 1)
            assert message.headers == headers
            await message.nack()
            (again,) = await system.take(messages, 1)
            assert again.headers == headers
            await again.reject("no")
            await system.settle_down()
            (letter,) = await system.browse(broker, system.letters(address))
            assert letter.headers == headers

    @needs("topic", "queue")
    async def test_each_address_has_the_type_it_was_declared_with(self, system: Harness) -> None:
        """F10: two types in one process do not mix, also with unions."""
        union: Any = Order | int
        numbers: Topic[int] = system.topic("numbers", int)
        either: Queue[Any] = system.queue("either", union)
        async with system.connect() as broker:
            publish: Any = broker.publish
            assert (await one(system, broker, numbers, 2**62)).value == 2**62
            assert (await one(system, broker, either, 7)).value == 7
            assert (await one(system, broker, either, Order("o", 1.5))).value == Order("o", 1.5)
            with pytest.raises(EncodeError):
                await publish(numbers, "7")
