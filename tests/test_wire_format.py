"""docs/wire-format.md is right and complete: what it lists is what the code has, and a client written from it alone takes part."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from brokerkit import Message, Queue, Service, Topic, connect
from brokerkit._outcome import Die, dead_letter
from brokerkit.driver import Record
from brokerkit.drivers._log import Tracker
from brokerkit.drivers.redis import _frames
from tests.servers import FLAVORS, RedisServer, shared
from tests.wire_client import LUA, Client, Member, Session, Wired, pack, queue_blob, read_note, topic_blob, unpack

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
SCRIPTS = {path.stem: path.read_text(encoding="utf-8") for path in LUA.glob("*.lua")}
PYTHON = "\n".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "brokerkit").rglob("*.py") if "testing" not in path.parts
)
JSON = ("bk-content-type", b"application/json")


@dataclass
class Order:
    id: str
    total: float


ORDERS = Topic("orders", Order, partitions=4)
LINE = Topic("line", Order, partitions=1)
EMAILS = Queue("emails", Order, priorities=2)
QUOTES = Queue("quotes", Order, reply=float)


def rows(*heads: str) -> list[list[str]]:
    """Return the cells of all tables whose first line has these *heads*."""
    found: list[list[str]] = []
    inside = False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[: len(heads)] == list(heads):
            inside = True
        elif inside and not set(line) <= set("|-"):
            found.append(cells)
    assert found, f"the page has no table of {heads}"
    return found


# ---------------------------------------------------------------------- what is listed


def test_the_page_has_every_script_with_its_flags_and_parts() -> None:
    told = {file.strip("`"): (flags, uses) for file, flags, uses in rows("file", "flags")}
    real = {
        name: tuple(" ".join(re.findall(rf"^-- {what}: (.+)$", text, re.MULTILINE)) for what in ("flags", "uses"))
        for name, text in SCRIPTS.items()
    }
    used = {part for _, uses in real.values() for part in uses.split()}
    assert told == {name: line for name, line in real.items() if name not in used}
    sentence = re.search(r"^The files (.*?) are parts of others", PAGE, re.MULTILINE)
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == used


def test_each_script_has_its_arguments_and_its_reply() -> None:
    told = [row[0].strip("*`") for row in rows("script")]
    assert sorted(told) == sorted(name.strip("`") for name, *_ in rows("file", "flags"))
    assert all(len(row) >= 3 and all(row) for row in rows("script"))


def test_each_script_takes_what_its_file_says() -> None:
    told = {row[0]: {"KEYS": "1 `E`", "ARGV": row[1]} for row in rows("script", "ARGV (KEYS: `E`)")}
    told |= {row[0]: {"KEYS": row[1], "ARGV": row[2]} for row in rows("script", "KEYS")}
    for name, arguments in told.items():
        text = " ".join(line.removeprefix("--") for line in SCRIPTS[name.strip("*`")].splitlines() if line[:2] == "--")
        for what, cell in arguments.items():
            said = re.search(rf"{what}: (.*?)(?: KEYS: | ARGV: | Returns |$)", text)
            assert counted(cell) == (counted(said[1]) if said else 1), (name, what)


def counted(text: str) -> int:
    """Return up to which number the arguments in *text* are numbered."""
    number, at = 0, 0
    while found := re.compile(rf"(?:^|[,;] |and ){number + 1} ").search(text, at):
        number, at = number + 1, found.end()
    return number


def test_the_page_has_every_key_and_channel_that_the_code_names() -> None:
    keys = [row[1] for row in rows("kind", "key")] + [row[0] for row in rows("channel")]
    told = {re.sub(r"<\w+>.*", "", key.strip("`").replace("bk:{base}", "E").removeprefix("E")) for key in keys} - {""}
    lua = set(re.findall(r"'(:[a-z]*:?)\d*'", "\n".join(SCRIPTS.values())))
    python = set(re.findall(r'b"(:[a-z]+:?)\d*"', PYTHON))
    assert told == lua | python


def test_the_keys_that_users_are_told_to_look_at_exist() -> None:
    patterns = [pattern(row[1]) for row in rows("kind", "key")] + [pattern(row[0]) for row in rows("channel")]
    shown = re.findall(r"'(bk:\{.*?)'", (ROOT / "docs" / "redis.md").read_text(encoding="utf-8"))
    assert len(shown) > 5
    for key in shown:
        assert any(form.fullmatch(key.replace("<consumer>", "0123456789abcdef/1")) for form in patterns), key


def test_the_page_has_every_error_of_the_scripts() -> None:
    told = {row[0].strip("`") for row in rows("error")}
    assert told == set(re.findall(r"'(BK [A-Z]+)", "\n".join(SCRIPTS.values())))


def test_the_page_has_every_header() -> None:
    told = {name for row in rows("header") for name in re.findall(r"`(bk-[a-z-]+)`", row[0])}
    record = Record(ORDERS, "1", b"")
    letter = dead_letter(record, ORDERS.dead_letters("g"), Die("", "", ""), failures=1, first_failed=1, now=1)
    assert told == set(re.findall(r'"(bk-[a-z-]+[a-z])"', PYTHON)) | {name for name, _ in letter.headers}


def test_the_page_has_flags_and_content_types() -> None:
    flags = sorted(int(flag) for flag, _ in rows("flag"))
    names = ("_SHORT_ID", "_KEY", "_NULL", "_TYPE", "_HEADERS", "_CARRIED", "_PRIORITY")
    assert flags == sorted(getattr(_frames, name) for name in names)
    types = [name.strip("`").encode() for _, name in rows("content type")]
    assert tuple(types) == _frames._TYPES


# ---------------------------------------------------------------------- frames and notes


RECORDS = [
    Record(ORDERS, "1", b"body"),
    Record(
        ORDERS, "00112233445566778899-4294967295", b"", b"key", (("bk-content-type", b"text/plain"),), 1.5, attempts=2
    ),
    Record(ORDERS, "00112233445566778899-4294967296", b"b", None, (("bk-content-type", b"a/b"), ("x", b"")), 2.25),
    Record(ORDERS, "id ü", None, b"", (("bk-content-type", b"application/json"), ("ü", b"\xff" * 300)), deliveries=7),
    Record(ORDERS.dead_letters("g"), "9", b"x", None, (("bk-dead-reason", b"r"),), 3.0, priority=3, attempts=9),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_a_frame_of_either_side_is_read_by_the_other(record: Record) -> None:
    wired = unpack(_frames.frame(record))
    assert wired == Wired(
        record.id,
        record.body,
        record.key,
        list(record.headers),
        record.timestamp,
        record.attempts,
        record.deliveries,
        record.priority,
    )
    again = _frames.read(record.address, pack(wired))
    assert (again.id, again.body, again.key, again.headers) == (record.id, record.body, record.key, record.headers)
    assert (again.timestamp, again.attempts) == (record.timestamp, record.attempts)


@pytest.mark.parametrize("damage", ["flag", "magic", "end"])
def test_a_broken_frame_keeps_its_bytes(damage: str) -> None:
    frame = pack(order("m1", key=b"ann"))
    broken = {"flag": b"\xb1\x92" + frame[2:], "magic": b"\xb2" + frame[1:], "end": frame[:30]}[damage]
    record = _frames.read(ORDERS, broken, number=7)
    assert (record.id, record.body, record.headers) == ("broken-7", broken, (("bk-content-type", _frames.BROKEN),))


def test_a_note_says_what_is_done_waits_and_was_counted() -> None:
    tracker = Tracker(100)
    tracker.hand_out_run(300)
    for offset in (101, 102, 250):
        tracker.done(offset)
    tracker.crashed()
    for offset in (100, 103, 104):
        tracker.hand_out(offset)
    tracker.hold(104, 5)
    note = read_note(100, tracker.encode())
    rest = set(range(100, 400)) - {101, 102, 250}
    assert (note.high, note.done, note.waiting) == (400, {101, 102, 250}, rest - {100, 103, 104})
    assert note.counts == {offset: (1, 5 if offset == 104 else 0) for offset in rest}


# ---------------------------------------------------------------------- a client beside brokerkit


@pytest.fixture(params=FLAVORS)
def server(request: pytest.FixtureRequest) -> RedisServer:
    server = shared(request.param)
    server.clear()
    return server


@pytest.fixture
def client(server: RedisServer) -> Iterator[Client]:
    client = Client(server.url())
    yield client
    client.close()


def order(id: str, *, key: bytes | None = None) -> Wired:
    return Wired(id, b'{"id":"%b","total":1.5}' % id.encode(), key, [JSON, ("trace", b"abc")], 1000.25)


@pytest.mark.asyncio
async def test_a_service_handles_what_a_client_publishes(server: RedisServer, client: Client) -> None:
    got: asyncio.Queue[Message[Order]] = asyncio.Queue()
    service = Service("billing")

    @service.subscribe(ORDERS)
    @service.subscribe(EMAILS)
    async def handle(message: Message[Order]) -> None:
        await got.put(message)

    async with connect(server.url()) as broker, service.running(broker):
        for kind, E, position in (("q", "bk:{emails}", r"emails@1"), ("t", "bk:{orders}", r"orders\[\d\]@\d+-0")):
            blob = queue_blob(order("m1")) if kind == "q" else topic_blob(order("m1", key=b"ann"))
            reply = client.publish(E, kind, blob)
            assert client.send_again(E, kind, 1, blob) == reply, "the same batch is not stored a second time"
            message = await asyncio.wait_for(got.get(), 10)
            assert (message.id, message.value, dict(message.headers)) == ("m1", Order("m1", 1.5), {"trace": "abc"})
            assert (message.timestamp.timestamp(), message.attempt, message.deliveries) == (1000.25, 1, 1)
            assert re.fullmatch(position, message.position)
        receipt = await broker.publish(ORDERS, Order("m2", 1.5), key="ann", id="m2")
        assert receipt.position is not None
        assert receipt.position.endswith("-1"), "equal keys are in one partition, whoever publishes"
        assert (await asyncio.wait_for(got.get(), 10)).id == "m2", "nothing came twice"
        client.call(
            "publish_queue",
            ["bk:{emails}", "bk:{emails}:r0"],
            f"@{client.producer}",
            2,
            pack(order("m3")),
            pack(order("m4")),
        )
        reply = client.call(
            "publish_topic", ["bk:{orders}"], f"@{client.producer}", 2, 4, topic_blob(order("m5", key=b"ann"))
        )
        assert re.fullmatch(rb"4 \d \d+ 2", reply)
        assert {(await asyncio.wait_for(got.get(), 10)).id for _ in range(3)} == {"m3", "m4", "m5"}


@pytest.mark.asyncio
async def test_a_client_settles_what_brokerkit_publishes(server: RedisServer, client: Client) -> None:
    async with connect(server.url()) as broker:
        receipt = await broker.publish(EMAILS, Order("o1", 2.0), headers={"trace": "abc"}, priority=1, ttl=60)
        session = Session(client, "bk:{emails}")
        [taken] = session.take(10)
        assert receipt.position == f"emails@{int.from_bytes(taken.number, 'big')}"
        assert (taken.record.id, taken.record.body) == (receipt.id, b'{"id":"o1","total":2.0}')
        assert (taken.record.headers, taken.priority, taken.deliveries) == ([JSON, ("trace", b"abc")], 1, 1)
        assert taken.expires > taken.record.timestamp * 1000
        assert (await broker.backlog(EMAILS)).in_flight == 1
        assert session.release(taken) == 1
        [taken] = session.take(10)
        assert taken.deliveries == 1, "handed back, it does not count"
        assert session.recover() == [], "a reply was lost: the session does not know that it holds something"
        assert session.settle(taken) == 1
        [taken] = session.take(10)
        assert (session.settle(taken), session.settle(taken)) == (1, 1)
        backlog = await broker.backlog(EMAILS)
        assert (backlog.waiting, backlog.in_flight) == (0, 0)
        await broker.publish(EMAILS, Order("o2", 2.0))
        [taken] = session.take(10)
        session.leave()
        assert (session.settle(taken), session.renew()) == (0, 0), "the session is over"
        assert (await broker.backlog(EMAILS)).waiting == 1


@pytest.mark.asyncio
async def test_a_client_retries_and_dead_letters(server: RedisServer, client: Client) -> None:
    async with connect(server.url()) as broker:
        for id in ("again", "dead"):
            await broker.publish(EMAILS, Order(id, 2.0), id=id)
        session = Session(client, "bk:{emails}")
        again, dead = session.take(10)
        again.record.attempts = 1
        again.record.headers.append(("bk-first-failed", b"1000.5"))
        copy = ("bk:{emails}", "q", "", queue_blob(again.record, delay=20))
        assert session.outcome(again, copy) == [1, 1]
        assert session.outcome(again, copy) == [1, 0], "it is done once"
        notes = {
            "reason": "why",
            "error": "E",
            "text": "t",
            "attempts": "1",
            "first": "1",
            "last": "2",
            "origin": "emails",
        }
        dead.record.headers += [(f"bk-dead-{name}", text.encode()) for name, text in notes.items()]
        assert session.outcome(dead, ("bk:{emails}..dead", "d", "seq=0", pack(dead.record))) == [1, 1]
        [letter] = [letter async for letter in broker.browse(EMAILS.dead_letters)]
        assert (letter.id, letter.value, letter.position) == ("dead", Order("dead", 2.0), "emails..dead@1")
        assert (letter.dead.reason, letter.dead.error, letter.dead.attempts) == ("why", "E", 1)
        async with broker.subscribe(EMAILS) as messages:
            [message] = await messages.receive(timeout=10)
            assert (message.id, message.attempt, message.deliveries) == ("again", 2, 1)
            await message.ack()


@pytest.mark.asyncio
async def test_a_client_is_woken_and_answers_a_request(server: RedisServer, client: Client) -> None:
    def answer() -> None:
        with client.listen() as channel:
            channel.ssubscribe(f"bk:{{quotes}}:c:{client.process}")
            assert channel.get_message(timeout=10) is not None  # it is confirmed
            session = Session(client, "bk:{quotes}")
            assert session.take(1, wait=True) == []
            ready.set_result(None)
            wake = channel.get_message(timeout=10)
            assert wake is not None
            [taken] = session.woken(wake["data"])
            headers = dict(taken.record.headers)
            reply = Wired("r1", b"2.5", headers["bk-inbox"], [JSON, ("bk-correlation", headers["bk-correlation"])])
            to = ("bk:{bk}..reply", "t", "partitions=1 retention=3600", topic_blob(reply))
            assert session.outcome(taken, to) == [1, 1]

    async with connect(server.url()) as broker:
        await broker.declare(QUOTES)
        loop = asyncio.get_running_loop()
        waits: asyncio.Future[None] = loop.create_future()
        ready = Handed(loop, waits)
        answering = asyncio.ensure_future(asyncio.to_thread(answer))
        await asyncio.wait({waits, answering}, return_when=asyncio.FIRST_COMPLETED)
        assert await broker.request(QUOTES, Order("o1", 2.0), timeout=10) == 2.5
        await answering


class Handed:
    """Sets a future from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
        self._loop, self._future = loop, future

    def set_result(self, value: None) -> None:
        self._loop.call_soon_threadsafe(self._future.set_result, value)


@pytest.mark.asyncio
async def test_a_client_and_brokerkit_share_a_group(server: RedisServer, client: Client) -> None:
    """Brokerkit goes on where the client has stopped, and the other way round; nothing is lost or comes twice."""
    async with connect(server.url()) as broker:
        ids = [(await broker.publish(ORDERS, Order(f"o{n}", 1.0), key=f"k{n % 7}")).id for n in range(40)]
        member = Member(client, "bk:{orders}", "billing")
        assert sorted(member.parts) == [0, 1, 2, 3]
        seen = [record.id for _, _, record in member.read(15)]
        assert member.commit() == [b"done"]
        async with broker.subscribe(ORDERS, group="billing") as messages:
            assert member.sync() == 2, "the other one waits for its share"
            member.sync(*list(member.parts.values())[:2])
            assert len(member.parts) == 2
            member.leave()
            assert member.commit() == [b"done"], "what one does not own is not stored"
            while len(seen) < 30:
                batch = await messages.receive(limit=30 - len(seen), timeout=10)
                for message in batch:
                    await message.ack()
                seen += [message.id for message in batch]
        member = Member(client, "bk:{orders}", "billing")
        seen += [record.id for _, _, record in member.read(100)]
        assert sorted(seen) == sorted(ids)


@pytest.mark.asyncio
async def test_a_client_reads_what_brokerkit_has_noted(server: RedisServer, client: Client) -> None:
    async with connect(server.url()) as broker:
        for n in range(6):
            await broker.publish(LINE, Order(f"o{n}", 1.0))
        async with broker.subscribe(LINE, group="g") as messages:
            taken = await messages.receive(limit=6, timeout=10)
            assert len(taken) == 6
            for place in (1, 3):
                await taken[place].ack()
        member = Member(client, "bk:{line}", "g")
        id, _, note = member.parts[0].position.partition(" ")
        found = read_note(int(id.rpartition("-")[2]), note)
        assert (found.high, found.done, found.waiting) == (6, {1, 3}, {0, 2, 4, 5})


@pytest.mark.asyncio
async def test_a_member_that_was_replaced_stores_nothing(server: RedisServer, client: Client) -> None:
    async with connect(server.url()) as broker:
        await broker.publish(LINE, Order("o1", 1.0))
        late, next_ = Member(client, "bk:{line}", "g", session=0), Member(client, "bk:{line}", "g")
        assert list(next_.parts) == [0]
        assert late.commit() == [b"done", 0]
        assert [
            row[1]
            for row in client.call(
                "topic_read", ["bk:{line}"], "g", late.name, 0, 9, 0, late.parts[0].epoch, 0, "0-0", 9, "", ""
            )
        ] == [b"lost"]


@pytest.mark.asyncio
async def test_a_client_replays_without_a_group(server: RedisServer, client: Client) -> None:
    async with connect(server.url()) as broker:
        receipts = [await broker.publish(LINE, Order(f"o{n}", 1.0)) for n in range(3)]
        assert receipts[1].position is not None
        place = receipts[1].position.partition("@")[2]
        ok, ends, [start] = client.call("topic_start", ["bk:{line}"], "", "", "position", 0, place)
        assert (ok, ends, start.decode()) == (b"ok", [3], place)
        [row] = client.call("topic_read", ["bk:{line}"], "", "", 0, 10, 0, 0, 1, place, 10, "", "")
        assert [unpack(frame).id for frame in row[6::2]] == [receipt.id for receipt in receipts[1:]]
        assert await server.command("EXISTS", "bk:{line}:gs", "bk:{line}:g:", "bk:{line}:m:") == 0, (
            "it leaves nothing behind"
        )


@pytest.mark.asyncio
async def test_what_is_on_a_server_is_on_the_page(server: RedisServer, client: Client) -> None:
    once = Queue("once", Order, dedup=60)
    async with connect(server.url()) as broker:
        await broker.publish(once, Order("o1", 1.0), id="o1")
        await broker.publish(EMAILS, Order("later", 1.0), delay=60)
        for id in ("redriven", "dead", "held"):
            await broker.publish(EMAILS, Order(id, 1.0), id=id)
        idle, session = Session(client, "bk:{once}"), Session(client, "bk:{emails}")
        [taken] = idle.take(1)
        idle.settle(taken)
        assert idle.take(1, wait=True) == []
        for taken in session.take(10)[:2]:
            session.outcome(taken, ("bk:{emails}..dead", "d", "seq=0", pack(taken.record)))
        await broker.redrive(EMAILS.dead_letters, limit=1)
        client.call("topic_start", ["bk:{bk}..reply"], "partitions=1 retention=3600", "", "latest")
        await broker.publish(LINE, Order("o1", 1.0))
        member = Member(client, "bk:{line}", "g")
        member.read(1)
        member.commit()
        async with broker.subscribe(LINE, group="g"):  # its members read the queue of what was redriven, too
            seen = [await described(server, key.decode()) for key in await server.command("KEYS", "*")]
        assert set(seen) == {key.strip("`") for _, key, *_ in rows("kind", "key")} - {
            "E:x",
            "E:y",
            "E:g",
            "E:z:<member>",
        }, "all but those of suspects, one that lasts for a moment, and what is left of joining in doubt"


async def described(server: RedisServer, key: str) -> str:
    """Return the place on the page of a key on *server*, whose type and fields are as they are told there."""
    type_ = (await server.command("TYPE", key)).decode().replace("zset", "sorted set")
    rows_ = [row for row in rows("kind", "key") if row[2] == type_ and pattern(row[1]).fullmatch(key)]
    places = {row[1].strip("`") for row in rows_}
    assert len(places) == 1, (key, type_, places)
    [place] = places
    if type_ == "hash":
        kind = (await server.command("HGET", key, "kind") or b"").decode()
        told = " ".join(row[3] for row in rows_ if "`kind`" not in row[3] or f"`kind` = `{kind}`" in row[3])
        fields = [re.compile(f"{name}{FILLED[hole]}") for name, hole in re.findall(r"`([a-z@:]+)(<\w+>|)`", told)]
        for field in await server.command("HKEYS", key):
            assert len(field) == 6 if "first 6 bytes" in told else any(f.fullmatch(field.decode()) for f in fields), (
                field
            )
    return place


FILLED = {
    "": "",
    "<n>": r"\d+",
    "<p>": r"\d+",
    "<session>": r"[0-9a-f]{16,}/\w+",
    "<group>": "[a-z]+",
    "<member>": "[0-9a-f]{16,}",
    "<producer>": "[0-9a-f]{16,}",
    "<call>": "[0-9a-f]{16,}",
    "<process>": "[0-9a-f]{16,}",
}


def pattern(key: str) -> re.Pattern[str]:
    """Return what keys look like that the page writes as *key*."""
    text = re.escape(key.strip("`")).replace("bk:\\{base\\}", "@")
    text = re.sub("^E", r"@[^:]*", text).replace("@", r"bk:\{[^{}:]+\}")
    return re.compile(re.sub(r"<\w+>", lambda hole: FILLED[hole[0]], text))


@pytest.mark.asyncio
async def test_a_client_declares(server: RedisServer, client: Client) -> None:
    client.call("admin_declare", ["bk:{emails}", "bk:{emails}..dead"], "q", "priorities=2 dedup=0 lease=60")
    client.call("admin_declare", ["bk:{orders}"], "t", "partitions=4 retention=604800")
    async with connect(server.url(), declare="check") as broker:
        for address in (EMAILS, ORDERS):
            await broker.publish(address, Order("o1", 1.0))
