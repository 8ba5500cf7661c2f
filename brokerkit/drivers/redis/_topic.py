"""`TopicConsumer`: reads a topic as a member of a group, or ephemerally, which is the same without a position to store."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

import anyio
from anyio.abc import TaskGroup

from ..._tasks import Hosted
from ...address import AnyTopic
from ...driver import Delivery, Revoked, Settlement, Source
from ...errors import BrokerError, BrokerUnavailable, ConfigError, DeliveryLost, NotFound
from .._log import Tracker
from ._context import Context
from ._link import Argument
from ._publish import derived_settings
from ._scripts import TOPIC_START
from ._topic_claim import Claim, Lease, lease_of
from ._topic_commit import Commits, Job
from ._topic_member import Membership
from ._topic_place import check_place, missing, start_args
from ._topic_reader import TopicReader

logger = logging.getLogger("brokerkit")

PATIENCE: Final = 60.0
"""Least seconds that a partition waits for what runs before it moves: a member that lives is not hurried."""
_AT_ONCE: Final = 200
"""Channels that are subscribed to together."""
LEAVING: Final = 5.0
"""Most seconds that leaving waits for the server."""


class TopicConsumer(TopicReader):
    """A reader of a topic, and its context manager."""

    def __init__(self, context: Context, topic: AnyTopic, source: Source, prefetch: int, revoked: Revoked) -> None:
        super().__init__(context, topic, source, prefetch)
        self._revoked = revoked
        self._channel = self._keys[0] + b":c"
        self._hosted: Hosted | None = None
        self._entering: anyio.CancelScope | None = None
        self._tasks: TaskGroup | None = None

    @property
    def claims(self) -> Mapping[int, Claim]:
        """The partitions that it has, by number."""
        return self._claims

    @property
    def cursor(self) -> str | None:
        """Where an ephemeral reader goes on; None for a group."""
        if self._group is not None:
            return None
        places = [self._claims[number].place() for number in range(len(self._claims))]
        for delivery in reversed(self._fetched):  # not received yet
            number = lease_of(delivery).claim.number
            places[number] = delivery.position.rpartition("@")[2]
        return f"{self._topic.name}[*]@{','.join(places)}"

    @property
    def owned_until(self) -> float:
        """Until when what it holds is certainly its own; an ephemeral reader owns nothing that others might take."""
        return math.inf if self._membership is None else self._membership.deadline

    def reads(self, topic: str, group: str) -> bool:
        """Return whether it is a member of *group*."""
        return self._topic.name == topic and self._group == group

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        """Return when ready, with the start stored."""
        self._link.watchers.add(self._watch)
        self._entered = ready = False
        try:
            with anyio.CancelScope() as self._entering:
                await self._enter()
                ready = True
            self._entering = None
            if not ready and self._error is not None:
                raise self._error
        except BaseException:
            self._context.wakes.unsubscribe(self._channel, self._told)
            for claim in self._claims.values():
                self._turn_away(claim)
            self._link.watchers.discard(self._watch)
            if self._membership is not None:
                self._membership.leave(stored=False)
            self._close()
            if self._hosted is not None:
                await self._hosted.__aexit__(None, None, None)
            raise
        self._context.readers[self] = None
        return self

    async def _enter(self) -> None:
        places = await self._start()
        hosted = Hosted(f"brokerkit {self!r}", self._host)
        self._hosted = hosted
        await hosted.__aenter__()
        self._entered = True
        if self._group is None:
            self._read_alone(places)
            await self._listen(list(self._claims.values()))
        else:
            await self._context.wakes.subscribe(self._channel, self._told)
            await self._join(self._group)

    def fail(self, error: BrokerError) -> None:
        """Let `receive`, or entering, raise *error*."""
        super().fail(error)
        if self._entering is not None:
            self._entering.cancel()

    async def _host(self, started: asyncio.Future[None]) -> None:
        """Run what tells the program of what it loses."""
        assert self._hosted is not None
        async with anyio.create_task_group() as self._tasks:
            started.set_result(None)
            await self._hosted.stopping.wait()
            self._tasks.cancel_scope.cancel()
        self._tasks = None

    async def _start(self) -> list[str]:
        """Find out where reading begins, and store it for a group that is new."""
        topic, source = self._topic, self._source
        args: list[Argument] = [derived_settings(topic), source.group or "", *start_args(topic, source.start)]
        try:
            reply = await self._link.call(TOPIC_START, self._keys, args, timeout=self._context.settings.timeout)
        except NotFound as error:
            raise missing(topic, self._link, error) from error.__cause__
        check_place(topic, source.start, reply)
        if source.until_end:
            self._ends = [int(end) for end in reply[1]]
        return [place.decode() for place in reply[2]]

    def _read_alone(self, places: list[str]) -> None:
        for number, place in enumerate(places):
            end = None if self._ends is None else self._ends[number]
            self._claims[number] = Claim(self._topic, number, 0, f"{place} ", b"", end)
            self._news[self._claims[number]] = None

    async def _listen(self, claims: Sequence[Claim]) -> None:
        """Hear of news of *claims*."""
        wakes = self._context.wakes
        for first in range(0, len(claims), _AT_ONCE):
            part = claims[first : first + _AT_ONCE]
            for claim in part:
                claim.listener = functools.partial(self._heard, claim)
            await asyncio.gather(*(wakes.subscribe(self._channel_of(c), c.listener) for c in part if c.listener))
            for claim in part:
                if claim.gone or not self._entered:
                    self._turn_away(claim)
                else:
                    self._news[claim] = None  # what came before is heard of only now
        self._pump()

    def _channel_of(self, claim: Claim) -> bytes:
        return self._channel + b":" + claim.text

    def _turn_away(self, claim: Claim) -> None:
        """Hear no more of *claim*, and do not look at it."""
        self._news.pop(claim, None)
        if claim.listener is not None:
            self._context.wakes.unsubscribe(self._channel_of(claim), claim.listener)

    async def _join(self, group: str) -> None:
        link, sealed, name = self._link, self._context.sealed, self._topic.name
        self._membership = member = Membership(link, self._topic, group, self._session, self._ends, self)
        self._commits = Commits(
            link, sealed, name, group, member.name, self._held, self._refused, self._freed, self._pump
        )
        self._claims = member.claims
        await member.join()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Hand back what is unsettled and leave the group."""
        self._entered = False
        self._wake()
        self._context.readers.pop(self, None)
        self._link.watchers.discard(self._watch)
        self._context.wakes.unsubscribe(self._channel, self._told)
        for claim in self._claims.values():
            self._turn_away(claim)
        try:
            if self._hosted is not None:
                await self._hosted.__aexit__(None, None, None)
        finally:
            if self._membership is not None and self._commits is not None:
                with anyio.move_on_after(min(LEAVING, self._session), shield=True):
                    await self._leave(self._membership, self._commits)
            self._close()

    async def _leave(self, member: Membership, commits: Commits) -> None:
        with anyio.move_on_after(LEAVING / 2):
            if self._link.up:
                await commits.quiet()
        known = not commits.busy  # else what a settlement has stored may be more than is known here
        member.stop()
        commits.close()
        commits.abort()
        self._hand_back(list(self._held.values()))
        for claim in self._claims.values():
            claim.unplan()
        left = member.leave(stored=known)
        await asyncio.wait([left])
        error = left.exception()
        if error is not None and not isinstance(error, (BrokerUnavailable, NotFound)):
            logger.warning("%s: leaving group %s: %s", self._topic.name, self._group, error)

    def _close(self) -> None:
        self._entered = False
        if self._timer is not None:
            self._timer.cancel()
        if self._membership is not None:
            self._membership.stop()
        if self._commits is not None:
            self._commits.close()
            self._commits.abort()
        self._held.clear()
        self._fetched.clear()

    def _watch(self, up: bool) -> None:
        """The connection is back, or has been gone for too long."""
        if not up:
            self.fail(BrokerUnavailable(f"the connection was lost: {self._link.problem or 'it was closed'}"))
            return
        if self._membership is not None:
            self._membership.soon()
        self._look_at_all()

    # ------------------------------------------------------------------ settling

    async def settle(self, items: Sequence[Settlement], *, confirm: bool = False) -> Sequence[BrokerError | None]:
        """Store the records of each item and acknowledge its delivery, both or none; one result each."""
        held = self._held
        confirm = confirm or self._doubtful()
        results: list[BrokerError | None] = []
        touched: dict[Claim, None] = {}
        jobs: dict[int, Job] = {}
        pop = held.pop
        for item in items:
            lease: Lease = item.delivery.token  # type: ignore[assignment]
            if item.publish:
                results.append(self._settle_copies(len(results), item, jobs))
            elif pop(lease, None) is None:
                results.append(_unheld(lease))
            elif lease.job is not None:
                held[lease] = item.delivery
                jobs[len(results)] = lease.job
                results.append(None)
            else:
                lease.settled = True
                claim = lease.claim
                claim.tracker.done(lease.offset)
                touched[claim] = None
                results.append(None)
        for claim in touched:
            self._touch(claim)
            if claim.standing:
                self._freed(claim)
        if self._waiter is not None:
            self._pump()
        if jobs:
            await asyncio.wait([job.future for job in jobs.values()])
            for index, job in jobs.items():
                results[index] = job.future.result()
        if confirm and self._commits is not None and any(result is None for result in results):
            await self._confirm(items, results, self._commits)
        return results

    def _settle_copies(self, index: int, item: Settlement, jobs: dict[int, Job]) -> BrokerError | None:
        """Begin to settle an item that publishes; return why that cannot be done."""
        lease = item.delivery.token
        if lease not in self._held:
            return _unheld(lease)
        if self._commits is None:
            return ConfigError(f"a reader of {self._topic.name} without a group settles nothing")
        assert isinstance(lease, Lease)
        try:
            jobs[index] = lease.job or self._commits.add(lease, item.publish)
        except BrokerError as error:
            return error
        return None

    async def _confirm(self, items: Sequence[Settlement], results: list[BrokerError | None], commits: Commits) -> None:
        """Wait until what was settled is stored."""
        failure: BrokerError | None = None
        try:
            await commits.stored()
        except BrokerError as error:
            failure = error
        for index, item in enumerate(items):
            if results[index] is None:
                lost = not item.publish and lease_of(item.delivery).claim.lost
                results[index] = DeliveryLost() if lost else failure

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Hand *deliveries* back, uncounted."""
        released = self._hand_back(deliveries)
        if self._waiter is not None:
            self._pump()
        if released and self._commits is not None:
            await self._commits.stored()

    def _hand_back(self, deliveries: Sequence[Delivery]) -> bool:
        """Let *deliveries*, if they are held, wait again; return whether one was."""
        released = False
        for delivery in deliveries:
            lease = delivery.token
            if isinstance(lease, Lease) and lease.job is None and self._held.pop(lease, None) is not None:
                lease.claim.hand_back(lease, delivery)
                self._news[lease.claim] = None
                self._touch(lease.claim)
                released = True
        return released

    async def hold(self, delivery: Delivery, attempts: int) -> None:
        """Keep the failed attempts of a delivery."""
        lease = delivery.token
        if lease not in self._held or not isinstance(lease, Lease):
            if (lost := _unheld(lease)) is not None:
                raise lost
            return
        lease.claim.tracker.hold(lease.offset, attempts)
        self._touch(lease.claim)
        if self._commits is not None:
            await self._commits.stored()
            if lease.claim.lost:
                raise DeliveryLost

    # ------------------------------------------------------------------ what is ours

    def granted(self, claims: Sequence[Claim]) -> None:
        """Begin to read *claims*."""
        self._news.update(dict.fromkeys(claims))
        self._pump()
        if self._tasks is not None:
            self._tasks.start_soon(self._hear, claims)

    async def _hear(self, claims: Sequence[Claim]) -> None:
        try:
            await self._listen(claims)
        except BrokerError as error:
            logger.warning("%s: news is looked for once a second: %s", self._topic.name, error)

    def taken(self, claims: Sequence[Claim]) -> None:
        """*claims* belong to others by now: tell the program what it has lost."""
        assert self._membership is not None
        for claim in claims:
            self._membership.forget(claim)
        lost = self._drop(claims)
        if lost and self._tasks is not None:
            self._tasks.start_soon(self._tell, lost)

    def _refused(self, claims: Sequence[Claim]) -> None:
        """Positions of *claims* were not stored, since they belong to others by now."""
        self.taken(claims)
        if self._membership is not None:
            self._membership.soon()

    def _drop(self, claims: Collection[Claim]) -> list[Delivery]:
        """Have nothing more of *claims* in hand; return what the program had."""
        waiting = set(map(lease_of, self._fetched))
        lost: list[Delivery] = []
        for claim in claims:
            claim.lost = True
            self._turn_away(claim)
        for lease, delivery in [item for item in self._held.items() if lease_of(item[1]).claim.lost]:
            del self._held[lease]
            if lease not in waiting:
                lost.append(delivery)
        if waiting:
            self._forget_fetched()
        if self._commits is not None:
            self._commits.drop(list(claims))
        return lost

    def _forget_fetched(self) -> None:
        """Keep of what was fetched only what is still held."""
        kept = [delivery for delivery in self._fetched if delivery.token in self._held]
        self._fetched.clear()
        self._fetched.extend(kept)

    def surplus(self, count: int) -> None:
        """Let *count* partitions go, those first of which least is in hand; what runs is waited for."""
        for delivery in self._fetched:
            self._hand_back([delivery])
        self._fetched.clear()
        count -= sum(claim.revoking for claim in self._claims.values())
        free = sorted(
            (claim for claim in self._claims.values() if not claim.revoking), key=lambda claim: claim.tracker.in_hand
        )
        moving = free[: max(0, count)]
        for claim in moving:
            claim.revoking = True
        busy = {lease_of(delivery).claim for delivery in self._held.values()}
        self._let_go([claim for claim in moving if claim not in busy])
        if self._tasks is not None and (rest := [claim for claim in moving if claim in busy]):
            self._tasks.start_soon(self._move, rest)

    async def _move(self, claims: list[Claim]) -> None:
        """Let *claims* go when the program has let go of what it has of them."""
        assert self._commits is not None
        with anyio.move_on_after(max(self._session, PATIENCE)) as patience:
            await self._tell(self._held_of(claims))
        while self._commits.carries(claims):
            await self._commits.quiet()
        left = self._held_of(claims)
        if patience.cancelled_caught:
            for delivery in left:  # it may be what hangs: that counts
                del self._held[delivery.token]
        else:
            self._hand_back(left)
        self._let_go(claims)

    def _held_of(self, claims: Sequence[Claim]) -> list[Delivery]:
        return [delivery for delivery in self._held.values() if lease_of(delivery).claim in claims]

    def _let_go(self, claims: Sequence[Claim]) -> None:
        """Give *claims*, of which nothing is in hand, to others."""
        claims = [claim for claim in claims if not claim.gone]
        if not claims or self._membership is None or self._commits is None:
            return
        for claim in claims:
            claim.unplan()
            self._turn_away(claim)
        self._commits.drop(claims)
        self._membership.release(claims)
        self._pump()

    def renamed(self, name: bytes) -> None:
        """Store as member *name* from now on."""
        if self._commits is not None:
            self._commits.rename(name)

    def late(self) -> None:
        """Nobody has taken over what is left, or the program is about to hear what was taken: go on behind that."""
        if self._tasks is not None:
            self._tasks.start_soon(self._go_on)

    async def _go_on(self) -> None:
        assert self._membership is not None
        logger.warning(
            "%s: group %s heard nothing of this member for %.3g s; it began nothing meanwhile",
            self._topic.name,
            self._group,
            self._session,
        )
        self._membership.go_on()
        self._wake()
        self._pump()

    async def _tell(self, deliveries: Sequence[Delivery]) -> None:
        try:
            await self._revoked(deliveries)
        except Exception:
            logger.exception("the callback for revoked deliveries failed")


def trackers(readers: Iterable[object], topic: str, group: str) -> Callable[[], dict[int, Tracker]]:
    """Return what tells, when it is called, how far those of *readers* are that are members of *group*."""

    def own() -> dict[int, Tracker]:
        return {
            number: claim.tracker
            for reader in readers
            if isinstance(reader, TopicConsumer) and reader.reads(topic, group)
            for number, claim in reader.claims.items()
        }

    return own


def _unheld(lease: object) -> DeliveryLost | None:
    """Return what settling *lease*, which is not held, comes to: nothing if it was settled before."""
    return None if isinstance(lease, Lease) and lease.settled else DeliveryLost()
