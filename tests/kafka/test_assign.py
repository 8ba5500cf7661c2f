"""Sharing out the partitions of a group: what must hold for any claims, and what comes of it round by round."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from kio.schema.consumer_protocol_assignment.v1.data import ConsumerProtocolAssignment
from kio.schema.consumer_protocol_subscription.v1.data import ConsumerProtocolSubscription
from kio.serial import entity_reader

from brokerkit.drivers.kafka._assign import (
    Claim,
    Share,
    read_claim,
    read_share,
    share_out,
    write_claim,
    write_share,
)

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Time says nothing on a busy machine."""
NUMBERS = st.frozensets(st.integers(0, 40), max_size=20)
GENERATIONS = st.integers(-1, 2**31 - 1)


@st.composite
def claims(draw: st.DrawFn) -> Claim:
    held = draw(NUMBERS)
    leaving = draw(st.frozensets(st.sampled_from(sorted(held)))) if held else frozenset[int]()
    return Claim(held, leaving, draw(st.integers(-1, 5)), draw(st.integers(0, 50)))


GROUPS = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), claims(), min_size=1, max_size=8)


def consistent(count: int, members: int, seed: int) -> dict[str, Claim]:
    """Return claims of which no two are about the same partition."""
    chance = random.Random(seed)
    held: dict[str, set[int]] = {f"m{number}": set() for number in range(members)}
    for partition in range(count):
        if chance.random() < 0.8:
            held[chance.choice(list(held))].add(partition)
    return {name: Claim(frozenset(mine), frozenset(), 3, count) for name, mine in held.items()}


# ---------------------------------------------------------------------- what travels


@patient
@given(NUMBERS, NUMBERS, GENERATIONS, st.integers(0, 2**31 - 1))
def test_a_claim_survives_its_way(held: frozenset[int], leaving: frozenset[int], generation: int, count: int) -> None:
    claim = Claim(held | leaving, leaving, generation, count)
    assert read_claim(write_claim("orders", claim), "orders") == claim
    assert read_claim(write_claim("orders", claim), "others") is None


@patient
@given(NUMBERS, st.booleans())
def test_a_share_survives_its_way(partitions: frozenset[int], moving: bool) -> None:
    share = Share(partitions, moving)
    assert read_share(write_share("orders", share), "orders") == share
    assert not read_share(write_share("orders", share), "others").partitions


@patient
@given(st.binary(max_size=200))
def test_what_nobody_of_ours_has_written_claims_nothing(data: bytes) -> None:
    assert read_claim(data, "orders") is None
    assert read_share(data, "orders").partitions == frozenset()


@patient
@given(st.data(), claims())
def test_a_damaged_claim_breaks_nothing(data: st.DataObject, claim: Claim) -> None:
    whole = write_claim("orders", claim)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert read_claim(cut, "orders") is None
    place = data.draw(st.integers(0, len(whole) - 1))
    read_claim(whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :], "orders")


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\x7f\xff\xff\xff",
        b"\0\1\x7f\xff\xff\xff" + bytes(100),
        b"\0\1\0\0\0\1\x7f\xffa",
        b"\0\1\0\0\0\1\0\1t\x7f\xff\xff\xffbk1 1 1 ",
        b"\0\1\0\0\0\1\0\1t\0\0\0\x08bk1 1 1 \x7f\xff\xff\xff",
        b"\0\1\0\0\0\1\0\1t\0\0\0\x08bk1 1 1 \0\0\0\1\0\1t\x7f\xff\xff\xff",
        b"\0\1\0\0\0\1\0\1t\0\0\x13\x90bk1 1 1 " + b"1" * 5000 + b"\0\0\0\0",
        b"\0\1\0\0\0\1\xff\xff\xff\xff\xff\xff",
    ],
)
def test_lengths_that_lie_are_not_believed(data: bytes) -> None:
    """Any client that may read the group can write them, and the leader reads them."""
    tracemalloc.start()
    try:
        assert read_claim(data, "t") is None
        assert read_share(data, "t") == Share()
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@patient
@given(claims(), st.booleans())
def test_kafkas_own_schemas_read_it_too(claim: Claim, moving: bool) -> None:
    told = entity_reader(ConsumerProtocolSubscription)(write_claim("orders", claim), 2)[0]
    assert [str(topic) for topic in told.topics] == ["orders"]
    assert {int(number) for owned in told.owned_partitions for number in owned.partitions} == claim.held
    shared = entity_reader(ConsumerProtocolAssignment)(write_share("orders", Share(claim.held, moving)), 2)[0]
    assert {int(number) for mine in shared.assigned_partitions for number in mine.partitions} == claim.held


def test_the_bytes_are_those_of_the_consumer_protocol() -> None:
    """Version, topics, user data and owned partitions; version, partitions by topic and user data: as Kafka's tools read."""
    claim = write_claim("t", Claim(frozenset({2, 1}), frozenset({1}), 7, 4))
    data = b"bk1 7 4 1"
    assert claim == (
        b"\0\1" + b"\0\0\0\1\0\1t" + len(data).to_bytes(4, "big") + data + b"\0\0\0\1\0\1t\0\0\0\2\0\0\0\1\0\0\0\2"
    )
    assert write_share("t", Share(frozenset({5}))) == b"\0\1" + b"\0\0\0\1\0\1t\0\0\0\1\0\0\0\5" + b"\xff\xff\xff\xff"


# ---------------------------------------------------------------------- one round


@patient
@given(st.integers(0, 40), GROUPS)
def test_any_claims_lead_to_shares_that_overlap_with_nobody(count: int, members: Mapping[str, Claim]) -> None:
    shares = share_out(count, members)
    given = [partition for share in shares.values() for partition in share.partitions]
    assert shares.keys() == members.keys()
    assert len(given) == len(set(given))
    assert set(given) <= set(range(count))
    most = -(-count // len(members))
    assert all(len(share.partitions) <= most for share in shares.values())


@patient
@given(st.integers(0, 40), GROUPS)
def test_nobody_gets_what_another_holds(count: int, members: Mapping[str, Claim]) -> None:
    for name, share in share_out(count, members).items():
        for partition in share.partitions - members[name].held:
            assert not any(partition in claim.held for claim in members.values())


@patient
@given(st.integers(0, 40), GROUPS)
def test_of_several_claims_the_latest_counts(count: int, members: Mapping[str, Claim]) -> None:
    for name, share in share_out(count, members).items():
        for partition in share.partitions & members[name].held:
            rivals = [claim.generation for claim in members.values() if partition in claim.held]
            assert members[name].generation == max(rivals)
        assert not share.partitions & members[name].leaving


@patient
@given(st.integers(0, 40), GROUPS, st.randoms())
def test_the_order_of_the_members_changes_nothing(
    count: int, members: Mapping[str, Claim], chance: random.Random
) -> None:
    names = list(members)
    chance.shuffle(names)
    assert share_out(count, members) == share_out(count, {name: members[name] for name in names})


@patient
@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 2**32))
def test_all_is_shared_out_but_what_moves(count: int, members: int, seed: int) -> None:
    group = consistent(count, members, seed)
    shares = share_out(count, group)
    given = {partition for share in shares.values() for partition in share.partitions}
    for partition in set(range(count)) - given:
        assert any(partition in claim.held for claim in group.values())
    assert all(share.moving == (len(given) < count) for share in shares.values())


@patient
@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 2**32))
def test_no_more_moves_than_balance_needs(count: int, members: int, seed: int) -> None:
    group = consistent(count, members, seed)
    shares = share_out(count, group)
    moves = sum(len(claim.held - shares[name].partitions) for name, claim in group.items())
    least, more = divmod(count, members)
    sizes = sorted((len(claim.held) for claim in group.values()), reverse=True)
    assert moves == sum(max(0, size - least - (place < more)) for place, size in enumerate(sizes))


def test_a_balanced_group_stays_as_it_is() -> None:
    group = {"a": Claim(frozenset({0, 5}), frozenset(), 3, 5), "b": Claim(frozenset({1, 3, 4}), frozenset(), 3, 5)}
    shares = share_out(5, {**group, "b": Claim(frozenset({1, 3, 4}), frozenset(), 3, 5)})
    assert shares["b"] == Share(frozenset({1, 3, 4}))
    assert shares["a"] == Share(frozenset({0, 2}))  # 5 is none of five


def test_who_does_not_read_the_topic_gets_nothing() -> None:
    shares = share_out(3, {"a": Claim(), "b": None})
    assert shares == {"a": Share(frozenset({0, 1, 2})), "b": Share()}
    assert share_out(3, {"b": None}) == {"b": Share()}
    assert share_out(3, {}) == {}


# ---------------------------------------------------------------------- round by round


class Rounds(RuleBasedStateMachine):
    """Members come, go and die at any time; each lets go what it is told to when it likes, and may miss a round's end."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 7
        self.generation = 0
        self.number = 0
        self.held: dict[str, set[int]] = {}
        self.leaving: dict[str, set[int]] = {}
        self.synced: dict[str, int] = {}

    @rule()
    def join(self) -> None:
        self.number += 1
        name = f"m{self.number * 7 % 10}{self.number}"
        self.held[name], self.leaving[name], self.synced[name] = set(), set(), -1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[name], self.leaving[name], self.synced[name]

    @rule(more=st.integers(1, 3))
    def grow(self, more: int) -> None:
        self.count = min(self.count + more, 30)

    @precondition(lambda self: any(self.leaving.values()))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, left in self.leaving.items() if left)))
        partition = data.draw(st.sampled_from(sorted(self.leaving[name])))
        self.leaving[name].discard(partition)
        self.held[name].discard(partition)

    def claims(self) -> dict[str, Claim]:
        return {
            name: Claim(frozenset(held), frozenset(self.leaving[name]), self.synced[name], self.count)
            for name, held in self.held.items()
        }

    def round(self, missing: set[str]) -> None:
        self.generation += 1
        for name, share in share_out(self.count, self.claims()).items():
            if name not in missing:
                self.leaving[name] |= self.held[name] - share.partitions
                self.held[name] |= share.partitions
                self.synced[name] = self.generation

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        self.round(data.draw(st.sets(st.sampled_from(sorted(self.held)), max_size=2)))

    @invariant()
    def nobody_holds_what_another_does(self) -> None:
        held = [partition for mine in self.held.values() for partition in mine]
        assert len(held) == len(set(held))

    def teardown(self) -> None:
        """Left alone, the group is balanced after few rounds, and stays so."""
        if not self.held:
            return
        for _ in range(3):
            self.round(set())
            for name, leaving in self.leaving.items():
                self.held[name] -= leaving
                leaving.clear()
        sizes = [len(held) for held in self.held.values()]
        assert sum(sizes) == self.count
        assert max(sizes) - min(sizes) <= 1
        before = {name: set(held) for name, held in self.held.items()}
        self.round(set())
        assert self.held == before
        assert not any(self.leaving.values())


def test_a_group_is_never_torn_and_comes_to_rest() -> None:
    run_state_machine_as_test(Rounds, settings=settings(patient, max_examples=100, stateful_step_count=40))


@pytest.mark.parametrize("seed", range(5))
def test_many_partitions_and_members_are_quickly_shared_out(seed: int) -> None:
    group = consistent(5000, 100, seed)
    shares = share_out(5000, group)
    assert {len(share.partitions) for share in shares.values()} <= set(range(51))
