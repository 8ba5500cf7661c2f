"""Mutants of what serves queues on Kafka."""

from __future__ import annotations

from .mutant import Mutant, broker

HOME = "brokerkit/drivers/kafka/"
DELAY = HOME + "_delay.py"
JANITOR = HOME + "_janitor.py"
LOCKS = HOME + "_share_place.py"
READER = HOME + "_share_reader.py"
RESCUE = HOME + "_rescue.py"
SESSION = HOME + "_share_session.py"
SETTLE = HOME + "_share_settle.py"
TIME = HOME + "_time.py"

ACQUIRED: tuple[Mutant, ...] = (
    Mutant(
        name="what has run out is ours",
        breaks="what others may have is settled by nobody else",
        file=LOCKS,
        old="if lock.state == HELD and 0 < lock.until <= now]",
        new="if lock.state == HELD and 0 < lock.until <= -now]",
        tests=broker("test_share_time", "test_nothing_is_acknowledged_behind_its_deadline"),
    ),
    Mutant(
        name="one that is not ours takes all with it",
        breaks="what is ours and acknowledged is done",
        file=LOCKS,
        old="            self.single.extend(parcel.split())\n            return\n",
        new="            pass\n",
        tests=broker("test_share_faults", "test_one_that_is_not_ours_is_split_off"),
    ),
    Mutant(
        name="what is ours again is done already",
        breaks="what is accepted is accepted in the end",
        file=LOCKS,
        old="            self.due.append(lock)  # else",
        new="            pass  # else",
        tests=broker("test_share_faults", "test_what_was_accepted_without_an_answer_is_accepted_again"),
    ),
    Mutant(
        name="what was done and lost is not remembered",
        breaks="what was done is not handled again by who has done it",
        file=LOCKS,
        old="self._memory[offset] = now + MEMORY",
        new="pass",
        tests=broker("test_share_faults", "test_what_was_done_and_lost_is_accepted_if_it_ever_comes_again"),
    ),
    Mutant(
        name="locks are not renewed",
        breaks="what is in hand stays ours for as long as it takes",
        file=LOCKS,
        old="                    self.renew[lock.offset] = lock\n",
        new="                    pass\n",
        tests=broker("test_share_time", "test_a_record_is_renewed_for_as_long_as_it_is_in_hand"),
    ),
    Mutant(
        name="a lock counts from its answer on",
        breaks="nobody believes that something is its own which others may have",
        file=SESSION,
        old="        self._learn(answer)\n        until = sent + owner.lock",
        new="        self._learn(answer)\n        until = self._loop.time() + owner.lock",
        tests=broker("test_share_time", "test_the_lock_counts_from_when_it_was_asked_for"),
    ),
    Mutant(
        name="what a session had stays when it ends",
        breaks="what may have gone to others is not handed out",
        file=SESSION,
        old="        for place in self.places.values():\n            place.drift(now)\n        self.soonest = math.inf\n",
        new="        self.soonest = math.inf\n",
        tests=broker("test_share_faults", "test_what_nobody_has_taken_is_dropped_with_its_session_and_comes_anew"),
    ),
)

SORTED: tuple[Mutant, ...] = (
    Mutant(
        name="what the broker is about to drop is handed out",
        breaks="a message is there until it is settled",
        file=READER,
        old="            if lock.count >= threshold:\n                rescued.append(lease)\n            elif",
        new="            if",
        tests=broker("test_share_consumer_safety", "test_a_record_is_rescued_before_anything_else"),
    ),
    Mutant(
        name="a third delivery of a share group comes in company",
        breaks="what was delivered twice without an outcome comes alone",
        file=READER,
        old="elif record.deliveries + lock.count >= LONE_DELIVERY:",
        new="elif record.deliveries + lock.count > LONE_DELIVERY:",
        tests=broker("test_share_consumer_safety", "test_a_suspect_comes_alone_and_what_came_with_it_counts_nothing"),
    ),
    Mutant(
        name="what has expired waits for ever",
        breaks="what has expired is dropped",
        file=READER,
        old="        if left == EXPIRED:\n",
        new="        if left < EXPIRED:\n",
        tests=broker("test_share_consumer_rules", "test_what_has_expired_is_dropped_and_told_of"),
    ),
    Mutant(
        name="what goes back counts",
        breaks="only what somebody held when it crashed counts a delivery",
        file=RESCUE,
        old="self.deliveries if counted else self.deliveries - 1",
        new="self.deliveries",
        tests=broker("test_share_consumer_safety", "test_leaving_hands_everything_back_uncounted"),
    ),
    Mutant(
        name="an original is done without a copy",
        breaks="a message is there until it is settled, while nothing can be stored",
        file=RESCUE,
        old="                    problem = problem or result\n                elif held.pop",
        new="                    problem = problem or result\n                if held.pop",
        tests=broker("test_share_consumer_safety", "test_what_cannot_be_copied_in_time_is_handed_back_itself"),
    ),
    Mutant(
        name="who hands something back is its last hope",
        breaks="no broker drops what is handed back",
        file=RESCUE,
        old="if lease.lock.count < self._limit and self._held.pop(",
        new="if self._held.pop(",
        tests=broker("test_share_consumer_safety", "test_releasing_does_not_let_the_broker_drop_anything"),
    ),
    Mutant(
        name="who holds something does not hear that it is lost",
        breaks="what is lost is told",
        file=SETTLE,
        old="        self._drop(leases)\n        self._revoke(leases)\n",
        new="        self._drop(leases)\n",
        tests=broker("test_share_consumer_rules", "test_what_was_lost_is_told_and_settled_no_more"),
    ),
)

WAITED: tuple[Mutant, ...] = (
    Mutant(
        name="the rest of a delay is not worth it",
        breaks="nothing is delivered before it is due",
        file=DELAY,
        old="record.headers, max(0.0, rest))",
        new="record.headers, 0.0)",
        tests=broker("test_delay_hops", "test_a_message_arrives_when_it_is_due_and_never_before"),
    ),
    Mutant(
        name="the time that a writer gives is the broker's",
        breaks="nothing is delivered before it is due, whatever clock its writer has",
        file=DELAY,
        old="    def _left(self, native: Native) -> float:\n",
        new="    def _left(self, native: Native, stamped: Callable[[Native], bool] = lambda native: True) -> float:\n",
        tests=broker("test_delay_hops", "test_the_time_of_a_writer_decides_nothing"),
    ),
    Mutant(
        name="a slow answer tells the time",
        breaks="whether a time to live is over is decided by the broker's clock",
        file=TIME,
        old="        if now - sent <= QUICK:\n",
        new="        if now - sent <= 100 * QUICK:\n",
        tests=broker("test_server_time", "test_a_slow_answer_is_no_proof_of_the_time"),
    ),
    Mutant(
        name="what may have expired is handed out",
        breaks="what has expired is not handled",
        file=TIME,
        old="if latest < math.inf or self.tickers:",
        new="if False:",
        tests=broker("test_server_time", "test_what_may_be_over_is_not_handed_out"),
    ),
    Mutant(
        name="what a classic group has in hand is removed",
        breaks="only what is done is removed",
        file=JANITOR,
        old="return {number: place[0] for number, place",
        new="return {number: place[0] + 1 for number, place",
        tests=broker("test_janitor", "test_what_a_classic_group_has_done_is_removed"),
    ),
    Mutant(
        name="what a share group has in hand is removed",
        breaks="only what is done is removed",
        file=JANITOR,
        old="return {number: place.start for number, place",
        new="return {number: place.start + 1 for number, place",
        tests=broker("test_janitor", "test_nothing_above_the_position_of_a_share_group_is_removed"),
    ),
    Mutant(
        name="what was true before a pause is believed",
        breaks="nobody sets the position of a queue back that is read",
        file=HOME + "_engine.py",
        old="if await describe(cluster, group, timeout=time_left(end)) is not None or loop_time() - looked > _FRESH:",
        new="if await describe(cluster, group, timeout=time_left(end)) is not None:",
        tests=broker("test_engine", "test_who_was_held_up_after_looking_looks_again"),
    ),
)
