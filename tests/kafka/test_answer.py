"""What a broker answers to a fetch, taken apart: what is handed out, what is jumped, and what is damaged."""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from brokerkit.drivers.kafka._answer import records, split
from brokerkit.drivers.kafka._part import Part
from brokerkit.drivers.kafka._tolerant import decoded
from brokerkit.errors import BrokerError, ConfigError

from .logs import LENGTH, TIME, Abort, batch, empty, offsets_of, old, sealed, spoilt

PLACE = "orders[3]"


def part(offset: int, *data: bytes, aborted: Any = None) -> Part:
    """Return a partition that has got *data* in one answer."""
    made = Part("orders", 3, offset)
    made.keep(b"".join(data), aborted)
    return made


def all_of(got: Part, most: int = 1000) -> list[int]:
    return offsets_of(got.take(most))


def test_what_comes_is_handed_out_in_order_and_by_as_many_as_are_wanted() -> None:
    for most in (1, 2, 3, 4, 7, 100):
        got = part(0, batch(*range(5)), batch(5, 6), batch(*range(7, 20)))
        assert (got.fetch, got.next, got.ready) == (20, 0, True)
        seen: list[int] = []
        while got.ready:
            some = all_of(got, most)
            assert 1 <= len(some) <= most
            seen += some
            assert got.next == seen[-1] + 1
        assert seen == list(range(20))
        assert (got.at_hand, all_of(got, most), got.next) == (0, [], 20)


def test_what_is_at_hand_is_counted_in_bytes() -> None:
    first, second = batch(0, 1, 2), batch(3)
    got = part(0, first, second)
    assert got.at_hand == len(first) + len(second)
    got.take(2)
    assert got.at_hand == len(first) + len(second)
    got.take(1)
    assert got.at_hand == len(second)
    got.take(1)
    assert got.at_hand == 0


@pytest.mark.parametrize("offset", range(11))
def test_what_lies_before_the_offset_is_cut(offset: int) -> None:
    got = part(offset, batch(*range(5)), batch(*range(5, 8)), batch(8, 9))
    assert all_of(got) == list(range(offset, 10))
    assert got.next == max(offset, 10)


def test_records_that_compaction_removed_are_jumped() -> None:
    got = part(0, batch(2, 5, last=7), empty(8, 11), batch(14, last=20), empty(21, 22, epoch=4))
    assert (got.fetch, got.epoch) == (23, 4)
    assert all_of(got, 1) == [2]
    assert got.next == 3
    assert all_of(got, 1) == [5]
    assert got.next == 12, "the last record of a batch is taken: what follows it is jumped at once"
    assert all_of(got) == [14]
    assert got.next == 23


def test_an_offset_that_compaction_removed_is_jumped() -> None:
    got = part(6, batch(2, 5, last=7))
    assert (got.ready, got.next, got.fetch) == (False, 8, 8)
    got.keep(empty(8, 9), None)
    assert (got.ready, got.next) == (False, 10)
    got.keep(batch(10), None)
    assert all_of(got) == [10]


def test_markers_and_aborted_transactions_are_jumped() -> None:
    log = (
        batch(0, 1, producer=7),  # aborted
        batch(2),
        batch(3, producer=8),  # committed
        batch(4, producer=7),  # of the same transaction as the first
        batch(5, producer=7, control=True),
        batch(6, producer=8, control=True),
        batch(7, producer=7),  # a later one of the same producer, committed
        batch(8, producer=7, control=True),
        batch(9, producer=7),  # aborted again
        batch(10, producer=7, control=True),
    )
    aborted = [Abort(7, 9), Abort(7, 0)]
    got = part(0, *log, aborted=aborted)
    assert got.next == 2
    assert all_of(got, 1) == [2]
    assert all_of(got, 1) == [3]
    assert got.next == 7
    assert all_of(got) == [7]
    assert (got.next, got.fetch) == (11, 11)
    assert all_of(part(0, *log)) == [0, 1, 2, 3, 4, 7, 9], "without a list nothing was aborted"
    assert all_of(part(1, *log, aborted=aborted)) == [2, 3, 7], "a transaction that began before what is read"


def test_markers_move_the_place_though_nothing_is_handed_out() -> None:
    got = part(0, batch(0, producer=7), batch(1, producer=7, control=True), aborted=[Abort(7, 0)])
    assert (got.ready, got.next, got.fetch) == (False, 2, 2)
    got.keep(batch(2, 3), None)
    got.keep(batch(4, producer=7, control=True), None)
    assert all_of(got) == [2, 3]
    assert got.next == 5
    got.keep(batch(5, 6), None)
    got.take(1)
    got.keep(batch(7, producer=7, control=True), None)
    assert all_of(got) == [6]
    assert got.next == 8


def test_a_batch_that_is_cut_off_is_left_for_the_next_answer() -> None:
    whole = batch(0, 1)
    for size in (1, 11, 30, 70, len(whole) - 1):
        got = part(0, whole, batch(2, 3)[:size])
        assert got.fetch == 2, size
        assert all_of(got) == [0, 1]
        assert got.broken is None


def test_an_answer_may_be_empty() -> None:
    for data in (b"", None):
        got = Part("orders", 3, 5)
        got.keep(data, None)
        assert (got.ready, got.next, got.fetch, got.broken, got.take(1)) == (False, 5, 5, None, [])


def test_the_epoch_is_the_last_ones() -> None:
    got = part(0, batch(0, epoch=3), batch(1, epoch=5))
    assert got.epoch == 5
    got.keep(b"", None)
    assert got.epoch == 5
    got.go(1)
    assert (got.epoch, got.next, got.fetch, got.ready, got.at_hand) == (-1, 1, 1, False, 0)


# ---------------------------------------------------------------------- damage


def test_a_wrong_checksum_is_noticed_after_what_comes_before_it() -> None:
    got = part(0, batch(0, 1), spoilt(batch(2, 3)), batch(4))
    assert all_of(got) == [0, 1]
    assert isinstance(got.broken, BrokerError)
    assert str(got.broken) == "orders[3] is damaged at offset 2: its checksum is wrong"
    assert (got.next, got.ready, got.at_hand, got.take(9)) == (2, False, 0, [])


def test_a_wrong_checksum_of_a_batch_that_is_cut_is_noticed_at_once() -> None:
    got = part(1, spoilt(batch(0, 1)))
    assert "orders[3] is damaged at offset 0" in str(got.broken)


@pytest.mark.parametrize("length", [-1, 0, 1, 40, 2**31 - 1])
def test_a_length_that_makes_no_sense_is_damage(length: int) -> None:
    data = bytearray(batch(7, 8))
    struct.pack_into(">i", data, LENGTH, length)
    got = part(7, bytes(data), batch(9))
    assert "orders[3] is damaged at offset 7" in str(got.broken)


def test_a_batch_with_fewer_or_more_records_than_it_says_is_damaged() -> None:
    fewer = part(0, batch(0, 1, 2, count=5))
    assert fewer.take(100) == []
    assert "orders[3] is damaged at offset 0" in str(fewer.broken)
    assert part(1, batch(0, 1, 2, count=5)).broken is not None


def test_no_byte_of_a_batch_can_be_changed_unnoticed() -> None:
    """What the checksum does not cover are place, length, leader's epoch and format: these cannot lead to other records."""
    good = batch(*range(10, 20))
    for at in range(16, len(good)):
        got = part(10, spoilt(good, at))
        assert got.take(100) == [], at
        assert got.broken is not None, at


def test_what_claims_to_be_a_record_and_is_none_is_damage() -> None:
    data = bytearray(batch(0, 1))
    data[-3:] = b"\xff\xff\xff"
    got = part(0, sealed(data))
    assert got.take(5) == []
    assert "orders[3] is damaged at offset 0" in str(got.broken)


def test_a_codec_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch(0, 1, codec=4)
    monkeypatch.setitem(sys.modules, "cramjam", None)
    for offset in (0, 1):
        got = part(offset, data)
        got.take(1)
        assert isinstance(got.broken, ConfigError)
        assert "zstd" in str(got.broken)
        assert "pip install" in str(got.broken)


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_all_codecs_are_read(number: int) -> None:
    got = part(3, batch(*range(8), codec=number), batch(8, 9, codec=number))
    assert all_of(got) == list(range(3, 10))


@pytest.mark.parametrize("form", [0, 1])
def test_the_formats_of_before_kafka_0_11_are_read(form: int) -> None:
    got = part(1, old(0, 1, 2, form=form), old(3, 4, 6, form=form, codec=1), batch(7, 8))
    assert got.fetch == 7, "what follows in another format is left for the next answer"
    taken = got.take(10)
    assert offsets_of(taken) == [1, 2, 3, 4, 6]
    assert [record.timestamp for record in taken] == [TIME + n if form else -1 for n in (1, 2, 3, 4, 6)]
    assert all(record.headers == [] for record in taken)
    assert got.next == 7
    assert all_of(part(4, old(3, 4, 6, form=form, codec=1))) == [4, 6]
    assert part(0, spoilt(old(0, form=form))).broken is not None
    assert part(0, old(0, form=form)[:20]).broken is not None


def test_an_answer_can_be_read_at_once() -> None:
    data = b"".join([batch(0, 1, 2), batch(3, producer=7, control=True), batch(4, 5)])
    answer = split(data, 1, None, PLACE)
    assert offsets_of(records(answer, PLACE)) == [1, 2, 4, 5]
    assert answer.next == 6
    with pytest.raises(BrokerError, match=r"orders\[3\] is damaged at offset 0"):
        records(split(spoilt(batch(0)), 0, None, PLACE), PLACE)


def test_batches_know_where_the_log_goes_on() -> None:
    answer = split(b"".join([batch(0, last=3), empty(4, 8), batch(9, 10)]), 0, None, PLACE)
    assert [one.next for one in answer.batches] == [9, 11]
    assert all(one.next <= other.base for one, other in pairwise(answer.batches))


def test_a_format_of_later_is_not_guessed_at() -> None:
    data = bytearray(batch(0, 1))
    data[16] = 3
    assert "nobody knows its format, 3" in str(part(0, bytes(data)).broken)


# ---------------------------------------------------------------------- what somebody has made up


def made_up(change: Callable[[bytearray], None], *offsets: int, codec: int = 0, time: int | None = None) -> bytes:
    """Return a batch with a right checksum that no client of good will writes."""
    data = bytearray(batch(*offsets))
    change(data)
    if time is not None:
        data[22] |= 8
        struct.pack_into(">q", data, 35, time)
    if codec:
        head, body = data[:61], gzip.compress(bytes(data[61:]))
        head[22] |= codec
        data = head + body
        struct.pack_into(">i", data, LENGTH, len(data) - 12)
    return sealed(data)


def no_text(data: bytearray) -> None:
    """Make the name of the last record's header something that is no text."""
    data[data.rindex(b"\2h\2") + 1] = 0xE9


def attributes(data: bytearray) -> None:
    """Set a bit in a byte of the first record that means nothing."""
    data[62] = 0x80


@pytest.mark.parametrize("change", [no_text, attributes])
@pytest.mark.parametrize("codec", [0, 1])
def test_a_record_that_the_decoder_refuses_stops_nobody(change: Callable[[bytearray], None], codec: int) -> None:
    data = made_up(change, *range(10), codec=codec)
    for most in (1, 3, 100):
        for offset in (0, 4, 9):
            got = part(offset, data, batch(10, 11))
            seen: list[Any] = []
            while some := got.take(most):
                seen += some
            assert offsets_of(seen) == list(range(offset, 12))
            assert (got.broken, got.next, got.at_hand) == (None, 12, 0)
    (*others, last) = records(split(data, 0, None, PLACE), PLACE)
    assert last.headers == [("\\xe9" if change is no_text else "h", b"1")]
    assert [(record.timestamp, record.headers) for record in others] == [(TIME + n, [("h", b"1")]) for n in range(9)]


def test_a_record_that_the_decoder_refuses_has_the_brokers_time() -> None:
    taken = part(0, made_up(no_text, 0, 1, 2, time=77)).take(9)
    assert [record.timestamp for record in taken] == [77, 77, 77]


def test_what_is_written_by_hand_is_read_like_what_is_not() -> None:
    data = batch(*range(300))
    assert repr(part(0, data).take(1)).startswith("[DefaultRecord(offset=0, timestamp=")
    assert [repr(record) for record in decoded(memoryview(data))] == [repr(one) for one in part(0, data).take(300)]


def test_no_damage_leads_the_second_decoder_astray() -> None:
    good = batch(*range(5))
    for at in range(61, len(good)):
        for mask in (0x01, 0x40, 0x80, 0xFF):
            data = bytearray(good)
            data[at] ^= mask
            got = part(0, sealed(data))
            while got.take(2):
                pass
            assert got.next == 5 or got.broken is not None
    for end in range(61, len(good)):
        with pytest.raises(ValueError, match="record"):
            decoded(memoryview(good)[:end])
