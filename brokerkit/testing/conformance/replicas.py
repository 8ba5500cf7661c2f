"""EVERY_REPLICA: each process reads every message, from now on, and leaves nothing behind."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest

from ...errors import ConfigError, Nack, Reject
from ...events import DeadLettered, Dropped, Retried
from ...message import Message
from ...policy import EVERY_REPLICA, RetryPolicy, Start
from ...service import Service
from ._harness import Harness
from ._raw import Raw
from ._runner import Suite, needs


class Replicas(Suite):
    @needs("topic")
    async def test_every_replica_handles_every_message(self, system: Harness) -> None:
        """Three processes of one service: each message three times, once in each."""
        topic = system.topic()
        seen: list[Counter[str]] = [Counter(), Counter(), Counter()]

        def handler(number: int) -> Any:
            async def handle(message: Message[str]) -> None:
                seen[number][message.value] += 1

            return handle

        async with (
            system.connect() as a,
            system.connect() as b,
            system.connect() as c,
            system.connect() as publisher,
            system.serve(a, topic, handler(0), group=EVERY_REPLICA),
            system.serve(b, topic, handler(1), group=EVERY_REPLICA),
            system.serve(c, topic, handler(2), group=EVERY_REPLICA),
        ):
            await system.publish(publisher, topic, [f"v{n}" for n in range(20)])
            await system.eventually(lambda: all(len(counter) == 20 for counter in seen))
            await system.settle_down()
        assert all(set(counter.values()) == {1} for counter in seen)

    @needs("topic")
    async def test_a_replica_begins_with_what_comes(self, system: Harness) -> None:
        """The start is LATEST unless it says else; a restart begins anew, without memory."""
        topic = system.topic()
        seen: list[str] = []

        async def handler(message: Message[str]) -> None:
            seen.append(message.value)

        async with system.connect() as broker, system.connect() as publisher:
            await publisher.publish(topic, "history")
            for number in range(2):
                async with system.serve(broker, topic, handler, group=EVERY_REPLICA):
                    await publisher.publish(topic, f"live{number}")
                    await system.eventually(lambda: seen and seen[-1].startswith("live"))
                    await system.settle_down()
                await publisher.publish(topic, "missed")
            assert seen == ["live0", "live1"]
            async with system.serve(broker, topic, handler, group=EVERY_REPLICA, start=Start.EARLIEST):
                await system.eventually(lambda: len(seen) == 7)
        assert sorted(seen[2:]) == ["history", "live0", "live1", "missed", "missed"]

    @needs("topic")
    async def test_retries_run_in_place_and_at_last_the_message_is_dropped(self, system: Harness) -> None:
        """As often as the policy says, in this process alone; then an event and an ERROR, no dead letter."""
        topic = system.topic()
        runs: list[tuple[str, int]] = []
        others: list[str] = []

        async def handler(message: Message[str]) -> None:
            runs.append((message.value, message.attempt))
            if message.value == "bad":
                raise LookupError("no")
            if message.value == "nacked" and message.attempt == 1:
                raise Nack

        async def healthy(message: Message[str]) -> None:
            others.append(message.value)

        lines: list[str] = []

        class Lines(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                lines.append(f"{record.levelname} {record.getMessage()}")

        watch = Lines()
        logging.getLogger("brokerkit").addHandler(watch)
        policy = RetryPolicy(attempts=3, wait_initial=0.01)
        try:
            async with (
                system.connect() as broker,
                system.connect() as other,
                system.serve(broker, topic, handler, group=EVERY_REPLICA, retry=policy),
                system.serve(other, topic, healthy, group=EVERY_REPLICA),
            ):
                await system.publish(broker, topic, ["bad", "nacked", "good"])
                await system.eventually(lambda: system.seen(Dropped) and ("nacked", 2) in runs)
                await system.settle_down()
        finally:
            logging.getLogger("brokerkit").removeHandler(watch)
        assert [run for run in runs if run[0] == "bad"] == [("bad", 1), ("bad", 2), ("bad", 3)]
        assert [run for run in runs if run[0] == "nacked"] == [("nacked", 1), ("nacked", 2)]
        (dropped,) = system.seen(Dropped)
        assert (dropped.id, dropped.attempt) == ("bad", 3)
        assert not system.seen(DeadLettered)
        assert len(system.seen(Retried)) == 3
        assert sorted(others) == ["bad", "good", "nacked"]
        assert any(line.startswith("ERROR") and "bad" in line for line in lines)

    @needs("topic")
    async def test_a_rejected_message_is_dropped_at_once(self, system: Harness) -> None:
        """With an event that has the reason; the others go on."""
        topic = system.topic()
        handled: list[str] = []

        async def handler(message: Message[str]) -> None:
            if message.value == "bad":
                raise Reject("no good")
            handled.append(message.value)

        async with system.connect() as broker, system.serve(broker, topic, handler, group=EVERY_REPLICA):
            await system.publish(broker, topic, ["bad", "good"])
            await system.eventually(lambda: handled == ["good"] and system.seen(Dropped))
        (dropped,) = system.seen(Dropped)
        assert (dropped.id, dropped.attempt, dropped.reason) == ("bad", 1, "no good")

    @needs("topic")
    async def test_a_retry_holds_its_key_and_nothing_else(self, system: Harness) -> None:
        """Order per key holds in a replica as it does in a group."""
        topic = system.topic()
        done: list[str] = []

        async def handler(message: Message[str]) -> None:
            if message.value == "a1" and message.attempt == 1:
                raise LookupError
            done.append(message.value)

        policy = RetryPolicy(attempts=2, wait_initial=system.quiet / 2, wait_jitter=0)
        options: dict[str, Any] = {"group": EVERY_REPLICA, "retry": policy, "concurrency": 4}
        async with system.connect() as broker, system.serve(broker, topic, handler, **options):
            for value in ("a1", "a2", "b1", "b2"):
                await broker.publish(topic, value, key=value[0])
            await system.eventually(lambda: len(done) == 4)
        assert [value for value in done if value[0] == "a"] == ["a1", "a2"]
        assert done.index("b2") < done.index("a1")

    @needs("topic")
    async def test_what_cannot_be_read_is_dropped_with_an_event(self, system: Harness) -> None:
        """The replica lives; there are no dead letters for those."""
        topic = system.topic(type=int)
        handled: list[int] = []

        async def handler(message: Message[int]) -> None:
            handled.append(message.value)

        async with system.connect() as broker, system.serve(broker, topic, handler, group=EVERY_REPLICA):
            raw = Raw(system, broker)
            await raw.publish([raw.record(system.native(broker, topic), "bad", b"no number")])
            await broker.publish(topic, 5)
            await system.eventually(lambda: handled == [5])
            await system.eventually(lambda: system.seen(Dropped))
        assert [event.id for event in system.seen(Dropped)] == ["bad"]

    @needs("topic")
    async def test_staging_is_refused_where_nothing_is_settled(self, system: Harness) -> None:
        """message.publish on an ephemeral message is ConfigError: there is no acknowledgement to go with."""
        topic, other = system.topic(), system.topic("other")
        raised: list[BaseException] = []

        async def handler(message: Message[str]) -> None:
            try:
                await message.publish(other, "more")
            except ConfigError as error:
                raised.append(error)

        async with system.connect() as broker, system.serve(broker, topic, handler, group=EVERY_REPLICA):
            await broker.publish(topic, "v")
            await system.settle_down()
        assert len(raised) == 1

    @needs("topic")
    async def test_an_ephemeral_reader_may_acknowledge_and_nothing_else(self, system: Harness) -> None:
        """ack is optional; nack and reject raise: it owns nothing."""
        topic = system.topic()
        async with system.connect() as broker, broker.subscribe(topic) as messages:
            await system.publish(broker, topic, ["a", "b", "c", "d"])
            taken = await system.take(messages, 4)
            await taken[0].ack()
            await taken[0].ack(confirm=True)
            with pytest.raises(ConfigError):
                await taken[1].nack()
            with pytest.raises(ConfigError):
                await taken[2].reject("no")
            with pytest.raises(ConfigError):
                await taken[3].publish(topic, "more")
            await system.nothing(messages)

    @needs("topic")
    async def test_a_group_and_its_replicas_do_not_disturb_each_other(self, system: Harness) -> None:
        """One service with both: the group shares, the replicas each get all."""
        topic = system.topic()
        shared: Counter[str] = Counter()
        each: Counter[str] = Counter()

        def make() -> Service[None]:
            service: Service[None] = Service("workers")

            @service.subscribe(topic)
            async def share(message: Message[str]) -> None:
                shared[message.value] += 1

            @service.subscribe(topic, group=EVERY_REPLICA)
            async def replicate(message: Message[str]) -> None:
                each[message.value] += 1

            return service

        async with system.connect() as one, system.connect() as two, make().running(one), make().running(two):
            await system.publish(one, topic, [f"v{n}" for n in range(20)])
            await system.eventually(lambda: len(shared) == 20 and sum(each.values()) == 40)
            await system.settle_down()
        assert set(shared.values()) == {1}
        assert set(each.values()) == {2}
