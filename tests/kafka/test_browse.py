"""Looking at what is stored."""

from __future__ import annotations

import itertools
import time
from datetime import UTC, datetime

import pytest
from confluent_kafka import Producer

from brokerkit.address import Queue, Topic
from brokerkit.driver import DEAD, Source
from brokerkit.drivers._log import Tracker
from brokerkit.drivers.kafka import _browse, _look, _offsets
from brokerkit.drivers.kafka._coordinator import store_start
from brokerkit.drivers.kafka._cut import cut
from brokerkit.errors import CapabilityError, ConfigError, NotFound, PositionLost
from brokerkit.policy import Start
from tests.servers.kafka import shared_kafka

from .administrator import GROUP, Opened, named, opened

pytestmark = pytest.mark.asyncio


def url() -> str:
    return shared_kafka().url()


async def pages(r: Opened, limit: int) -> list[str]:
    """Browse the topic page by page."""
    seen: list[str] = []
    after = None
    while page := await r.seen(r.topic, limit, after=after):
        assert len(page) <= limit
        seen += [stored.record.id for stored in page]
        after = page[-1].position
    return seen


# ---------------------------------------------------------------------- topics


async def test_a_topic_is_browsed_in_the_order_of_its_times() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        for number in range(40):
            await r.put(r.topic, [f"m{number:02}"], key=b"%d" % (number % 7), timestamp=1e9 + number)
        expected = [f"m{number:02}" for number in range(40)]
        assert await r.ids(r.topic) == expected
        for limit in (1, 7, 40, 100):
            assert await pages(r, limit) == expected, limit


async def test_a_record_is_seen_whole() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        (position,) = await r.put(
            r.topic, ["m"], key=b"\xff", body=b"\x00", headers=(("a", b"1"), ("a", b"\xfe")), attempts=3, deliveries=2
        )
        (seen,) = await r.seen(r.topic)
        assert (seen.position, seen.deliveries) == (position, 2)
        record = seen.record
        assert (record.id, record.key, record.body, record.attempts) == ("m", b"\xff", b"\x00", 3)
        assert (record.headers, record.timestamp) == ((("a", b"1"), ("a", b"\xfe")), 1e9)


async def test_pages_go_on_where_the_last_one_ended_though_times_disagree() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        for number in range(60):  # publishers whose clocks are up to a minute apart
            await r.put(r.topic, [f"m{number:02}"], key=b"%d" % number, timestamp=1e9 + (number * 37) % 60)
        seen = await pages(r, 7)
        assert sorted(seen) == [f"m{number:02}" for number in range(60)]
        assert seen == await r.ids(r.topic)


async def test_another_process_goes_on_behind_a_position() -> None:
    topic = named()
    async with opened(url(), topic) as r, opened(url(), topic) as other:
        await r.admin.declare(topic)
        for number in range(30):
            await r.put(topic, [f"m{number:02}"], key=b"%d" % number, timestamp=1e9 + number // 3)
        everything = await r.seen(topic)
        seen = [stored.record.id for stored in everything]
        for place in (0, 7, 8, 9, 28):
            assert await other.ids(topic, after=everything[place].position) == seen[place + 1 :], place
        assert await other.ids(topic, after=everything[29].position) == []


async def test_a_position_whose_time_is_out_of_order_repeats_and_loses_nothing() -> None:
    topic = named(2)
    async with opened(url(), topic) as r, opened(url(), topic) as other:
        await r.admin.declare(topic)
        for number, when in enumerate((10, 90, 20, 80, 30, 70, 40, 60)):
            await r.put(topic, [f"m{number}"], key=b"%d" % number, timestamp=1e9 + when)
        everything = await r.seen(topic)
        for place, stored in enumerate(everything):
            rest = {one.record.id for one in everything[place + 1 :]}
            found = await other.ids(topic, after=stored.position)
            assert rest <= set(found), place
            assert stored.record.id not in found


async def test_large_records_are_read_one_by_one() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        for number in range(12):
            await r.put(r.topic, [f"m{number:02}"], key=b"%d" % number, body=bytes(400_000), timestamp=1e9 + number)
        assert await r.ids(r.topic) == [f"m{number:02}" for number in range(12)]
        assert await pages(r, 5) == [f"m{number:02}" for number in range(12)]


async def test_browsing_begins_at_a_start() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = [
            (await r.put(r.topic, [f"m{number}"], key=b"%d" % number, timestamp=1e9 + number))[0] for number in range(9)
        ]
        when = Start.at(datetime.fromtimestamp(1e9 + 4.5, UTC))
        assert await r.ids(r.topic, start=when) == [f"m{number}" for number in range(5, 9)]
        assert await r.ids(r.topic, start=Start.position(positions[3])) == [f"m{number}" for number in range(3, 9)]
        assert await r.ids(r.topic, start=when, after=positions[6]) == ["m7", "m8"]
        assert await r.ids(r.topic, start=Start.position(positions[7]), after=positions[3]) == ["m7", "m8"]
        assert await r.ids(r.topic, start=Start.LATEST) == []
        assert len(await r.ids(r.topic, start=Start.EARLIEST, limit=4)) == 4


async def test_browsing_leaves_nothing_behind() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        await r.put(r.topic, ["a", "b"])
        before = await r.admin.backlog(Source(r.topic, GROUP))
        for _ in range(2):
            assert await r.ids(r.topic) == ["a", "b"]
        after = await r.admin.backlog(Source(r.topic, GROUP))
        assert (after.waiting, after.in_flight) == (before.waiting, before.in_flight) == (2, 0)
        assert set((await r.stored()).values()) == {None}
        with shared_kafka().wire() as wire:
            assert [name for name in wire.cluster(None).topics if name.startswith(r.topic.name)] == [r.topic.name]


async def test_what_is_no_position_is_refused() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        await r.put(r.topic, ["a"])
        for text in ("", "nonsense", f"{r.topic.name}[0]@-1", f"{r.topic.name}x[0]@1-1", "é" * 10_000):
            with pytest.raises(ConfigError, match="no position"):
                await r.ids(r.topic, after=text)
            with pytest.raises(ConfigError, match="no position"):
                await r.ids(r.letters, after=text)
        with pytest.raises(CapabilityError, match="start is for topics"):
            await r.ids(r.letters, start=Start.LATEST)


async def test_what_does_not_exist_is_not_found() -> None:
    async with opened(url()) as r:
        for address in (r.topic, r.letters, r.again):
            with pytest.raises(NotFound, match=r"orders.*does not exist"):
                await r.seen(address)


async def test_browsing_a_topic_that_was_made_anew_shows_the_new_one() -> None:
    topic = named()
    async with opened(url(), topic) as r, opened(url(), topic) as other:
        await r.admin.declare(topic)
        (position,) = await r.put(topic, ["old"])
        assert await other.ids(topic) == ["old"]
        await r.admin.delete(topic, None)
        await r.admin.declare(topic)
        await r.put(topic, ["new"])
        assert await other.ids(topic) == ["new"]
        with pytest.raises((PositionLost, ConfigError)):
            await other.ids(topic, start=Start.position(position.replace("-0", "-5")))


async def test_records_that_are_removed_while_somebody_looks_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url(), named(1)) as r:
        await r.admin.declare(r.topic)
        await r.put(r.topic, [f"m{number}" for number in range(10)])
        look = _offsets.look
        calls = itertools.count()

        async def late(cluster: object, info: object, wanted: object, **options: object) -> object:
            if not next(calls):
                found = await r.cluster.topic(r.topic.name, timeout=5)
                await cut(r.cluster, found, {0: 4}, timeout=5)
            return await look(cluster, info, wanted, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(_look, "look", late)
        assert await r.ids(r.topic) == [f"m{number}" for number in range(4, 10)]


async def test_places_are_kept_for_the_latest_pages_only() -> None:
    places = _browse.Places()
    for number in range(200):
        places.put(f"p{number}", _browse.Place(None, (number,)))
    assert len(places._kept) == _browse._KEPT


async def test_what_another_client_wrote_is_shown() -> None:
    async with opened(url(), named(1)) as r:
        await r.admin.declare(r.topic)
        producer = Producer({"bootstrap.servers": shared_kafka().bootstrap()})
        producer.produce(r.topic.name, value=None, key=b"\x00\xff", headers=[("x", None), ("x", b"\xff")], timestamp=5)
        producer.produce(r.topic.name, value=b"v" * 300, timestamp=6)
        producer.flush(10)
        null, plain = await r.seen(r.topic)
        assert (null.record.body, null.record.key, null.record.timestamp) == (None, b"\x00\xff", 0.005)
        assert null.record.headers == (("x", b""), ("x", b"\xff"))
        assert null.record.id == null.position == f"{r.topic.name}[0]@5-0"
        assert plain.record.body == b"v" * 300


async def test_aborted_transactions_are_not_shown() -> None:
    async with opened(url(), named(1)) as r:
        await r.admin.declare(r.topic)
        producer = Producer({"bootstrap.servers": shared_kafka().bootstrap(), "transactional.id": r.topic.name})
        producer.init_transactions(10)
        for text, good in (("a", True), ("b", False), ("c", True), ("d", False)):
            producer.begin_transaction()
            producer.produce(r.topic.name, value=text.encode())
            producer.commit_transaction(10) if good else producer.abort_transaction(10)
        end = time.monotonic() + 20
        while len(await r.seen(r.topic)) < 2:  # the broker ends a transaction behind its answer
            assert time.monotonic() < end
        assert [stored.record.body for stored in await r.seen(r.topic)] == [b"a", b"c"]
        first = (await r.seen(r.topic, 1))[0]
        assert [stored.record.body for stored in await r.seen(r.topic, after=first.position)] == [b"c"]


# ---------------------------------------------------------------------- redrive queues


async def test_a_redrive_queue_shows_what_is_not_done() -> None:
    async with opened(url(), named(4)) as r:
        await r.admin.declare(r.topic)
        await r.admin.declare(r.again)
        for number in range(12):
            await r.put(r.again, [f"m{number:02}"], key=b"%d" % (number % 4))
        everything = await r.seen(r.again)
        assert sorted(stored.record.id for stored in everything) == [f"m{number:02}" for number in range(12)]
        busiest = max(range(4), key=lambda partition: sum(f"[{partition}]" in stored.position for stored in everything))
        there = [stored for stored in everything if f"[{busiest}]" in stored.position]
        assert len(there) >= 3
        tracker = Tracker()
        for offset in range(3):
            tracker.hand_out(offset)
        tracker.done(0)
        tracker.done(2)
        tracker.release(1)
        notes = {busiest: (tracker.base, tracker.encode())}
        assert await store_start(r.cluster, r.again.name, r.again.name, notes, 10)
        left = [stored.record.id for stored in everything if stored not in (there[0], there[2])]
        assert await r.ids(r.again) == left
        half = (await r.seen(r.again, 3))[-1].position
        assert await r.ids(r.again, after=half) == left[3:]


async def test_queues_are_not_browsed() -> None:
    async with opened(url()) as r:
        with pytest.raises(NotFound):
            await r.seen(Queue(f"{r.topic.name}.queue", bytes))


# ---------------------------------------------------------------------- dead letters


async def test_letters_are_shown_in_the_order_of_dying() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        positions = await r.bury([f"m{number}" for number in range(9)], attempts=5)
        seen = await r.seen(r.letters)
        assert [stored.position for stored in seen] == positions
        assert [stored.record.id for stored in seen] == [f"m{number}" for number in range(9)]
        assert seen[0].record.headers == ((DEAD + "reason", b"no good"), ("a", b"1"))
        assert seen[0].record.attempts == 5
        page = await r.seen(r.letters, 4)
        rest = await r.seen(r.letters, after=page[-1].position)
        assert [stored.position for stored in (*page, *rest)] == positions


async def test_no_letters_yet_is_an_empty_address() -> None:
    async with opened(url()) as r:
        await r.admin.declare(r.topic)
        assert await r.seen(r.letters) == []
        with pytest.raises(NotFound):
            await r.seen(Topic(f"{r.topic.name}.other", bytes).dead_letters(GROUP))
