"""Mutants above the contract: publishing, requests, workers, services, redrive."""

from __future__ import annotations

from .mutant import Mutant, clauses, units

PUBLISHING = "brokerkit/_publishing.py"
REQUESTS = "brokerkit/_requests.py"
WORKERS = "brokerkit/_workers.py"
LETTERS = "brokerkit/_letters.py"
BINDING = "brokerkit/_binding.py"

RUNNING: tuple[Mutant, ...] = (
    Mutant(
        name="an unknown publish is sent again",
        breaks="PublishUnknown is never sent again",
        file=PUBLISHING,
        old="if isinstance(result, (BrokerUnavailable, BufferFull, NotAttempted)) and mark not in final:",
        new="if result.retryable and mark not in final:",
        tests=clauses("Publishing::test_a_lost_reply_is_reported_and_never_stored_twice"),
    ),
    Mutant(
        name="a later one overtakes the failed one of its key",
        breaks="behind a final failure of its key a message stays unsent",
        file=PUBLISHING,
        old="NotAttempted)) and mark not in final:",
        new="NotAttempted)):",
        tests=units("test_publishing"),
    ),
    Mutant(
        name="publishing gives up at once",
        breaks="what is certainly not stored is sent again",
        file=PUBLISHING,
        old="if not open_ or left <= wait:",
        new="if not open_ or left <= wait * 10**9:",
        tests=clauses("Publishing::test_a_publish_while_disconnected_waits_for_the_connection"),
    ),
    Mutant(
        name="replies of others are read",
        breaks="a reply goes to the inbox that asked",
        file=REQUESTS,
        old="if record.key != self.token:",
        new="if record.key is None:",
        tests=clauses("Requesting::test_many_requests_at_once_each_get_their_own_answer", "Requesting"),
    ),
    Mutant(
        name="requests do not expire",
        breaks="an expired request is dropped unhandled",
        file="brokerkit/_publisher.py",
        old="plain.timestamp, ttl=plain.ttl",
        new="plain.timestamp, ttl=None",
        tests=clauses("Requesting::test_an_expired_request_is_dropped_unhandled"),
    ),
    Mutant(
        name="the replier's failure is kept secret",
        breaks="a final failure is answered with RemoteError",
        file="brokerkit/_session.py",
        old="        if to is not None and self.plan.replies is not None:\n",
        new="        if to is not None and self.plan.replies is None:\n",
        tests=clauses("Requesting::test_a_final_failure_is_remote_error"),
    ),
    Mutant(
        name="one handler too many",
        breaks="no more handlers at once than concurrency",
        file=WORKERS,
        old="[Slot() for _ in range(job.concurrency)]",
        new="[Slot() for _ in range(job.concurrency + 1)]",
        tests=clauses("Backpressure::test_no_more_handlers_run_at_once_than_concurrency_says"),
    ),
    Mutant(
        name="a failed batch is retried as one",
        breaks="a poisonous row costs only itself",
        file=WORKERS,
        old="        if len(messages) > 1:\n            logger.warning(",
        new="        if len(messages) > 10**6:\n            logger.warning(",
        tests=clauses("Batching::test_a_poisonous_row_costs_only_itself"),
    ),
    Mutant(
        name="a batch takes one too many",
        breaks="a batch handler gets at most its maximum",
        file=WORKERS,
        old="            while len(messages) < batch.max and not self.intake.closed",
        new="            while len(messages) <= batch.max and not self.intake.closed",
        tests=clauses("Batching::test_a_batch_handler_gets_at_most_its_maximum"),
    ),
    Mutant(
        name="the drain waits for nobody",
        breaks="a drain finishes what runs",
        file="brokerkit/_running.py",
        old="with anyio.move_on_after(self._drain) as patience:",
        new="with anyio.move_on_after(0) as patience:",
        tests=clauses("Closing::test_a_drain_finishes_what_runs_and_hands_back_the_rest"),
    ),
    Mutant(
        name="a timeout is twice as long",
        breaks="a handler over its timeout is cancelled",
        file=WORKERS,
        old="left = slot.began + timeout - now",
        new="left = slot.began + 2 * timeout - now",
        tests=clauses("Leases::test_a_handler_that_hangs_is_ended_by_its_timeout"),
    ),
    Mutant(
        name="a cancelled handler has failed",
        breaks="a stop is no failed attempt",
        file=WORKERS,
        old="                for message in open_:\n                    session.release(message)\n",
        new="                for message in open_:\n                    session.fail(message, RuntimeError(), self.job.policy)\n",
        tests=clauses("Retrying::test_a_stop_is_no_failed_attempt"),
    ),
    Mutant(
        name="redrive takes all",
        breaks="redrive: where",
        file=LETTERS,
        old="if where is None or where(Letter(item, bound)):",
        new="if where is None or where(Letter(item, bound)) or True:",
        tests=clauses("DeadLetters::test_redriving_takes_what_it_is_told_to"),
    ),
    Mutant(
        name="redrive has no limit",
        breaks="redrive: limit",
        file=LETTERS,
        old="            if limit is not None and matched == limit:\n",
        new="            if limit is not None and matched == limit + 1:\n",
        tests=clauses("DeadLetters::test_redriving_takes_what_it_is_told_to"),
    ),
    Mutant(
        name="a dry run moves",
        breaks="redrive: dry_run",
        file=LETTERS,
        old="if chosen and not dry_run else ()",
        new="if chosen else ()",
        tests=clauses("DeadLetters::test_redriving_takes_what_it_is_told_to"),
    ),
    Mutant(
        name="users may set bk- headers",
        breaks="bk- headers are brokerkit's own",
        file=BINDING,
        old='if name.lower().startswith("bk-"):',
        new='if name.lower().startswith("bk--"):',
        tests=clauses("Content::test_the_headers_of_brokerkit_are_not_for_users"),
    ),
    Mutant(
        name="one name may have two kinds",
        breaks="the second kind of a name is refused",
        file=BINDING,
        old="    if known.kind != address.kind:\n",
        new="    if known.kind != address.kind and known.kind == 'dead':\n",
        tests=clauses("Subscribing::test_the_second_kind_of_a_name_is_refused"),
    ),
    Mutant(
        name="other settings are no mismatch",
        breaks="declare=check compares settings",
        file=BINDING,
        old="if setting in found and found[setting] != wanted:",
        new="if setting not in found:",
        tests=clauses("Failing::test_other_settings_than_declared_are_a_mismatch"),
    ),
)
