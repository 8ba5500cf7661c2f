"""Where messages of Celery go, from any process to any other."""

from __future__ import annotations

import asyncio
import gc
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from brokerkit import Service
from brokerkit.celery import _mailboxes
from brokerkit.celery._envelope import Envelope, seal
from brokerkit.celery._follower import Follower
from brokerkit.celery._names import service_queue
from brokerkit.message import Message
from tests.servers import shared

from .channels import (
    Channel,
    Place,
    Process,
    body_of,
    eventually,
    eventually_table,
    message,
    placed,
    plain,
    taken,
    task,
)

pytestmark = pytest.mark.asyncio
REPLY = {"durable": False, "auto_delete": True, "arguments": {"x-expires": 10_000}}


async def mailbox(process: Process, queue: str, exchange: str, key: str, type: str = "direct") -> Channel:
    """Declare a transient queue, as the clients of the remote control do, and consume it."""
    channel = await process.channel()
    await process.exchanges.declare(queue, channel.intake, **REPLY)  # type: ignore[arg-type]
    await process.exchanges.bind(queue, exchange, type, key)
    await channel.intake.consume(queue, no_ack=True)
    return channel


async def test_a_task_for_a_queue_that_nobody_has_declared_is_kept(place: Place) -> None:
    async with place.process() as producer:
        await producer.put("celery", "a", "b")
    async with place.process() as worker:
        assert await taken(await worker.channel("celery"), 2) == ["a", "b"]


async def test_bindings_route_what_other_processes_publish(place: Place) -> None:
    async with place.process() as worker, place.process() as producer:
        await worker.exchanges.declare("mail", worker)
        await worker.exchanges.declare("all", worker)
        await worker.exchanges.bind("mail", "tasks", "topic", "mail.*")
        await worker.exchanges.bind("all", "tasks", "topic", "#")
        for key in ("mail.send", "video.cut", "mail.send.now"):
            await producer.exchanges.publish(plain(key, "tasks", key, "topic"))
        assert sorted(await taken(await worker.channel("mail"), 1)) == ["mail.send"]
        everything = await worker.channel("all")
        assert sorted(await taken(everything, 3)) == ["mail.send", "mail.send.now", "video.cut"]
        # A process that follows the bindings sees those that come later, and those that go.
        await worker.exchanges.declare("late", worker)
        await worker.exchanges.bind("late", "tasks", "topic", "video.*")
        await worker.exchanges.unbind("all", "tasks", "#")
        tables = producer.exchanges
        await eventually_table(tables, "tasks", {"mail.*": "mail", "video.*": "late"})
        await producer.exchanges.publish(plain("again", "tasks", "video.cut", "topic"))
        assert await taken(await worker.channel("late"), 1) == ["again"]
        await everything.nothing()
    async with place.process() as later:
        await eventually_table(later.exchanges, "tasks", {"mail.*": "mail", "video.*": "late"})


async def test_a_fanout_exchange_gives_to_every_queue_that_is_bound(place: Place) -> None:
    async with place.process() as process:
        for queue in ("one", "two"):
            await process.exchanges.declare(queue, process)
            await process.exchanges.bind(queue, "news", "fanout", "")
        box = await mailbox(process, "own", "news", "", "fanout")
        await process.exchanges.publish(plain("to all", "news", "any", "fanout"))
        for queue in ("one", "two"):
            assert await taken(await process.channel(queue), 1) == ["to all"]
        assert await taken(box, 1) == ["to all"]


async def test_what_is_published_after_declaring_is_not_missed_by_any_of_twenty_mailboxes(place: Place) -> None:
    """The barrier: `bind` returns when the reader stands, in whichever process."""
    async with place.process() as clients, place.process() as workers, place.process() as others:
        boxes = [await mailbox(workers, f"w{n}.celery.pidbox", "celery.pidbox", "", "fanout") for n in range(3)]

        async def ask(n: int) -> list[Any]:
            process = (clients, others)[n % 2]
            replies = await mailbox(process, f"{n}.reply.celery.pidbox", "reply.celery.pidbox", str(n))
            await process.exchanges.publish(plain(str(n), "celery.pidbox", "", "fanout"))
            return await taken(replies, 3)

        async def answer(box: Channel, worker: str) -> None:
            for _ in range(20):
                (asked,) = await taken(box, 1)
                await workers.exchanges.publish(plain(f"{worker}:{asked}", "reply.celery.pidbox", asked))

        async with asyncio.TaskGroup() as group:
            for n, box in enumerate(boxes):
                group.create_task(answer(box, f"w{n}"))
            answers = [group.create_task(ask(n)) for n in range(20)]
        assert [sorted(answer.result()) for answer in answers] == [[f"w{w}:{n}" for w in range(3)] for n in range(20)]


async def test_mailboxes_leave_nothing_behind_in_the_process(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mailboxes, "LINGER", 0.01)
    async with here.process() as process:
        for n in range(3):
            channel = await mailbox(process, f"q{n}", "replies", str(n))
            await channel.intake.close()
            process.channels.remove(channel)
        boxes = process.exchanges.boxes
        await eventually(lambda: not boxes._boxes and not boxes._taps and not boxes._closing)
        gc.collect()
        mine = [thing for thing in gc.get_objects() if type(thing) is Follower and thing._broker is process.broker]
        assert not [follower for follower in mine if follower.follows]


async def test_mailboxes_leave_nothing_behind_in_the_broker() -> None:
    with placed("redis") as place:
        left: list[set[bytes]] = []
        for n in range(3):
            async with place.process() as process:
                channel = await mailbox(process, f"{n}.reply.celery.pidbox", "reply.celery.pidbox", str(n))
                await process.exchanges.publish(plain("x", "reply.celery.pidbox", str(n)))
                assert await taken(channel, 1) == ["x"]
                queue = f"{n}.reply.celery.pidbox"
                await channel.intake.cancel(queue)
                await process.exchanges.delete(queue)  # as the remote control does, although it has ended
            keys = shared("redis").command_now("KEYS", "*")
            left.append({key for key in keys if place.prefix.encode() in key})
        assert left[0] == left[1] == left[2] != set()


async def test_replies_by_name_reach_the_process_that_waits_for_them(place: Place) -> None:
    """As results over rpc:// travel: by the default exchange, to a queue that only its process knows."""
    async with place.process() as client, place.process() as worker:
        channel = await client.channel()
        await client.exchanges.declare("0f3a", channel.intake, **REPLY)  # type: ignore[arg-type]
        await worker.exchanges.publish(plain("result", "", "0f3a"))
        await channel.intake.consume("0f3a", no_ack=True)
        assert await taken(channel, 1) == ["result"]
        await worker.exchanges.publish(plain("other", "", "0f3b"))
        await channel.nothing()
        assert not await worker.exchanges.exists("0f3a")
        assert not await worker.exchanges.exists("0f3b")


async def test_what_is_no_task_goes_to_a_queue_that_is_there(place: Place) -> None:
    async with place.process() as one, place.process() as other:
        await one.exchanges.declare("plain", one)
        await other.exchanges.publish(plain("a", "", "plain"))
        assert await other.exchanges.exists("plain")
        assert await taken(await one.channel("plain"), 1) == ["a"]


@pytest.mark.parametrize(
    ("options", "bound", "transient"),
    [
        ({}, None, False),
        ({"durable": False}, None, False),
        ({"auto_delete": True}, None, False),
        ({"arguments": {"x-expires": 1000}}, None, False),
        ({"auto_delete": True, "arguments": {"x-expires": 1000}}, None, False),
        ({"durable": False, "auto_delete": True, "arguments": {"x-expires": 1000}}, None, True),
        ({"durable": False, "auto_delete": True}, ("tasks", "direct"), False),
        ({"auto_delete": True}, ("tasks", "topic"), False),
        ({"durable": False}, ("news", "fanout"), False),
        ({"exclusive": True}, None, True),
        (REPLY, None, True),
        ({"auto_delete": True}, ("news", "fanout"), True),
        ({"durable": False, "auto_delete": True}, ("celeryev", "topic"), True),
        ({"durable": False, "auto_delete": True}, ("reply.celery.pidbox", "direct"), True),
    ],
)
async def test_only_what_nobody_shares_is_transient(
    here: Place, options: Any, bound: tuple[str, str] | None, transient: bool
) -> None:
    async with here.process() as process:
        await process.exchanges.declare("q", process, **options)
        if bound is not None:
            await process.exchanges.bind("q", *bound, "key")
        found = await process.exchanges.resolve("q")
        assert isinstance(found, _mailboxes.Mailbox) == transient
        assert await process.broker.exists(process.exchanges.names.queue("q")) != transient


async def test_results_over_the_broker_leave_no_queue_behind(here: Place) -> None:
    async with here.process() as process:
        oid = "0b6f3a52-95c5-3e0c-9d9f-3f3f2f1c6d11"  # as Celery's rpc:// calls its queue, which is durable
        await process.exchanges.declare(oid, process, auto_delete=True, arguments={"x-expires": 86_400_000})
        assert isinstance(await process.exchanges.resolve(oid), _mailboxes.Mailbox)


async def test_an_undecided_queue_keeps_what_is_published_to_it(here: Place) -> None:
    async with here.process() as process, here.process() as other:
        await process.exchanges.declare("q", process, auto_delete=True)
        await process.exchanges.publish(plain("a", "", "q"))
        assert await taken(await other.channel("q"), 1) == ["a"]


async def test_a_mailbox_ends_with_its_last_reader(here: Place) -> None:
    async with here.process() as process:
        exchanges = process.exchanges
        one = await mailbox(process, "q", "x", "k")
        other = await process.channel()
        await exchanges.declare("q", other.intake, **REPLY)  # type: ignore[arg-type]
        await other.intake.consume("q")
        for n in range(4):
            await exchanges.publish(plain(str(n), "x", "k"))
        await eventually(lambda: one.count + other.count == 4)  # once each, whoever gets it
        await one.intake.cancel("q")
        assert await exchanges.exists("q")
        await other.intake.cancel("q")
        assert not await exchanges.exists("q")


async def test_a_mailbox_ends_with_the_channels_that_have_declared_it(here: Place) -> None:
    async with here.process() as process:
        exchanges = process.exchanges
        channels = [await process.channel() for _ in range(2)]
        for channel in channels:
            await exchanges.declare("q", channel.intake, exclusive=True)
        await channels[0].intake.close()
        assert await exchanges.exists("q")
        await channels[1].intake.close()
        assert not await exchanges.exists("q")


@pytest.mark.parametrize("cancelled", ["who waits for it", "who opens it"])
async def test_an_exchange_has_one_reader_whoever_gives_up_meanwhile(
    here: Place, monkeypatch: pytest.MonkeyPatch, cancelled: str
) -> None:
    """With two of them a queue that is bound twice gets each message twice."""
    opening, going_on = asyncio.Event(), asyncio.Event()
    real = Follower.open

    async def open_slowly(follower: Follower) -> None:
        opening.set()
        await going_on.wait()
        await real(follower)

    async with here.process() as process:
        boxes = process.exchanges.boxes
        box = boxes.declare("q", process, auto_delete=True)
        monkeypatch.setattr(Follower, "open", open_slowly)
        first, second, third = (
            asyncio.ensure_future(boxes.bind(box, "x", _mailboxes.Binding("direct", key))) for key in "abc"
        )
        await opening.wait()
        gives_up, *rest = [second, first, third] if cancelled == "who waits for it" else [first, second, third]
        gives_up.cancel()
        await asyncio.wait([gives_up])
        rest.append(asyncio.ensure_future(boxes.bind(box, "x", _mailboxes.Binding("fanout", ""))))
        going_on.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*rest)
        await process.exchanges.publish(plain("once", "x", "c"))
        await eventually(lambda: len(box))
        await asyncio.sleep(here.quiet)
        assert len(box) == 1
        assert boxes._taps["x"].users == 0


async def test_a_mailbox_that_nobody_reads_keeps_the_newest(
    here: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_mailboxes, "MOST", 10)
    async with here.process() as process:
        channel = await process.channel()
        await process.exchanges.declare("q", channel.intake, exclusive=True)
        for n in range(25):
            await process.exchanges.publish(plain(str(n), "", "q"))
        box = process.exchanges.boxes.get("q")
        assert box is not None
        await eventually(lambda: box._dropped == 15)
        assert await process.exchanges.size("q") == 10
        await channel.intake.consume("q")
        assert await taken(channel, 10) == [str(n) for n in range(15, 25)]
    assert sum("nobody reads it" in record.getMessage() for record in caplog.records) == 2


async def test_a_mailbox_gives_what_is_more_important_first_and_drops_what_is_too_old(here: Place) -> None:
    async with here.process() as process:
        channel = await process.channel()
        await process.exchanges.declare("q", channel.intake, exclusive=True, arguments={"x-message-ttl": 60_000})
        for body, options in (
            ("low", {"priority": 2}), ("old", {"expiration": "1"}), ("high", {"priority": 6}), ("low 2", {"priority": 2})
        ):  # fmt: skip
            await process.exchanges.publish(plain(body, "", "q", **options))
        box = process.exchanges.boxes.get("q")
        assert box is not None
        await eventually(lambda: len(box._levels.get(2, ())) == 2 and len(box) == 3)
        await channel.intake.consume("q")
        assert await taken(channel, 3) == ["high", "low", "low 2"]
        await process.exchanges.declare("short", channel.intake, exclusive=True, arguments={"x-message-ttl": 1})
        await process.exchanges.publish(plain("a", "", "short"))
        await process.exchanges.publish(plain("b", "", "q"))
        assert await taken(channel, 1) == ["b"]
        short = process.exchanges.boxes.get("short")
        assert short is not None
        await eventually(lambda: not len(short))


async def test_a_queue_of_the_broker_drops_what_is_too_old_but_no_task(place: Place) -> None:
    async with place.process() as process:
        exchanges = process.exchanges
        await exchanges.declare("q", process, arguments={"x-message-ttl": 200})
        await exchanges.publish(plain("old", "", "q"))
        await exchanges.bind("q", "x", "direct", "k")
        await exchanges.publish(plain("old too", "x", "k"))
        await process.put("q", "task", expiration="100")
        await asyncio.sleep(0.4)
        channel = await process.channel("q")
        assert await taken(channel, 1) == ["task"]
        await channel.nothing()


async def test_a_queue_that_is_made_anew_has_no_time_to_live_of_its_predecessor(here: Place) -> None:
    async with here.process() as process:
        await process.exchanges.declare("q", process, arguments={"x-message-ttl": 100})
        await process.exchanges.delete("q")
        await process.exchanges.declare("q", process)
        await process.exchanges.publish(plain("a", "", "q"))
        await asyncio.sleep(0.15)
        assert await taken(await process.channel("q"), 1) == ["a"]


async def test_priorities_are_served_where_there_are_any(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    async with place.process() as process:
        await process.put("q", "low")
        await process.put("q", "high", "high 2", priority=9)
        got = await taken(await process.channel("q"), 3)
    if place.name == "kafka":
        assert sorted(got) == ["high", "high 2", "low"]
    else:
        assert got == ["high", "high 2", "low"]
    warned = sum("priorities" in record.getMessage() for record in caplog.records)
    assert warned == (1 if place.name == "kafka" else 0)


async def test_the_size_of_a_queue_and_emptying_it(place: Place) -> None:
    async with place.process() as process:
        exchanges = process.exchanges
        assert await exchanges.size("q") == await exchanges.purge("q") == 0
        assert not await exchanges.exists("q")
        await process.put("q", "a", "b")
        async with asyncio.timeout(30):
            while await exchanges.size("q") != 2:
                await asyncio.sleep(0.05)
        assert await exchanges.purge("q") == 2
        assert await exchanges.size("q") == 0


async def test_a_deleted_queue_is_gone_with_its_bindings(place: Place) -> None:
    async with place.process() as process:
        exchanges = process.exchanges
        await exchanges.declare("q", process)
        await exchanges.bind("q", "x", "direct", "k")
        await exchanges.delete("q")
        assert not await exchanges.exists("q")
        assert await exchanges.table("x") == []
        await exchanges.publish(plain("a", "x", "k"))
        assert not await exchanges.exists("q")


async def test_the_table_of_an_exchange_is_what_kombu_expects(here: Place) -> None:
    async with here.process() as process:
        await process.exchanges.declare("q", process)
        await process.exchanges.bind("q", "x", "topic", "a.*")
        await mailbox(process, "box", "x", "b", "topic")
        table = await process.exchanges.table("x")
        assert [(key, queue) for key, _, queue in table] == [("a.*", "q"), ("b", "box")]
        assert table[0][1] == "^a\\.[^\\.]+$"


async def test_a_service_reads_and_writes_what_celery_does(place: Place) -> None:
    priorities = 1 if place.name == "kafka" else 10
    queue = service_queue("celery", priorities=priorities, lease=2)
    back = service_queue("back", priorities=priorities, lease=2)
    service: Service[None] = Service("shop")

    @service.subscribe(queue)
    async def handle(got: Message[Envelope]) -> None:
        await got.publish(back, Envelope(body=got.value.body + "!", headers=got.value.headers))

    async with place.process() as process, place.process() as other, service.running(other.broker):
        await process.put("celery", "a")
        (item,) = await (await process.channel("back")).take(1)
        assert (body_of(item), item.payload["headers"]) == ("a!", {"task": "jobs.add", "id": "a"})


async def test_publishing_tells_the_error_of_any_queue(here: Place) -> None:
    async with here.process() as process:
        await process.exchanges.declare("q", process)
        await process.exchanges.bind("q", "x", "direct", "k")
        with pytest.raises(Exception, match="1048320"):
            await process.exchanges.publish(seal(message("x" * 1_100_000), "x", "direct", "k"))
        with pytest.raises(Exception, match="1048320"):
            await process.exchanges.publish(task("x" * 1_100_000, "q"))


async def test_a_task_that_is_due_late_waits_in_the_broker(place: Place) -> None:
    async with place.process(eta_window=1) as process:
        channel = await process.channel("q")
        began = time.time()
        eta = datetime.fromtimestamp(began + 3, UTC).isoformat()
        await process.put("q", "late", eta=eta)
        (item,) = await channel.take(1)
        assert 1.9 <= time.time() - began < 3.2, "not the window before it is due"
        channel.intake.ack([item])
