"""One consumer's life: what came out of it, what runs, what waits, and how each of them ends.

A feed opens a session for each connection; messages belong to the session that received them, so what a lost connection left
behind can never settle anything on the next one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import events
from ._lanes import Lanes
from ._outcome import Again, Die, dead_letter, failure_reply, first_failure, judge, reply_to, retry_copy
from ._plan import Env, Inbox, Plan
from ._redact import error_text
from ._settle import Settling, Watch
from .address import Outgoing
from .driver import Consumer, Delivery, Record, Settlement
from .errors import BrokerError, Closed, ConfigError, DecodeError, DeliveryLost, Nack, Reject
from .message import Message, Outcome
from .policy import MAX_DELAY, MAX_REASON, TOPIC_WAIT, RetryPolicy, seconds

logger = logging.getLogger("brokerkit")

_ACK = Outcome("ack")
_NACK = Outcome("nack")
_REJECT = Outcome("reject")
_RELEASE = Outcome("release")
_BY_HAND = RetryPolicy()
LOOK = 0.02
"""Seconds between two looks whether what stalls may go on."""
PARKED_BYTES = 64 * 1024 * 1024
"""Bodies that may wait behind busy keys without using up the prefetch."""


class Session:
    """The settler of all messages that one consumer delivers."""

    def __init__(self, consumer: Consumer, plan: Plan, env: Env, inbox: Inbox, lanes: Lanes | None) -> None:
        self.consumer = consumer
        self.plan = plan
        self.env = env
        self.settling = Settling(consumer, self._settled, self._settle_error, env.restore)
        self._monotonic = env.clock.monotonic
        self.held = 0
        self.settled = 0
        self.out: set[Message[Any]] = set()
        """Handed to a handler or reader and not settled."""
        self._inbox = inbox
        self._lanes = lanes
        self._timers: dict[Message[Any], asyncio.TimerHandle] = {}
        self._ended: asyncio.Future[None] | None = None
        self._stalled: list[Message[Any]] = []
        self._looks: asyncio.TimerHandle | None = None
        self._moving: set[int] = set()
        """The `id()` of deliveries that are about to move: they are not tried again here."""
        self.stopping = False

    # ------------------------------------------------------------------ in

    def admit(self, deliveries: Sequence[Delivery]) -> None:
        """Take over what the consumer has received."""
        self.held += len(deliveries)
        reader, limit, messages = self.plan.reader, self._limit, list[Message[Any]]()
        for delivery in deliveries:
            message: Message[Any] = Message(delivery, reader, self, delivery.record.attempts)
            if delivery.deliveries <= limit:
                messages.append(message)
            elif self._line_up(message):
                self._bury_crashed(message)
        self._inbox.push_all(messages)

    @property
    def _limit(self) -> int:
        """The deliveries after which a message is dead-lettered unhandled."""
        return self.plan.max_deliveries if self.plan.letters is not None else sys.maxsize

    def _bury_crashed(self, message: Message[Any]) -> None:
        times = self._delivery(message).deliveries - 1
        verdict = Die(f"delivered {times} times without an outcome: whoever ran it crashed", "Crashed")
        self._bury(message, verdict, message._item.record.attempts)

    def enter(self, message: Message[Any]) -> bool:
        """Return whether *message*, just taken, may go out; else it waits: for its key, or to be owned for certain."""
        if self._stalled or self._monotonic() >= self.consumer.owned_until:
            self._stall(message)
            return False
        return self._line_up(message)

    def _line_up(self, message: Message[Any]) -> bool:
        if self._lanes is None or message._cleared or self._lanes.enter(message):
            self.out.add(message)
            return True
        return False

    def _stall(self, message: Message[Any]) -> None:
        """Keep *message* until the driver has found out whether it is still ours: this process was silent for too long."""
        self._stalled.append(message)
        if self._looks is None:
            self._looks = asyncio.get_running_loop().call_later(LOOK, self._look)

    def _look(self) -> None:
        self._looks = None
        stalled, self._stalled = self._stalled, []
        if self._monotonic() < self.consumer.owned_until:
            self._inbox.push_front(stalled)
        else:
            for message in stalled:
                self._stall(message)

    def _unstall(self, gone: Callable[[Message[Any]], bool]) -> list[Message[Any]]:
        """Take out and return what stalls and is *gone*."""
        dropped = [message for message in self._stalled if gone(message)]
        if dropped:
            self._stalled = [message for message in self._stalled if not gone(message)]
        if not self._stalled and self._looks is not None:
            self._looks.cancel()
            self._looks = None
        return dropped

    def starved(self) -> None:
        """Somebody could run more: let what waits behind busy keys not use up the prefetch."""
        lanes = self._lanes
        if lanes is not None:
            extra = lanes.parked if lanes.parked_bytes <= PARKED_BYTES else 0
            if self.consumer.prefetch != self.plan.prefetch + extra:
                self.consumer.prefetch = self.plan.prefetch + extra

    def follow(self, message: Message[Any]) -> Message[Any] | None:
        """Return the message that comes next behind *message* in its key's order, to be in one batch with it."""
        following = None if self._lanes is None else self._lanes.follow(message)
        alone = following is not None and (following._single or self._delivery(following).deliveries > self._limit)
        if following is not None and alone and self._lanes is not None:
            self._lanes.put_back(following)
            return None
        if following is not None:
            self.out.add(following)
        return following

    def alone(self, messages: Sequence[Message[Any]]) -> None:
        """Have *messages* of a batch that failed run one by one, each key in its order.  It counts as no attempt."""
        for message in messages:
            message._single = True
            message._staged = message._published = None  # dropped with the run that staged it
        self._return(messages)

    def begin(self, batch: Sequence[Message[Any]]) -> Sequence[Message[Any]]:
        """Return what of *batch*, which has waited for more, may run: others may have got it meanwhile, or be about to."""
        if self._monotonic() >= self.consumer.owned_until or (self.settling.closed and self.plan.letters is not None):
            self._return(batch)
            return ()
        self._return([message for message in batch if id(message._item) in self._moving])
        return [message for message in batch if id(message._item) not in self._moving]

    def _return(self, messages: Sequence[Message[Any]]) -> None:
        """Have *messages*, which are out, come again, each key in its order; hand back what is not to start here."""
        back: list[Message[Any]] = []
        for message in messages:
            self.out.discard(message)
            if self._leaving or id(message._item) in self._moving:
                self.release(message)
            else:
                back.append(message)
        first = back if self._lanes is None else self._lanes.split(back)
        for message in first:
            message._cleared = True
        self._inbox.push_front(first)

    # ------------------------------------------------------------------ out: services

    def succeed(self, message: Message[Any], extra: tuple[Record, ...] = ()) -> None:
        """Acknowledge *message*, storing what it staged and *extra*."""
        message._outcome = _ACK
        staged = message._staged
        if staged is None and not extra:
            self.settling.add(Settlement(message._item))  # type: ignore[arg-type]
            if self._lanes is None and self._ended is None:
                self.out.discard(message)
                return
        else:
            records = (*(staged or ()), *extra)
            watch = Watch(refused=partial(self._refused, message))
            self.settling.add(Settlement(self._delivery(message), records), watch)
        self._leave(message)

    def fail(self, message: Message[Any], error: BaseException, policy: RetryPolicy) -> None:
        """Carry out what the failed attempt of *message* demands."""
        failures = message._attempts + 1
        verdict = judge(error, policy, failures, in_place=self.plan.in_place)
        if isinstance(verdict, Die):
            message._outcome = message._outcome or _REJECT
            self._bury(message, verdict, failures, error)
            return
        message._outcome = message._outcome or _NACK
        self._log_retry(message, verdict, error)
        if self.plan.in_place:
            self._wait(message, verdict.wait, failures)
        else:
            first = self._first_failure(message)
            copy = retry_copy(message._item.record, failures=failures, wait=verdict.wait, first_failed=first)
            self.settling.add(Settlement(self._delivery(message), (copy,)))
            self._leave(message)

    def pass_on(self, message: Message[Any]) -> None:
        """Give up *message* of an ephemeral reader to whoever reads it: nothing is owed for it."""
        self.settling.add(Settlement(self._delivery(message)))
        self._leave(message)

    def undecodable(self, message: Message[Any], error: DecodeError) -> None:
        """Dead-letter *message*, which never reached its handler, with its bytes untouched."""
        text = error_text(error)
        self._bury(message, Die(f"cannot be decoded: {text}"[:MAX_REASON], "DecodeError", text), message._attempts)

    def release(self, message: Message[Any]) -> None:
        """Hand *message* back without counting an attempt, and what waits behind its key, to keep their order."""
        message._outcome = message._outcome or _RELEASE
        self.out.discard(message)
        behind = self._behind(message)
        self.settling.release([self._delivery(message), *map(self._delivery, behind)])
        self._notice()

    def _bury(self, message: Message[Any], verdict: Die, failures: int, error: BaseException | None = None) -> None:
        record, letters = message._item.record, self.plan.letters
        self._log_dead(message, verdict, error)
        if letters is None:
            self.settling.add(Settlement(self._delivery(message)))
            self._leave(message)
            return
        first, now = self._first_failure(message), self.env.clock.time()
        publish: tuple[Record, ...] = (
            dead_letter(record, letters, verdict, failures=failures, first_failed=first, now=now),
        )
        to = None if self.plan.replies is None else reply_to(record)
        if to is not None and self.plan.replies is not None:
            publish = (*publish, failure_reply(self.plan.replies, to, self.env.new_id(), verdict, now))
        # The key goes on only when the letter is stored: else a crash could reorder it behind its successors.
        self.settling.add(Settlement(self._delivery(message), publish), Watch(done=lambda _: self._leave(message)))

    def _first_failure(self, message: Message[Any]) -> float:
        """Return when *message* failed for the first time: now, unless it or the copy it came as knows better."""
        return message._first_failed or first_failure(message._item.record) or self.env.clock.time()

    def _refused(self, message: Message[Any], error: BrokerError) -> None:
        """What the handler wanted to publish cannot be stored: the attempt has failed after all."""
        message._staged = None
        message._outcome = _REJECT
        failures = message._attempts + 1
        self._bury(message, Die(f"what it published was refused: {error_text(error)}", type(error).__name__), failures)

    def _wait(self, message: Message[Any], wait: float, failures: int) -> None:
        again: Message[Any] = Message(self._delivery(message), self.plan.reader, self, failures)
        again._single = message._single
        again._cleared = True  # its key is still its own
        again._first_failed = self._first_failure(message)
        self.out.discard(message)
        if self.plan.letters is not None:
            self.settling.hold(self._delivery(message), failures)
        if self._leaving or id(message._item) in self._moving:
            self.release(again)
            return
        if wait <= 0:
            self._inbox.push(again)
        else:
            loop = asyncio.get_running_loop()
            self._timers[again] = loop.call_later(wait, self._due, again)
        self._notice()

    def _due(self, message: Message[Any]) -> None:
        del self._timers[message]
        self._inbox.push(message)

    def _behind(self, message: Message[Any]) -> list[Message[Any]]:
        """Free the key of *message*, which is handed back, and return all that would come after it."""
        key = message._item.record.key
        if self._lanes is None or key is None:
            return []
        waiting = self._lanes.abandon(message)
        waiting += self._unstall(lambda later: later._item.record.key == key)
        return waiting + self._inbox.drop(lambda later: later._settler is self and later._item.record.key == key)

    @property
    def _leaving(self) -> bool:
        """Whether nothing starts here any more; what a group or queue had on a lost connection comes again on the next."""
        return self.stopping or self._inbox.closed or (self.settling.closed and self.plan.letters is not None)

    def _leave(self, message: Message[Any]) -> None:
        if self._lanes is not None and message in self.out:  # else its key has gone on before
            following = self._lanes.leave(message)
            if following is not None:
                self._go_on(following, self._lanes.parked)
        self.out.discard(message)
        if self._ended is not None:
            self._notice()

    def _go_on(self, following: Message[Any], parked: int) -> None:
        """Let *following* run, whose key is free now."""
        following._cleared = True
        if self._leaving:
            behind = self._behind(following)
            self.settling.release([self._delivery(following), *map(self._delivery, behind)])
        elif self._delivery(following).deliveries > self._limit:
            self.out.add(following)
            self._bury_crashed(following)
        else:
            self._inbox.push(following)
        if self.consumer.prefetch > self.plan.prefetch:
            self.consumer.prefetch = self.plan.prefetch + parked

    # ------------------------------------------------------------------ out: by hand (Settler)

    def check(self, outcome: Outcome) -> None:
        """Raise if messages here cannot have *outcome*."""
        self._check_open()
        if self.plan.letters is None and outcome.kind in ("nack", "reject"):
            raise ConfigError(f"a reader of {self.plan.name} without a group owns nothing: it cannot {outcome.kind}")
        if outcome.kind == "nack":
            seconds("delay", outcome.delay, high=MAX_DELAY)
            if self.plan.in_place and outcome.delay > TOPIC_WAIT:
                raise ValueError(
                    f"nack(delay={outcome.delay:g}) on a topic: it holds its key, so at most {TOPIC_WAIT:g} s"
                )

    async def settle(self, message: Message[Any], outcome: Outcome, confirm: bool) -> None:
        """Carry *outcome* out; with *confirm* return when it is stored."""
        self._check_open()
        match outcome.kind:
            case "ack" if confirm:
                await self._confirm(message)
            case "ack":
                if message in self.out:  # else an ephemeral reader's: settled when it was handed over
                    self.succeed(message)
            case "nack":
                self.fail(message, Nack(delay=outcome.delay), _BY_HAND)
            case "reject":
                self.fail(message, Reject(outcome.reason[:MAX_REASON]), _BY_HAND)
            case "release":
                self.release(message)

    def _check_open(self) -> None:
        # After a lost connection settling is only in vain, which is logged; a reader must not die of it.
        if self.settling.closed and self.stopping:
            raise Closed(f"the subscription of {self.plan.name} has ended; the message will be delivered again")

    async def _confirm(self, message: Message[Any]) -> None:
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: BrokerError | None) -> None:
            if error is None or isinstance(error, DeliveryLost):
                self._leave(message)
            elif message in self.out:
                message._outcome = None  # not settled: try that again, or fail with the handler
            else:
                self.held -= 1
            if stored.done():
                return
            if error is None:
                stored.set_result(None)
            else:
                stored.set_exception(error)

        if message not in self.out:
            self.held += 1  # settled before: the second answer is counted again
        watch = Watch(done=done, once=True)
        self.settling.add(Settlement(self._delivery(message), tuple(message._staged or ())), watch, confirm=True)
        try:
            await stored
        except asyncio.CancelledError:
            # Cancelling does not take it back: nobody waits for it any more, that is all.
            watch.once, watch.refused = False, partial(self._refused, message)
            if message._outcome is None:
                self.succeed(message)
            raise
        finally:
            if stored.done() and not stored.cancelled():
                stored.exception()

    async def failed(self, message: Message[Any], error: BaseException, retry: RetryPolicy) -> None:
        """Settle *message* as its failed attempt demands."""
        self._check_open()
        self.fail(message, error, retry)

    async def stage(self, message: Message[Any], item: Outgoing[object]) -> Record:
        """Check and encode *item*, to be stored with the acknowledgement of *message*."""
        if self.plan.letters is None:
            raise ConfigError(f"a reader of {self.plan.name} without a group settles nothing: publish with the broker")
        return await self.env.stage(item)

    # ------------------------------------------------------------------ the end

    @property
    def waiting(self) -> bool:
        """Whether something waits for its turn or its next attempt."""
        return bool(self._timers or self._stalled) or (self._lanes is not None and self._lanes.parked > 0)

    def unstarted(self) -> list[Message[Any]]:
        """Take out and return everything that no handler or reader has in hand, in order."""
        waiting = self._unstall(lambda _: True) + self._inbox.drop(lambda message: message._settler is self)
        for message, timer in self._timers.items():
            timer.cancel()
            waiting.append(message)
        self._timers.clear()
        if self._lanes is not None:
            waiting.extend(self._lanes.clear())
        return waiting

    async def revoked(self, deliveries: Sequence[Delivery]) -> None:
        """Let go of *deliveries*: drop what has not started, wait for what runs, and store its outcome."""
        gone = {id(delivery) for delivery in deliveries}
        self._moving |= gone
        try:
            # Handed back, so that whoever owns them next does not count this ownership: nobody has started them here.
            self.settling.release([self._delivery(message) for message in self._drop(gone)])
            while any(id(message._item) in gone for message in self.out):
                await self._any_end()
            await self.settling.flush()
        finally:
            self._moving -= gone

    def _drop(self, gone: set[int]) -> list[Message[Any]]:
        """Take out and return what has not started of the deliveries whose `id()` is in *gone*."""

        def lost(message: Message[Any]) -> bool:
            return message._settler is self and id(message._item) in gone

        dropped = self._unstall(lost) + self._inbox.drop(lost)
        for message in [message for message in self._timers if lost(message)]:
            self._timers.pop(message).cancel()
            dropped.append(message)
        if self._lanes is not None:
            behind = self._lanes.remove(gone)
            for message in dropped:
                if message._cleared:
                    behind += self._lanes.abandon(message)
            dropped += behind
        return dropped

    async def _any_end(self) -> None:
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._ended)

    def _notice(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None and not ended.done():
            ended.set_result(None)

    # ------------------------------------------------------------------ counting and telling

    @staticmethod
    def _delivery(message: Message[Any]) -> Delivery:
        item = message._item
        assert isinstance(item, Delivery)
        return item

    def _settled(self, count: int) -> None:
        self.settled += count
        self.held -= count

    def _event(self, make: Callable[..., events.Event], **details: object) -> None:
        if self.env.emit is not None:
            source = self.plan.told
            self.env.emit(make(address=source.address.name, group=source.group, **details))

    def _settle_error(self, delivery: Delivery, error: BrokerError) -> None:
        name = delivery.record.id
        if self.plan.letters is None:
            return  # an ephemeral reader owes nothing, so nothing is lost
        if isinstance(error, DeliveryLost):
            logger.warning("%s: message %s was lost before it was settled: it comes again", self.plan.name, name)
            self._event(events.Lost, id=name)
            # What waits for its next attempt would run in vain.
            self.settling.release([self._delivery(message) for message in self._drop({id(delivery)})])
        else:
            logger.warning(
                "%s: the outcome of message %s is not stored yet: %s", self.plan.name, name, error_text(error)
            )
            self._event(events.SettleFailed, id=name, error=type(error).__name__)

    def _log_retry(self, message: Message[Any], verdict: Again, error: BaseException) -> None:
        text = "%s: attempt %d of message %s failed, again in %.3g s: %s: %s"
        name, id, attempt, kind, wait = self.plan.name, message.id, message.attempt, type(error).__name__, verdict.wait
        logger.warning(text, name, attempt, id, wait, kind, error_text(error))
        self._event(events.Retried, id=id, attempt=attempt, error=kind, wait=wait)

    def _log_dead(self, message: Message[Any], verdict: Die, error: BaseException | None) -> None:
        plain = error is None or isinstance(error, (Reject, Nack))
        what = "dead-lettered" if self.plan.letters is not None else "dropped"
        cause = None if plain or error is None else (type(error), error, error.__traceback__)
        text = "%s: message %s %s at attempt %d: %s"
        logger.error(text, self.plan.name, message.id, what, message.attempt, verdict.reason, exc_info=cause)
        if self.plan.letters is None:
            self._event(events.Dropped, id=message.id, attempt=message.attempt, reason=verdict.reason)
        else:
            told = {"id": message.id, "attempt": message.attempt, "reason": verdict.reason, "error": verdict.error}
            self._event(events.DeadLettered, **told)
