"""REQUEST and REPLY: an answer reaches who asked, in time, or the asker is told."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from ...address import Queue, Reply
from ...errors import Closed, ConfigError, DecodeError, RemoteError, RequestTimeout, TooLarge
from ...events import DeadLettered, Retried
from ...message import Message
from ...policy import RetryPolicy
from ._harness import Harness
from ._raw import Raw
from ._runner import Suite, needs


@dataclass
class Quote:
    """An answer."""

    total: float


class UpperCase:
    """A codec of its own."""

    content_type = "text/x-upper"

    def encode(self, value: str, /) -> bytes:
        """Return the body."""
        return value.upper().encode()

    def decode(self, body: bytes, headers: Any, /) -> str:
        """Return the value."""
        return body.decode()


def quotes(system: Harness, **options: Any) -> Queue[str, Reply[str]]:
    """Return a queue that answers."""
    return Queue("quotes", str, reply=str, lease=system.lease, **options)


async def echo(message: Message[str]) -> str:
    """Answer with the question."""
    return f"re: {message.value}"


class Requesting(Suite):
    @needs("queue", "topic")
    async def test_the_return_value_is_the_answer(self, system: Harness) -> None:
        """From another process, in the reply's own type."""
        queue = Queue("quotes", float, reply=Quote, lease=system.lease)

        async def quote(message: Message[float]) -> Quote:
            return Quote(message.value * 1.2)

        async with system.connect() as server, system.connect() as client, system.serve(server, queue, quote):
            answer = await client.request(queue, 10.0, timeout=system.deadline)
            assert answer == Quote(12.0)

    @needs("queue", "topic")
    async def test_many_requests_at_once_each_get_their_own_answer(self, system: Harness) -> None:
        """From three processes, in whatever order they are answered."""
        queue = quotes(system)

        async def slow(message: Message[str]) -> str:
            await asyncio.sleep(int(message.value[1:]) % 7 * 0.001)
            return f"re: {message.value}"

        async with (
            system.connect() as server,
            system.connect() as one,
            system.connect() as two,
            system.serve(server, queue, slow, concurrency=10),
        ):
            questions = [((server, one, two)[n % 3], f"q{n}") for n in range(90)]
            answers = await asyncio.gather(*(c.request(queue, q, timeout=system.deadline) for c, q in questions))
        assert answers == [f"re: {question}" for _, question in questions]

    @needs("queue", "topic")
    async def test_nobody_answering_is_request_timeout(self, system: Harness) -> None:
        """At the timeout, not before; whether nobody is there or nobody is done."""
        queue = quotes(system)

        async def never(message: Message[str]) -> str:
            await asyncio.sleep(system.deadline)
            return ""

        async with system.connect() as broker:
            await broker.declare(queue)
            for serving in (False, True):
                began = system.now()
                with pytest.raises(RequestTimeout):
                    if serving:
                        async with system.serve(broker, queue, never, drain=0):
                            await broker.request(queue, "q", timeout=3 * system.quiet)
                    else:
                        await broker.request(queue, "q", timeout=3 * system.quiet)
                assert 3 * system.quiet <= system.now() - began < 4 * system.quiet + 5

    @needs("queue.ttl", "topic")
    async def test_an_expired_request_is_dropped_unhandled(self, system: Harness) -> None:
        """Nobody works on what nobody waits for, and it is no dead letter."""
        queue = quotes(system)
        handled: list[str] = []

        async def handler(message: Message[str]) -> str:
            handled.append(message.value)
            return "late"

        async with system.connect() as broker:
            await broker.declare(queue)
            with pytest.raises(RequestTimeout):
                await broker.request(queue, "old", timeout=3 * system.quiet)
            await asyncio.sleep(0.1 * system.quiet)
            async with system.serve(broker, queue, handler):
                assert await broker.request(queue, "new", timeout=system.deadline) == "late"
                await system.settle_down()
            assert handled == ["new"]
            assert await system.browse(broker, queue.dead_letters) == []

    @needs("queue", "topic")
    async def test_a_final_failure_is_remote_error(self, system: Harness) -> None:
        """With the class and the redacted text, after the last attempt and not before; and a dead letter."""
        queue = quotes(system)
        attempts: list[int] = []

        async def fail(message: Message[str]) -> str:
            attempts.append(message.attempt)
            if message.value == "recovers" and message.attempt == 2:
                return "at last"
            raise LookupError("no quote at redis://user:canary-password@host/0")

        policy = RetryPolicy(attempts=2, wait_initial=0.01)
        async with system.connect() as broker, system.serve(broker, queue, fail, retry=policy):
            with pytest.raises(RemoteError) as caught:
                await broker.request(queue, "q", timeout=system.deadline)
            assert attempts == [1, 2]
            assert caught.value.error == "LookupError"
            assert "no quote" in str(caught.value)
            assert "canary-password" not in str(caught.value)

            async def buried() -> bool:  # by the time of the answer, where both are stored at once
                return [letter.value for letter in await system.browse(broker, queue.dead_letters)] == ["q"]

            await system.eventually(buried)
            assert await broker.request(queue, "recovers", timeout=system.deadline) == "at last"

    @needs("queue", "topic")
    async def test_a_request_that_cannot_be_read_is_answered_with_an_error(self, system: Harness) -> None:
        """An undecodable request is dead-lettered, and its asker does not wait for the timeout."""
        asked: Queue[Any, Reply[str]] = Queue("quotes", str, reply=str, lease=system.lease)
        served: Queue[Any, Reply[str]] = Queue("quotes", int, reply=str, lease=system.lease)

        async def handler(message: Message[int]) -> str:
            return str(message.value)

        async with system.connect() as server, system.connect() as client, system.serve(server, served, handler):
            with pytest.raises(RemoteError) as caught:
                await client.request(asked, "no number", timeout=system.deadline)
            assert caught.value.error == "DecodeError"
            assert system.seen(DeadLettered)

    @needs("queue", "topic")
    async def test_an_answer_of_another_type_fails_the_handler(self, system: Harness) -> None:
        """What is not of the reply's type is not sent; another attempt would return the same, so it is RemoteError at once."""
        queue = quotes(system)

        async def wrong(message: Message[str]) -> Any:
            return 5

        async with system.connect() as broker:
            async with system.serve(broker, queue, wrong):
                with pytest.raises(RemoteError) as caught:
                    await broker.request(queue, "q", timeout=system.deadline)
            assert caught.value.error == "EncodeError"
            assert not system.seen(Retried)

    @needs("queue", "topic")
    async def test_an_answer_of_another_codec_is_decode_error(self, system: Harness) -> None:
        """The asker expects one content type and gets another: it is told, it does not guess."""
        theirs: Queue[str, Reply[Any]] = Queue(
            "quotes",
            str,
            reply=str,
            lease=system.lease,
            reply_codec=UpperCase(),
        )
        async with system.connect() as server, system.connect() as client, system.serve(server, theirs, echo):
            with pytest.raises(DecodeError, match="x-upper"):
                await client.request(quotes(system), "q", timeout=system.deadline)
            assert await server.request(theirs, "q", timeout=system.deadline) == "RE: Q"

    @needs("queue", "topic")
    async def test_an_answer_that_is_too_large_is_remote_error(self, system: Harness) -> None:
        """It is not stored, and the asker does not wait for the timeout."""
        queue: Queue[int, Reply[bytes]] = Queue("quotes", int, reply=bytes, lease=system.lease)

        async def large(message: Message[int]) -> bytes:
            return b"x" * message.value

        async with system.connect() as broker:
            async with system.serve(broker, queue, large, retry=RetryPolicy(attempts=1)):
                answer = await broker.request(queue, 1024 * 1024, timeout=system.deadline)
                assert len(answer) == 1024 * 1024
                with pytest.raises(RemoteError) as caught:
                    await broker.request(queue, 1024 * 1024 + 1, timeout=system.deadline)
            assert caught.value.error == TooLarge.__name__

    @needs("queue", "topic")
    async def test_a_request_carries_its_headers(self, system: Harness) -> None:
        """The user's; what brokerkit adds is not shown."""
        queue = quotes(system)
        seen: list[dict[str, str]] = []

        async def handler(message: Message[str]) -> str:
            seen.append(dict(message.headers))
            return ""

        async with system.connect() as broker, system.serve(broker, queue, handler):
            await broker.request(queue, "q", timeout=system.deadline, headers={"traceparent": "00-1-2-01"})
        assert seen == [{"traceparent": "00-1-2-01"}]

    @needs("queue", "topic")
    async def test_a_message_published_to_a_queue_that_replies_is_handled_without_an_answer(
        self, system: Harness
    ) -> None:
        """Nobody asked: the return value goes nowhere."""
        queue = quotes(system)
        handled: list[str] = []

        async def handler(message: Message[str]) -> str:
            handled.append(message.value)
            return "to nobody"

        async with system.connect() as broker, system.serve(broker, queue, handler):
            await broker.publish(queue, "v")
            await system.eventually(lambda: handled == ["v"])
            await system.settle_down()
            assert not system.seen(DeadLettered)

    @needs("queue", "topic")
    async def test_what_comes_from_the_network_chooses_no_address(self, system: Harness) -> None:
        """A forged inbox is answered into the void or to nobody; it opens no queue and stops nobody."""
        queue = quotes(system)
        handled: list[str] = []

        async def handler(message: Message[str]) -> str:
            handled.append(message.value)
            return "secret"

        async with system.connect() as broker, system.serve(broker, queue, handler):
            raw = Raw(system, broker)
            native = system.native(broker, queue)
            for number, inbox in enumerate((b"emails", b"../x", b"\xff" * 64, b"x" * 10_000, b"")):
                headers = (("bk-inbox", inbox), ("bk-correlation", b"1"))
                await raw.publish([raw.record(native, f"m{number}", b'"q"', headers=headers)])
            await system.eventually(lambda: len(handled) == 5)
            assert await raw.driver.describe(system.native(broker, system.queue("emails"))) is None
            assert await broker.request(queue, "q", timeout=system.deadline) == "secret"

    @needs("queue", "topic")
    async def test_an_answer_arrives_across_an_outage_of_the_server(self, system: Harness) -> None:
        """The replier loses the system while it works: its answer is stored when it is back."""
        queue = quotes(system)
        working, mended = asyncio.Event(), asyncio.Event()

        async def handler(message: Message[str]) -> str:
            working.set()
            await mended.wait()
            return "here"

        async with system.connect() as server, system.connect() as client, system.serve(server, queue, handler):
            asking = asyncio.ensure_future(client.request(queue, "q", timeout=system.deadline))
            await working.wait()
            await system.disconnect(server)
            mended.set()
            await system.settle_down()
            await system.reconnect(server)
            assert await asking == "here"

    @needs("queue", "topic")
    async def test_closing_the_broker_ends_its_requests(self, system: Harness) -> None:
        """Closed, at once."""
        queue = quotes(system)
        broker = system.connect()
        await broker.__aenter__()
        asking = asyncio.ensure_future(broker.request(queue, "q", timeout=system.deadline))
        await system.settle_down()
        began = system.now()
        await broker.__aexit__(None, None, None)
        with pytest.raises(Closed):
            await asking
        assert system.now() - began < system.deadline / 2

    @needs("queue", "topic")
    async def test_closing_the_broker_while_its_first_request_begins(self, system: Harness) -> None:
        """The same at whatever point it is: nothing of it goes on."""
        queue = quotes(system)
        for turns in (1, 3, 10, 30, 100):
            broker = system.connect()
            await broker.__aenter__()
            asking = asyncio.ensure_future(broker.request(queue, "q", timeout=system.deadline))
            for _ in range(turns):
                await asyncio.sleep(0)
            await broker.__aexit__(None, None, None)
            with pytest.raises(Closed):
                await asking

    @needs("queue", "topic")
    async def test_requests_need_a_queue_that_replies(self, system: Harness) -> None:
        """Anything else is ConfigError, and nothing is published."""
        async with system.connect() as broker:
            request: Any = broker.request
            for address in (system.queue(), system.topic()):
                with pytest.raises(ConfigError):
                    await request(address, "q", timeout=system.deadline)
            for timeout in (0, -1, float("nan"), None):
                with pytest.raises((ConfigError, TypeError)):
                    await request(quotes(system), "q", timeout=timeout)

    @needs("queue", "topic")
    async def test_a_request_may_be_answered_by_hand(self, system: Harness) -> None:
        """A reader by hand of such a queue acknowledges without an answer, and rejects with an error."""
        queue = quotes(system)
        async with system.connect() as server, system.connect() as client, server.subscribe(queue) as messages:
            asking = asyncio.ensure_future(client.request(queue, "q", timeout=system.deadline))
            (message,) = await system.take(messages, 1)
            await message.reject("not today")
            with pytest.raises(RemoteError, match="not today"):
                await asking

    @needs("queue", "topic")
    async def test_a_broker_that_creates_nothing_asks_and_answers(self, system: Harness) -> None:
        """declare="check" and "never": the queue must be there, what carries replies takes care of itself."""
        queue: Queue[Any, Any] = Queue("quotes", str, reply=str)

        async def handler(message: Message[str]) -> str:
            return message.value.upper()

        async with system.connect() as broker:
            await broker.declare(queue)
        for declare in ("check", "never"):
            async with system.connect(declare=declare) as broker, system.serve(broker, queue, handler):
                assert await broker.request(queue, declare, timeout=system.deadline) == declare.upper()
