"""Mutants of the Kafka driver."""

from __future__ import annotations

from .mutant import Mutant, broker

HOME = "brokerkit/drivers/kafka/"
ANSWER = HOME + "_answer.py"
ASSIGN = HOME + "_assign.py"
CLAIM = HOME + "_claim.py"
COMMIT = HOME + "_commit.py"
FETCH = HOME + "_fetch.py"
GROUP = HOME + "_group.py"
OFFSETS = HOME + "_offsets.py"
PART = HOME + "_part.py"
RECORDS = HOME + "_records.py"

PUBLISHED: tuple[Mutant, ...] = (
    Mutant(
        name="keys go elsewhere than Java's",
        breaks="any Kafka client can write to our topics, and keys stay in order",
        file=RECORDS,
        old="return (number ^ number >> 15) & 0x7FFFFFFF",
        new="return (number ^ number >> 13) & 0x7FFFFFFF",
        tests=broker("test_records", "test_the_hash_of_a_key_is_that_of_kafkas_own_client"),
    ),
    Mutant(
        name="a number in doubt is used again",
        breaks="no record is taken for another one and dropped",
        file=HOME + "_batch.py",
        old="self.producer, self.sequence = None, 0\n",
        new="pass\n",
        tests=broker(
            "test_publish_again",
            "test_no_answer_before_the_deadline_is_unknown_and_its_number_is_not_used_again",
            "test_a_lost_number_does_not_make_a_record_a_duplicate_of_an_abandoned_one",
        ),
    ),
    Mutant(
        name="later records overtake one in doubt",
        breaks="behind a failure of its key a record is not attempted",
        file=HOME + "_calls.py",
        old="if record.key is not None and isinstance(record.address, Topic):",
        new="if record.key is None and isinstance(record.address, Topic):",
        tests=broker("test_publish", "test_a_missing_topic_is_not_found_and_not_made"),
    ),
    Mutant(
        name="notes of an earlier topic count",
        breaks="a letter is there until it is moved",
        file=HOME + "_letters.py",
        old="if mark.of != self._of.hex:",
        new="if not mark.of:",
        tests=broker("test_letters", "test_what_is_noted_of_an_earlier_topic_does_not_count"),
    ),
)

FETCHED: tuple[Mutant, ...] = (
    Mutant(
        name="what is for nobody stops the place",
        breaks="markers and aborted transactions are jumped",
        file=PART,
        old="self._batches[-1].next = answer.skipped",
        new="pass",
        tests=broker("test_answer", "test_markers_move_the_place_though_nothing_is_handed_out"),
    ),
    Mutant(
        name="once aborted, always aborted",
        breaks="a transaction that was committed is read",
        file=ANSWER,
        old="open.discard(producer)",
        new="pass",
        tests=broker("test_answer", "test_markers_and_aborted_transactions_are_jumped"),
    ),
    Mutant(
        name="checksums are not looked at",
        breaks="a damaged log is told of and not handed out",
        file=ANSWER,
        old="Iterator[Native]:\n    if not batch.validate_crc():",
        new="Iterator[Native]:\n    if False:",
        tests=broker("test_answer", "test_no_byte_of_a_batch_can_be_changed_unnoticed"),
    ),
    Mutant(
        name="the decoder's word is final",
        breaks="a record that only brokers take stops nobody",
        file=PART,
        old="if self._dense and [record.offset for record in some] != list(range(self.next, self.next + wanted)):",
        new="if not some:",
        tests=broker("test_answer", "test_a_record_that_the_decoder_refuses_stops_nobody"),
    ),
    Mutant(
        name="a late answer counts",
        breaks="nothing is repeated or lost when reading begins elsewhere",
        file=FETCH,
        old="if part is None or part.asked is not token:",
        new="if part is None:",
        tests=broker("test_fetch_lanes", "test_what_comes_for_a_place_that_was_left_is_dropped"),
    ),
    Mutant(
        name="who has most is always first",
        breaks="a record larger than what is asked for comes though others have something",
        file=FETCH,
        old="self._parts[index] = self._parts.pop(index)",
        new="pass",
        tests=broker("test_fetch_lanes", "test_who_had_something_is_asked_for_behind_the_others"),
    ),
    Mutant(
        name="a topic that was made again is read on",
        breaks="another topic of the same name is not taken for the old one",
        file=FETCH,
        old="if self._id is not None and self._id != info.id:",
        new="if self._id is not None and self._id is None:",
        tests=broker("test_fetch_lanes", "test_a_topic_that_was_away_for_a_moment_is_read_on_if_it_is_the_same"),
    ),
    Mutant(
        name="an answer that says nothing is asked for at once",
        breaks="nothing is tried all the time",
        file=FETCH,
        old="            return 0 if found else PAUSE",
        new="            return 0",
        tests=broker("test_fetch_lanes", "test_whatever_goes_wrong_is_tried_again_but_not_all_the_time"),
    ),
    Mutant(
        name="a position that is gone is another record",
        breaks="PositionLost, never silently something else",
        file=OFFSETS,
        old="if not found or found[0].offset != offset or max(0, found[0].timestamp or 0) != when:",
        new="if not found:",
        tests=broker("test_offsets", "test_a_position_is_a_place_and_a_time_for_the_other_partitions"),
    ),
)

CONSUMED: tuple[Mutant, ...] = (
    Mutant(
        name="an heir of a Kafka partition trusts the dead",
        breaks="deliveries count crashes",
        file=CLAIM,
        old="        tracker.crashed()\n",
        new="",
        tests=broker("test_consumer_claim", "test_an_owner_that_died_has_counted"),
    ),
    Mutant(
        name="a note covers what is in hand",
        breaks="a message is there until it is settled",
        file=CLAIM,
        old="return self.tracker.base, self.tracker.encode()",
        new='return self.tracker.high, ""',
        tests=broker("test_consumer_claim", "test_the_note_never_passes_what_is_unsettled"),
    ),
    Mutant(
        name="a third delivery from Kafka comes in company",
        breaks="what was delivered twice without an outcome comes alone",
        file=CLAIM,
        old="if self.deliveries(order[0]) >= self.lone:",
        new="if self.deliveries(order[0]) > self.lone:",
        tests=broker("test_consumer_claim", "test_a_record_that_came_for_the_third_time_waits_to_come_alone"),
    ),
    Mutant(
        name="commits overtake one another",
        breaks="an older note never replaces a newer one",
        file=COMMIT,
        old="        self._soon = True\n        if self._busy:\n            return\n",
        new="        self._soon = True\n",
        tests=broker("test_consumer_commit", "test_only_one_commit_is_under_way"),
    ),
    Mutant(
        name="a commit that failed is forgotten",
        breaks="what is done is stored in the end",
        file=COMMIT,
        old="                failure = failure or error\n                self.touch(claim)\n",
        new="                failure = failure or error\n",
        tests=broker("test_consumer_commit", "test_a_failure_is_told_and_tried_again"),
    ),
    Mutant(
        name="a partition moves before it was let go",
        breaks="a partition has one owner at a time",
        file=ASSIGN,
        old="        free.discard(partition)\n",
        new="        if partition not in taking[name].leaving:\n            free.discard(partition)\n",
        tests=broker("test_assign", "test_nobody_gets_what_another_holds"),
    ),
    Mutant(
        name="who is no member any more keeps its partitions",
        breaks="what is lost is told",
        file=GROUP,
        old="        self._hands.lose()\n",
        new="",
        tests=broker("test_group", "test_membership_that_is_lost_is_told_and_begun_anew"),
    ),
)

GUARDED: tuple[Mutant, ...] = (
    Mutant(
        name="a broker need not know the password",
        breaks="both sides prove that they know the password",
        file=HOME + "_sasl.py",
        old='if not hmac.compare_digest(self._signature, _binary(fields.get("v", ""))):',
        new="if not self._signature:",
        tests=broker("test_sasl", "test_a_broker_that_does_not_know_the_password_is_refused"),
    ),
    Mutant(
        name="a password travels in plain text",
        breaks="a password does not travel in plain text unless one asks for it",
        file=HOME + "_options.py",
        old="if self.username and not self.tls and not self.insecure and not Url(",
        new="if self.username and self.tls and not self.insecure and not Url(",
        tests=broker("test_options", "test_a_password_does_not_travel_in_plain_text"),
    ),
    Mutant(
        name="a batch inflates without end",
        breaks="who may write to a topic ends no process that reads it",
        file=HOME + "_inflate.py",
        old="        if len(out) > most:\n            raise _Full\n",
        new="",
        tests=broker("test_inflate", "test_there_is_a_limit"),
    ),
)
