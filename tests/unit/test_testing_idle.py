"""`testing.idle`: it returns when everything is done, not before, not later, and it says what is left."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from brokerkit import (
    EVERY_REPLICA,
    Backlog,
    Batch,
    BrokerError,
    BrokerUnavailable,
    Closed,
    ConfigError,
    Message,
    Nack,
    Queue,
    RetryPolicy,
    Service,
    Start,
    Topic,
    connect,
)
from brokerkit.driver import Source
from brokerkit.testing import NotIdle, _idle, dead_letters, faults, handled, idle, run, running

ORDERS = Topic("orders", str)
EMAILS = Queue("emails", str)
LETTERS = Queue("letters", str)
QUOTES = Queue("quotes", str, reply=str)
SEEDS = range(20)


def now() -> float:
    return asyncio.get_running_loop().time()


def service(*handlers: tuple[Any, Callable[..., Any]], **options: Any) -> Service:
    made = Service("work")
    for address, handler in handlers:
        made.subscribe(address, **options)(handler)
    return made


class Driver:
    """A driver in front of the real one."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


async def accept(message: Message[str]) -> None:
    pass


def in_both_times(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run *main* in real time, and in virtual time with many seeds."""
    asyncio.run(main())
    for seed in (None, *SEEDS):
        run(main, seed=seed)


def test_with_nothing_to_do_it_returns_at_once() -> None:
    async def main() -> None:
        async with connect("memory://") as broker:
            await idle(broker)
        async with running(service((ORDERS, accept), (EMAILS, accept))) as broker:
            await idle(broker, timeout=0.001)

    in_both_times(main)


def test_it_returns_when_the_last_retry_has_ended_and_not_later() -> None:
    async def work(message: Message[str]) -> None:
        await asyncio.sleep(5)
        if message.attempt < 4:
            raise Nack(delay=10)

    async def main() -> None:
        async with running(service((ORDERS, work), (EMAILS, work))) as broker:
            await broker.publish(ORDERS, "a", key="k")
            await broker.publish(ORDERS, "b", key="k")
            await broker.publish(EMAILS, "c", delay=40)
            await idle(broker, timeout=200)
            assert now() == pytest.approx(2 * 50)
            assert [message.value for message in handled(broker, ORDERS)] == ["a", "b"]
            assert [message.value for message in handled(broker, EMAILS)] == ["c"]

    for seed in SEEDS:
        run(main, seed=seed)


def test_a_chain_of_messages_is_done_to_its_end() -> None:
    """The copy that a handler publishes is stored with its acknowledgement: there is no gap to return in."""

    async def forward(message: Message[str]) -> None:
        left = int(message.value)
        if left:
            if left % 3 == 0:
                await message.publish(ORDERS, str(left - 1))
            else:
                await message.publish(EMAILS if left % 3 == 1 else LETTERS, str(left - 1))

    async def main() -> None:
        async with running(service((ORDERS, forward), (EMAILS, forward), (LETTERS, forward))) as broker:
            for _ in range(3):
                await broker.publish(EMAILS, "30")
            await idle(broker)
            assert sum(len(handled(broker, address)) for address in (ORDERS, EMAILS, LETTERS)) == 3 * 31

    in_both_times(main)


def test_a_message_that_moves_while_idle_looks_is_not_missed() -> None:
    """On a slow system the backlogs are read one after another, and a message can hop behind the reader's back."""

    class Slow(Driver):
        async def backlog(self, source: Source) -> Backlog:
            found: Backlog = await self.real.backlog(source)
            await asyncio.sleep(0.01)
            return found

    done: list[str] = []

    async def forward(message: Message[str]) -> None:
        await asyncio.sleep(0.003)
        done.append(message.value)
        left = int(message.value)
        if left:
            other = LETTERS if message._item.record.address == EMAILS else EMAILS
            await message.publish(other, str(left - 1))

    async def main() -> None:
        done.clear()
        # Not inside of testing.running, which would know that a handler runs.
        async with connect("memory://") as broker, service((EMAILS, forward), (LETTERS, forward)).running(broker):
            broker._driver = Slow(broker._driver)
            await broker.publish(EMAILS, "99")
            await idle(broker)
            assert len(done) == 100

    for seed in SEEDS:
        run(main, seed=seed)


def test_what_another_process_has_in_hand_is_waited_for() -> None:
    async def slow(message: Message[str]) -> None:
        await asyncio.sleep(10)

    async def main() -> None:
        async with connect("memory://shared") as other, running(service((EMAILS, slow), (ORDERS, slow)), other):
            await other.publish(EMAILS, "a")
            await other.publish(ORDERS, "a")
            await asyncio.sleep(1)
            async with connect("memory://shared") as broker, running(service((EMAILS, slow), (ORDERS, slow)), broker):
                with pytest.raises(NotIdle, match="emails: 1 in flight"):
                    await idle(broker, timeout=3)
                await idle(broker)
                assert now() == 10.0
                assert handled(broker, EMAILS) == []

    run(main)


def test_a_plain_function_in_a_thread_is_waited_for() -> None:
    done: list[str] = []
    stop = threading.Event()

    def work(message: Message[str]) -> None:
        stop.wait(0.05)
        done.append(message.value)

    async def main() -> None:
        async with running(service((EMAILS, work), concurrency=2)) as broker:
            await broker.publish_many(EMAILS, ["a", "b", "c"])
            await idle(broker)
            assert sorted(done) == ["a", "b", "c"]

    asyncio.run(main())
    done.clear()
    run(main, seed=1)


def test_batches_are_waited_for() -> None:
    seen: list[int] = []

    async def work(messages: Sequence[Message[str]]) -> None:
        seen.append(len(messages))

    async def main() -> None:
        async with running(service((ORDERS, work), batch=Batch(10, wait=3))) as broker:
            await broker.publish_many(ORDERS, ["a"] * 13)
            await idle(broker)
            assert seen == [10, 3]
            assert now() == 3.0

    run(main)


def test_a_handler_that_goes_on_after_its_acknowledgement_is_waited_for() -> None:
    async def work(message: Message[str]) -> None:
        await message.ack(confirm=True)
        await asyncio.sleep(10)

    async def main() -> None:
        async with running(service((EMAILS, work))) as broker:
            await broker.publish(EMAILS, "a")
            with pytest.raises(NotIdle, match="its handler runs"):
                await idle(broker, timeout=5)
            await idle(broker)
            assert now() == 10.0

    run(main)


def test_what_every_replica_reads_is_waited_for() -> None:
    seen: Counter[str] = Counter()

    async def work(message: Message[str]) -> None:
        if int(message.value) % 3 == 0 and message.attempt == 1:
            raise ValueError("again")
        await asyncio.sleep(0.001)
        seen[message.value] += 1

    async def main() -> None:
        seen.clear()
        made = service((ORDERS, work), group=EVERY_REPLICA, retry=RetryPolicy(wait_initial=0.001))
        async with running(made) as broker:
            await broker.publish_many(ORDERS, [str(number) for number in range(20)])
            await idle(broker)
            assert len(seen) == 20

    in_both_times(main)


def test_what_a_handler_publishes_for_every_replica_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backlog tells of it in the turns between its storing and its delivery."""
    seen: list[str] = []

    async def slow(message: Message[str]) -> None:
        for _ in range(5 * _idle.TURNS):
            await asyncio.sleep(0)
        await message.publish(ORDERS, message.value)

    async def hear(message: Message[str]) -> None:
        seen.append(message.value)

    async def main() -> None:
        seen.clear()
        made = service((EMAILS, slow))
        made.subscribe(ORDERS, group=EVERY_REPLICA)(hear)
        async with running(made) as broker:
            await broker.publish(EMAILS, "a")
            await idle(broker)
            assert seen == ["a"]

    monkeypatch.setattr(_idle, "POLL", 0)  # look in each turn
    in_both_times(main)


def test_where_the_system_cannot_tell_what_is_in_hand_here_counts() -> None:
    class Silent(Driver):
        async def backlog(self, source: Source) -> Backlog:
            return Backlog()

    async def slow(message: Message[str]) -> None:
        await asyncio.sleep(10)

    async def main() -> None:
        async with connect("memory://") as broker, service((EMAILS, slow), (ORDERS, slow)).running(broker):
            broker._driver = Silent(broker._driver)
            await broker.publish(EMAILS, "a")
            await broker.publish(ORDERS, "a")
            await idle(broker)
            assert now() == 10.0

    run(main)


def test_a_request_is_waited_for_until_its_reply_is_here() -> None:
    async def quote(message: Message[str]) -> str:
        await asyncio.sleep(2)
        return message.value * 2

    async def main() -> None:
        async with running(service((QUOTES, quote))) as broker:
            asking = asyncio.create_task(broker.request(QUOTES, "a", timeout=10))
            await asyncio.sleep(1)
            await idle(broker)
            assert asking.done()
            assert asking.result() == "aa"
            lost = asyncio.create_task(broker.request(QUOTES, "b", timeout=10))
            await asyncio.sleep(1)
            faults(broker).disconnect()
            with pytest.raises(NotIdle, match="requests that wait for their reply: 1"):
                await idle(broker, timeout=5)
            faults(broker).reconnect()
            await asyncio.wait([lost])
            lost.exception()

    run(main)


def test_a_subscription_by_hand_counts_until_its_messages_are_settled() -> None:
    async def main() -> None:
        async with connect("memory://") as broker, broker.subscribe(EMAILS) as emails:
            await broker.publish(EMAILS, "a")
            with pytest.raises(NotIdle, match=r"emails: 1 in flight \(in a subscription by hand"):
                await idle(broker, timeout=1)
            [message] = await emails.receive()
            await message.ack()
            await idle(broker)
            async with broker.subscribe(ORDERS, start=Start.EARLIEST):  # owes nothing to anybody
                await broker.publish(ORDERS, "a")
                await idle(broker)

    run(main)


def test_queues_that_nobody_reads_here_do_not_count() -> None:
    async def notify(message: Message[str]) -> None:
        await message.publish(EMAILS, message.value)

    async def main() -> None:
        async with running(service((ORDERS, notify))) as broker:
            await broker.publish(ORDERS, "a")
            await idle(broker, timeout=1)
            assert (await broker.backlog(EMAILS)).waiting == 1

    in_both_times(main)


def test_redriven_letters_are_waited_for() -> None:
    async def work(message: Message[str]) -> None:
        if len(tried) < 2:
            tried.append(message.value)
            raise ValueError("not yet")
        await asyncio.sleep(0.001)

    tried: list[str] = []

    async def main() -> None:
        tried.clear()
        async with running(service((ORDERS, work), retry=RetryPolicy(attempts=1))) as broker:
            await broker.publish_many(ORDERS, ["a", "b"])
            await idle(broker)
            assert len(await dead_letters(broker, ORDERS, "work")) == 2
            await broker.redrive(ORDERS.dead_letters("work"))
            await idle(broker)
            assert len(handled(broker, ORDERS)) == 2

    in_both_times(main)


def test_not_idle_lists_what_is_left() -> None:
    async def work(message: Message[str]) -> None:
        await asyncio.sleep(100)

    async def main() -> None:
        async with running(service((ORDERS, work), (EMAILS, work), prefetch=2), drain=0) as broker:
            await broker.publish_many(EMAILS, ["a", "b", "c"])
            await broker.publish(EMAILS, "d", delay=300)
            await broker.publish(ORDERS, "e")
            with pytest.raises(NotIdle) as caught:
                await idle(broker, timeout=10)
            assert isinstance(caught.value, TimeoutError)
            assert isinstance(caught.value, BrokerError)
            assert now() == 10.0
            text = str(caught.value)
            assert text.startswith("not idle after 10 s; left to do:\n")
            assert "  emails: 1 waiting, 2 in flight, 1 delayed\n" in text
            assert "  orders (group work): 1 in flight\n" in text
            assert text.count("its handler runs") == 2

    run(main)


def test_a_broken_connection_is_not_idle() -> None:
    async def main() -> None:
        async with running(service((EMAILS, accept))) as broker:
            faults(broker).disconnect()
            with pytest.raises(NotIdle, match="emails: cannot be looked at: BrokerUnavailable"):
                await idle(broker, timeout=5)
            faults(broker).reconnect()
            await idle(broker)
            faults(broker).freeze()
            with pytest.raises(NotIdle, match="emails: cannot be looked at: no answer within 5 s"):
                await idle(broker, timeout=20)
            faults(broker).thaw()
            await idle(broker)

    run(main)


def test_outcomes_that_cannot_be_stored_yet_are_waited_for() -> None:
    async def main() -> None:
        async with running(service((EMAILS, accept))) as broker:
            faults(broker).fail_settles(BrokerUnavailable("gone"), 4)
            await broker.publish(EMAILS, "a")
            await idle(broker)
            assert (await broker.backlog(EMAILS)).in_flight == 0
            assert not faults(broker).settles

    for seed in SEEDS:
        run(main, seed=seed)


def test_a_timeout_that_comes_with_the_last_message_is_no_failure() -> None:
    async def work(message: Message[str]) -> None:
        await asyncio.sleep(10)

    async def main() -> None:
        async with running(service((EMAILS, work))) as broker:
            await broker.publish(EMAILS, "a")
            await idle(broker, timeout=10.0)

    for seed in SEEDS:
        run(main, seed=seed)


def test_a_broker_that_is_not_open_is_refused() -> None:
    async def main() -> None:
        broker = connect("memory://")
        with pytest.raises(Closed):
            await idle(broker)
        async with broker:
            with pytest.raises(ConfigError, match="timeout"):
                await idle(broker, timeout=-1)
        with pytest.raises(Closed):
            await idle(broker)

    run(main)
