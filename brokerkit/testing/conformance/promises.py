"""The promise table: each row names the tests that prove it, and a column is written from a run of them.

``BROKERKIT_RESULTS=results.jsonl pytest tests/conformance`` notes what passed; then

``python -m brokerkit.testing.conformance.promises results.jsonl README.md`` writes the table between the markers, and with
``--check`` fails if that would change the file.  A cell whose tests did not all run and pass is an error: nothing in the
table is typed in.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from . import _runner
from ._harness import Kind

BEGIN = "<!-- promises: begin -->"
END = "<!-- promises: end -->"
NOT_APPLICABLE = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column of the table: harnesses, all of which prove it, and the kinds of address that it stands for."""

    title: str
    harnesses: tuple[str, ...]
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Promise:
    """A row: what is promised, by which tests, and in which words for each column.

    With *capability* (``"queue.ttl"``) a column that does not claim it gets a dash, which the tests of `capabilities` prove.
    """

    title: str
    tests: tuple[str, ...]
    words: Mapping[str, str]
    capability: str = ""


COLUMNS = (
    Column("memory", ("memory",), ("topic", "queue")),
    Column("Redis 7", ("redis 7",), ("topic", "queue")),
    Column("Valkey 9", ("valkey 9",), ("topic", "queue")),
    Column("Kafka topic", ("kafka 4.3", "kafka 3.9"), ("topic",)),
    Column("Kafka queue (share)", ("kafka 4.3",), ("queue",)),
    Column("Kafka queue (classic)", ("kafka 3.9",), ("queue",)),
)


def _words(memory: str, redis: str = "", kafka: str = "", share: str = "", classic: str = "") -> Mapping[str, str]:
    """Return what each column says, where it is not what the one before it says.

    *redis* and *kafka* are for all servers of their kind, *share* and *classic* for queues by the kind of their group.
    """
    redis, kafka = redis or memory, kafka or memory
    return {
        "memory": memory,
        "Redis 7": redis,
        "Valkey 9": redis,
        "Kafka topic": kafka,
        "Kafka queue (share)": share or kafka,
        "Kafka queue (classic)": classic or kafka,
    }


PROMISES = (
    Promise(
        "`publish` returned",
        (
            "Publishing.test_a_receipt_means_that_the_message_is_stored",
            "Publishing.test_a_message_that_certainly_failed_is_never_delivered",
            "Publishing.test_a_hundred_publishers_at_once_mix_nothing_up",
        ),
        _words("in process", "stored, as durable as asked for", "stored by all replicas in sync"),
    ),
    Promise(
        "reply lost",
        (
            "Publishing.test_a_lost_reply_is_reported_and_never_stored_twice",
            "DriverPublish.test_a_lost_answer_is_publish_unknown_or_recognised",
        ),
        _words(
            NOT_APPLICABLE,
            "sent again under (producer, sequence), stored once; `PublishUnknown` at the deadline",
            "sent again under (producer, sequence), stored once; `PublishUnknown` at the deadline",
        ),
    ),
    Promise(
        "delivery, per group or queue",
        (
            "Groups.test_two_groups_both_get_everything",
            "Groups.test_members_share_without_loss_and_without_repeats",
            "Groups.test_members_that_come_and_go_lose_nothing",
            "Groups.test_what_a_group_has_done_survives_a_restart",
            "Groups.test_a_latest_group_whose_first_member_dies_loses_nothing",
            "Leases.test_what_a_killed_consumer_held_comes_to_another",
            "Subscribing.test_publishing_needs_no_subscriber",
        ),
        _words("at least once"),
    ),
    Promise(
        "after `ack(confirm=True)`",
        (
            "Acknowledging.test_a_confirmed_acknowledgement_outlives_the_process",
            "Acknowledging.test_a_confirmed_acknowledgement_is_not_promised_without_a_connection",
            "Acknowledging.test_acknowledging_out_of_order_commits_nothing_early",
        ),
        _words("never again", "never, if the durability held", "never"),
    ),
    Promise(
        "after `ack()`",
        (
            "Acknowledging.test_an_acknowledged_message_never_comes_again",
            "Acknowledging.test_a_plain_acknowledgement_is_stored_within_a_second",
        ),
        _words(
            "never",
            "topics: at most 1 s of acks; queues: never while the server lives",
            "at most 1 s of acks",
            share="acks in flight",
        ),
    ),
    Promise(
        "stale settle",
        (
            "Acknowledging.test_a_stale_acknowledgement_has_no_effect",
            "Acknowledging.test_a_late_acknowledgement_counts_or_says_so",
            "Zombies.test_an_acknowledgement_after_release_has_no_effect",
            "Zombies.test_an_acknowledgement_after_a_retry_has_no_effect",
            "Zombies.test_an_acknowledgement_after_a_redrive_has_no_effect",
            "Zombies.test_a_stale_retry_or_dead_letter_is_not_stored",
            "Leases.test_a_lost_lease_is_not_renewed_back",
        ),
        _words(
            "no effect",
            "topics: fenced by epoch; queues: by lease number",
            "fenced by the generation of the group",
            share="no effect; a copy may remain, same id",
        ),
    ),
    Promise(
        "order per key (topics)",
        (
            "Publishing.test_messages_of_a_key_are_stored_in_the_order_of_publishing",
            "Publishing.test_the_order_of_a_key_holds_across_a_disconnect",
            "Ordering.test_one_consumer_gets_each_key_in_order",
            "Ordering.test_concurrent_handlers_keep_the_order_of_each_key",
            "Ordering.test_many_members_keep_the_order_of_each_key",
            "Ordering.test_a_failed_message_holds_its_own_key_only",
            "Ordering.test_retries_and_dead_letters_keep_the_order_of_their_key",
            "Ordering.test_the_order_holds_when_a_member_dies",
            "Ordering.test_the_order_holds_when_members_come_and_go",
            "Ordering.test_the_order_holds_across_a_restart",
            "Ordering.test_the_order_holds_across_a_disconnect",
            "Ordering.test_each_producer_keeps_its_order_under_a_shared_key",
        ),
        _words("yes"),
        capability="topic.key_order",
    ),
    Promise(
        "more consumers than partitions",
        (
            "Groups.test_every_consumer_gets_a_share",
            "Groups.test_more_members_than_partitions_lose_nothing",
            "Capabilities.test_more_consumers_than_can_take_part_are_refused",
        ),
        _words(NOT_APPLICABLE, "topics: no; queues: yes", "no", share="yes", classic="no: refused"),
    ),
    Promise(
        "lease renewed under a running handler; crash → again",
        (
            "Leases.test_a_lease_is_renewed_while_its_owner_lives",
            "Leases.test_messages_that_wait_for_a_handler_keep_their_lease",
            "Leases.test_a_message_has_one_owner_at_a_time",
            "Leases.test_a_dead_owners_message_does_not_come_before_its_lease_ends",
            "Leases.test_what_a_killed_consumer_held_comes_to_another",
            "Leases.test_of_many_that_want_a_dead_owners_messages_each_goes_to_one",
        ),
        _words(
            "yes",
            kafka="yes, with the session",
            share="yes; while one is held, at most the lock window of later ones passes",
        ),
    ),
    Promise(
        "retry with delay, never early",
        (
            "Retrying.test_nack_with_a_delay_runs_again_no_earlier",
            "Retrying.test_the_waits_of_a_service_are_its_policys",
            "Retrying.test_each_of_many_retries_keeps_its_own_time",
            "Retrying.test_a_crash_during_a_retry_loses_nothing",
        ),
        _words(
            "yes",
            "topics: in place; queues: atomic",
            "in place",
            share="copy, then acceptance",
            classic="copy, then done",
        ),
    ),
    Promise(
        "delayed publish, never early (queues)",
        (
            "Delaying.test_a_delayed_message_is_never_early_and_soon_there",
            "Delaying.test_a_delay_survives_the_death_of_everybody",
            "Delaying.test_ten_thousand_messages_of_the_same_time_all_come",
            "Delaying.test_seconds_of_delay_do_not_depend_on_the_publishers_clock",
            "Delaying.test_a_delay_longer_than_the_lease_delivers_once",
        ),
        _words("yes"),
        capability="queue.delay",
    ),
    Promise(
        "dead letter, redrive",
        (
            "DeadLetters.test_after_the_last_attempt_there_is_one_letter_with_everything",
            "DeadLetters.test_what_cannot_be_stored_leaves_the_message_unsettled",
            "DeadLetters.test_a_dead_letter_waits_for_the_connection",
            "DeadLetters.test_a_crash_on_the_way_to_the_dead_letters_loses_nothing",
            "DeadLetters.test_a_redriven_message_starts_anew",
            "DeadLetters.test_redriving_one_group_shows_the_others_nothing",
            "DriverRedrive.test_concurrent_redrives_move_each_letter_once",
        ),
        _words("once", "once, atomic", "at least one copy, same id"),
    ),
    Promise(
        "failed attempts",
        (
            "Leases.test_the_number_of_attempts_survives_every_owner",
            "Retrying.test_the_number_of_attempts_counts_the_first",
            "Retrying.test_failed_attempts_survive_restarts_and_crashes",
            "Retrying.test_a_stop_is_no_failed_attempt",
        ),
        _words("exact"),
    ),
    Promise(
        "a crash counts one delivery for",
        (
            "Leases.test_the_number_of_deliveries_counts_crashes",
            "Poison.test_a_poison_message_is_dead_lettered_and_the_others_are_handled",
            "Poison.test_warm_restarts_never_dead_letter_what_has_not_run",
        ),
        _words("what the process held", share="what the process held; 1 again after a leader moved"),
    ),
    Promise(
        "priority (queues)",
        (
            "Options.test_publish_priority",
            "AddressOptions.test_address_priorities",
            "DriverPublish.test_higher_priorities_come_first",
        ),
        _words("yes"),
        capability="queue.priority",
    ),
    Promise(
        "ttl (queues)",
        (
            "Options.test_publish_ttl",
            "DriverPublish.test_a_record_must_not_come_after_its_time_to_live",
            "Expiring.test_an_expired_message_is_never_delivered",
            "Expiring.test_a_retry_keeps_the_expiry",
        ),
        _words("yes"),
        capability="queue.ttl",
    ),
    Promise(
        "dedup (queues)",
        (
            "AddressOptions.test_address_dedup",
            "Deduplicating.test_a_second_message_of_an_id_is_dropped_and_its_receipt_says_so",
            "Deduplicating.test_after_its_window_an_id_is_new",
            "Deduplicating.test_of_many_at_once_one_is_stored",
            "DriverPublish.test_a_second_record_of_an_id_is_dropped",
            "DeadLetters.test_dedup_does_not_swallow_retries_and_redrives",
        ),
        _words("yes"),
        capability="queue.dedup",
    ),
    Promise(
        "replay from earliest, latest, time, position (topics)",
        (
            "Subscribing.test_earliest_sees_history_and_latest_does_not",
            "Subscribing.test_subscribing_to_the_latest_is_a_barrier",
            "DriverBrowse.test_a_topic_is_browsed_from_a_start",
            "Replaying.test_a_topic_is_read_again_from_the_earliest",
            "Replaying.test_a_topic_is_read_again_from_a_time",
            "Replaying.test_a_topic_is_read_again_from_a_position",
            "Replaying.test_from_a_position_the_other_partitions_begin_at_its_time",
            "Replaying.test_a_replay_does_not_move_a_group",
            "Replaying.test_a_position_that_is_gone_is_reported",
            "DriverSeek.test_seek_moves_the_position_of_a_group",
        ),
        _words("yes"),
        capability="topic.replay",
    ),
    Promise("exactly once", (), _words("never promised: at least once + id; make handlers idempotent")),
)


class Stale(Exception):
    """The table cannot be written from these results, or the file does not show it."""


def read(results: Path) -> dict[str, dict[str, list[dict[str, object]]]]:
    """Return the lines of *results* by harness and test, the kind of address in brackets left out; the last of a test counts."""
    last: dict[tuple[object, ...], dict[str, object]] = {}
    for text in results.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        last[line["column"], line["test"], *line["kinds"], line["seed"]] = line
    found: dict[str, dict[str, list[dict[str, object]]]] = defaultdict(lambda: defaultdict(list))
    for line in last.values():
        found[str(line["column"])][str(line["test"])].append(line)
    return found


def cell(promise: Promise, column: Column, ran: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    """Return what *column* says about *promise*, or raise `Stale` if a harness's run does not prove it."""
    claims = {claim for lines in ran.values() for line in lines for claim in _texts(line["claims"])}
    if promise.capability and not (
        promise.capability in claims and promise.capability.partition(".")[0] in column.kinds
    ):
        return NOT_APPLICABLE
    for test in promise.tests:
        lines = [line for line in ran.get(test, ()) if set(_texts(line["kinds"])) & set(column.kinds)]
        if not lines:
            if not applies(test, column, claims):
                continue
            raise Stale(f"{promise.title!r} needs {test}, which did not run for {column.title}")
        failed = [line for line in lines if not line["ok"]]
        if failed:
            raise Stale(f"{promise.title!r} is not kept by {column.title}: {test} failed: {failed[0]['error']}")
    return promise.words[column.title]


def _has(column: Column, ran: Mapping[str, Sequence[Mapping[str, object]]]) -> bool:
    """Return whether a harness has run with a kind of address that *column* stands for."""
    return any(set(_texts(line["kinds"])) & set(column.kinds) for lines in ran.values() for line in lines)


def _proven(promise: Promise, column: Column, ran: Mapping[str, Mapping[str, Sequence[Mapping[str, object]]]]) -> str:
    """Return what all harnesses of *column* prove."""
    first, *others = (cell(promise, column, ran[harness]) for harness in column.harnesses)
    if any(other != first for other in others):
        raise Stale(f"{promise.title!r} is not the same for all of {column.harnesses}")
    return first


def applies(test: str, column: Column, claims: Collection[str]) -> bool:
    """Return whether a system of *column* that claims *claims* is asked *test* at all."""
    for need in _runner.needed(test):
        wanted, what = not need.startswith("not "), need.removeprefix("not ")
        if what in get_args(Kind):
            held = what in column.kinds
        else:
            held = ("." in what and what in claims) or any(f"{kind}.{what}" in claims for kind in column.kinds)
        if held != wanted and what != "bounded":
            return False
    return True


def _texts(value: object) -> Sequence[str]:
    return [str(item) for item in cast("list[Any]", value)]


def table(results: Path) -> str:
    """Return the table in Markdown, with a column for each system of which *results* has a run."""
    ran = read(results)
    columns = [column for column in COLUMNS if all(_has(column, ran.get(harness, {})) for harness in column.harnesses)]
    if not columns:
        raise Stale(f"{results} has no run of the conformance suite")
    for harness in dict.fromkeys(harness for column in columns for harness in column.harnesses):
        for test, lines in ran[harness].items():
            for line in lines:
                if not line["ok"]:
                    raise Stale(f"the suite failed on {harness}: {test} with seed {line['seed']}: {line['error']}")
    rows = [["", *(column.title for column in columns)], ["---"] * (len(columns) + 1)]
    for promise in PROMISES:
        rows.append([promise.title, *(_proven(promise, column, ran) for column in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def update(results: Path, readme: Path, *, check: bool = False) -> bool:
    """Write the table into *readme*, between the markers; return whether it changed.

    Raises:
        Stale: the results do not prove the table, or with *check*: the file shows another one.
    """
    text = readme.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise Stale(f"{readme} has no markers {BEGIN} and {END}")
    new = f"{head}{BEGIN}\n{table(results)}\n{END}{tail}"
    if check and new != text:
        raise Stale(f"the promise table of {readme} is stale: run `make promises`")
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m brokerkit.testing.conformance.promises", description=__doc__)
    parser.add_argument("results", type=Path, help="what BROKERKIT_RESULTS named during the run")
    parser.add_argument("readme", type=Path, help="the file with the markers")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the table is stale")
    given = parser.parse_args(arguments)
    try:
        changed = update(given.results, given.readme, check=given.check)
    except Stale as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.readme}: the promise table {'is written' if changed else 'is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
