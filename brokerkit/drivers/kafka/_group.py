"""Membership of a consumer group: signs of life, and which partitions are one's own.

A rebalance stops nothing that stays: members keep what they hold while the group shares out anew (see `_assign`).  Three
things run side by side, each on its own connection or line: the rounds (joining, and learning one's share), the signs of
life, which go on while a round takes its time, and the reading of positions of what is new.

Who may believe in its partitions is decided by when the broker may give them to others at the earliest:

* *session* seconds after it received the last request of ours, so counted from when that was sent;
* after a rebalance has begun, as soon as everybody else has come again, or ``2 * session`` seconds later: from then on signs
  of life help only for so long.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol

import anyio
from kio.schema.errors import ErrorCode
from kio.schema.heartbeat.v4 import request as heartbeat
from kio.schema.join_group.v7 import request as join_group
from kio.schema.leave_group.v4 import request as leave_group
from kio.schema.sync_group.v5 import request as sync_group

from ...errors import (
    AuthenticationError,
    BrokerError,
    BrokerUnavailable,
    Closed,
    ConfigError,
    DeliveryLost,
)
from ._assign import PROTOCOL, PROTOCOL_TYPE, Claim, Share, read_claim, read_share, share_out, write_claim, write_share
from ._cluster import PAUSE, Cluster
from ._coordinator import ATTEMPT, OFFSETS, ask, commit_codes, commit_error, commit_request, committed, moved
from ._errors import LOST_MEMBER, RETRY, Unanswered, of_code

logger = logging.getLogger("brokerkit")

_BEATS: Final = "signs of life"
"""The line of requests that are answered at once."""
_PARKED: Final = 5.0
"""Seconds until a request is made again that the coordinator answers when all others have come; that changes nothing."""
_PATIENCE: Final = 3.0
"""Seconds that a sign of life may take."""
_NAMING: Final = 2.0
"""The same for asking for a name: it is not given up half-way."""
_SOON: Final = 0.1
"""Seconds between signs of life while partitions move."""
_MOVING: Final = 5.0
"""Seconds after a round that they are expected to."""
_DENIED: Final = 1.0
"""Seconds until something is tried again that the user may not do."""
_LONGEST_PAUSE: Final = 1.0

# The generated schemas have number types of their own, which plain numbers satisfy.
_heartbeat: Any = heartbeat
_join_group: Any = join_group
_leave_group: Any = leave_group
_sync_group: Any = sync_group
_LATER: Final = (RETRY | LOST_MEMBER) - {ErrorCode.unknown_topic_or_partition} | {ErrorCode.rebalance_in_progress}
"""Answers to a commit after which it is sent again, if the partition is still in hand."""
_instances: set[tuple[str, str]] = set()
"""Group and name of the static members in this process."""


class Told(Protocol):
    """Who takes part.  None of these may wait."""

    def assigned(self, partitions: Mapping[int, tuple[int, str] | None], /) -> None:
        """Take *partitions* in hand, each with the position that is stored and its note; None where nothing is."""
        ...

    def taken(self, partitions: Collection[int], /) -> None:
        """Finish with *partitions*, for which others wait, and call `Group.let_go`."""
        ...

    def lost(self, partitions: Collection[int], /) -> None:
        """Drop *partitions*: they belong to others by now, and no commit of them can succeed."""
        ...

    def late(self) -> None:
        """Call `Group.go_on` when the program has heard what is lost.

        Signs of life came too late for a while, or membership was lost: until then nothing is begun.
        """
        ...

    def fail(self, error: BrokerError, /) -> None:
        """Learn that it cannot go on."""
        ...


class _Again(Exception):
    """The round is out of date: make another one at once."""


class Group:
    """One member of a group that reads one topic.

    `run` works for as long as it takes part; `join` waits until it does.  Whatever happens after `run` was started, call
    `leave` in the end.
    """

    def __init__(
        self, cluster: Cluster, group: str, topic: str, told: Told, *, session: float, instance: str = ""
    ) -> None:
        """Be a member that survives *session* seconds without a sign of life.

        With *instance*, which no other process has, it comes back as the same member within that time.
        """
        self._cluster = cluster
        self._group = group
        self._topic = topic
        self._told = told
        self._session = session
        self._base = instance
        self._instance: str | None = None
        self.owned_until = -math.inf
        """Until when what it holds is certainly its own, on the loop's clock."""
        self.problem: BrokerError | None = None
        """What keeps it from taking part at the moment."""
        self.member = ""
        self.generation = -1
        self._synced = -1
        """The generation of the share it holds."""
        self._held: dict[int, int] = {}
        """What is in its hands, each with a number of its own: partitions come and go."""
        self._leaving: set[int] = set()
        self._unplaced: set[int] = set()
        """What nobody has been told of yet: where to begin is not known."""
        self._numbers = itertools.count()
        self._lives = 0
        """How often membership was lost."""
        self._count = -1
        """How many partitions were known when it joined for the last time."""
        self._proven = self._calm = -math.inf
        self._late = False
        self._moving_until = -math.inf
        self._asking = False
        """Whether a round is under way."""
        self._turns = 0
        """How many rounds have begun or ended: what was sent before says nothing about what is now."""
        self._due, self._new, self._soon = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._changes: set[asyncio.Future[None]] = set()
        self._joining: asyncio.Future[None] | None = None
        self._joined = self._left = False
        self._since = math.inf
        """Since when nobody has answered."""
        self._scope: anyio.CancelScope | None = None
        self._ended = asyncio.Event()
        self._ended.set()

    def __repr__(self) -> str:
        return f"<Group {self._group} generation={self.generation} held={sorted(self._held)}>"

    @property
    def held(self) -> frozenset[int]:
        """What is in its hands by now."""
        return frozenset(self._held)

    # ------------------------------------------------------------------ taking part

    async def join(self) -> None:
        """Take part; `run` has begun, or does so meanwhile.

        Returns when the first share has been told.

        Raises:
            ConfigError: the group is another kind of client's, or the session not what brokers allow.
            AuthorizationError: the group may not be read.
            BrokerUnavailable: nobody answered.
        """
        self._joining = joining = asyncio.get_running_loop().create_future()
        self._since = asyncio.get_running_loop().time()
        self._due.set()
        await joining

    async def run(self) -> None:
        """Take part until `leave`, or until `join` or `Told.fail` was told why that cannot be."""
        if self._left:
            return
        self._ended.clear()
        self._enlist()
        self._cluster.watch(self._topic)
        self._cluster.watchers.add(self._looked)
        try:
            async with anyio.create_task_group() as tasks:
                self._scope = tasks.cancel_scope
                tasks.start_soon(self._persist, self._live, "signs of life")
                tasks.start_soon(self._persist, self._place, "positions")
                await self._persist(self._take_part, "rounds")
                tasks.cancel_scope.cancel()
        finally:
            self._scope = None
            self._cluster.watchers.discard(self._looked)
            self._cluster.unwatch(self._topic)
            self._cluster.drop(self)
            if self._instance is not None:
                _instances.discard((self._group, self._instance))
            if self._joining is not None and not self._joining.done():
                self._joining.set_exception(Closed("the consumer was left while it joined"))
            self._ended.set()
            self._changed()

    def _enlist(self) -> None:
        """Have a name that no other consumer of this process has in the group: the lowest, so that it is found again."""
        if self._base:
            names = (f"{self._base}..{number}" for number in itertools.count())
            self._instance = next(name for name in names if (self._group, name) not in _instances)
            _instances.add((self._group, self._instance))

    async def leave(self, *, timeout: float) -> None:
        """Take part no more, within *timeout* seconds: what is in hand is nobody's.

        A member with a name of its own is missed only when its session has ended.
        """
        self._left = True
        if self._scope is not None:
            self._scope.cancel()
        self.owned_until = self._proven = -math.inf
        self._drop_all()
        with anyio.move_on_after(timeout):
            await self._ended.wait()
            if self.member and self._instance is None:
                await self._sign_off()
        self.member, self.generation = "", -1

    async def _sign_off(self) -> None:
        request = _leave_group.LeaveGroupRequest(
            group_id=self._group,
            members=(_leave_group.MemberIdentity(member_id=self.member, group_instance_id=None),),
        )
        while True:
            try:
                answer = await ask(self._cluster, self._group, request, timeout=_PATIENCE, line=_BEATS)
            except BrokerUnavailable:
                pass
            except BrokerError:
                return
            else:
                moved(self._cluster, self._group, answer.error_code)
                if answer.error_code not in RETRY:
                    return
            await asyncio.sleep(PAUSE)

    def let_go(self, partitions: Collection[int]) -> None:
        """Have nothing to do with *partitions* any more: others may have them."""
        gone = [partition for partition in partitions if partition in self._held]
        for partition in gone:
            del self._held[partition]
            self._leaving.discard(partition)
            self._unplaced.discard(partition)
        if gone:
            self._due.set()

    def go_on(self) -> None:
        """Begin what is in hand again, after `Told.late`."""
        self._late = False
        self.owned_until = self._proven

    def _looked(self) -> None:
        """Share out anew when the topic has other partitions than before."""
        if self._synced >= 0 and self._known() not in {0, self._count}:
            self._due.set()

    def _known(self) -> int:
        info = self._cluster.known(self._topic)
        return 0 if info is None else len(info.partitions)

    # ------------------------------------------------------------------ what is one's own

    def _prove(self, sent: float, *, calm: bool) -> None:
        """Take note that a request *sent* at that time was one of a member.

        *calm*: no rebalance had begun before it was received.
        """
        if calm:
            self._calm = max(self._calm, sent)
        now = asyncio.get_running_loop().time()
        until = min(sent + self._session, self._calm + 2 * self._session)
        if until <= now:
            return
        self._proven = max(self._proven, until)
        self._since = now
        self._trouble(None)
        if self._late:
            return
        if now >= self.owned_until and len(self._held) > len(self._unplaced):
            # The program begins nothing any more: it must not go on before it has heard what was lost.
            self._late = True
            self._tell(self._told.late)
        else:
            self.owned_until = self._proven

    def _lose(self) -> None:
        """Be no member any more."""
        lost = self._drop_all()
        self.member, self.generation = "", -1
        self._lives += 1
        self._proven = self._calm = self.owned_until = -math.inf
        self._cluster.drop(self)  # what is asked for there is out of date
        self._due.set()
        if lost:
            self._tell(self._told.lost, lost)
            if not self._late:
                self._late = True
                self._tell(self._told.late)
        self._changed()

    def _drop_all(self) -> list[int]:
        """Hold nothing; return what others know that we held."""
        known = [partition for partition in self._held if partition not in self._unplaced]
        self._held.clear()
        self._leaving.clear()
        self._unplaced.clear()
        self._synced = -1
        return known

    def _take(self, share: Share) -> None:
        """Make *share* our own, and find out what others wait for."""
        surplus = self._held.keys() - share.partitions - self._leaving
        gained = share.partitions - self._held.keys()
        self.let_go(surplus & self._unplaced)
        surplus &= self._held.keys()
        self._leaving |= surplus
        for partition in gained:
            self._held[partition] = next(self._numbers)
            self._unplaced.add(partition)
        loop = asyncio.get_running_loop()
        self._moving_until = loop.time() + _MOVING if share.moving else -math.inf
        self._soon.set()
        self._changed()
        if surplus:
            self._tell(self._told.taken, sorted(surplus))
        if self._unplaced:
            self._new.set()
        else:
            self._has_joined()
        self._looked()

    def _has_joined(self) -> None:
        self._joined = True
        if self._joining is not None and not self._joining.done():
            self._joining.set_result(None)

    def _tell(self, what: Callable[..., None], *args: object) -> None:
        try:
            what(*args)
        except Exception:
            logger.exception("group %s: the consumer failed to take note", self._group)

    def _changed(self) -> None:
        for waiting in self._changes:
            if not waiting.done():
                waiting.set_result(None)
        self._changes.clear()

    def _trouble(self, error: BrokerError | None) -> None:
        """Note what keeps it from taking part, and tell the log of each cause once."""
        if error is not None and self.problem is None:
            logger.warning("group %s: %s", self._group, error)
        elif error is None and self.problem is not None:
            logger.info("group %s: its coordinator answers again", self._group)
        self.problem = error

    # ------------------------------------------------------------------ surviving

    async def _persist(self, once: Callable[[], Any], what: str) -> None:
        """Do *once* again and again, whatever happens, but for what cannot get better."""
        loop = asyncio.get_running_loop()
        pause = PAUSE
        while True:
            try:
                await once()
            except _Again:
                pause, wait = PAUSE, 0.0
            except BrokerError as error:
                if self._hopeless(error, loop.time() - self._since):
                    self._give_up(error)
                    return
                self._trouble(error)
                wait = pause if isinstance(error, BrokerUnavailable) else _DENIED
                pause = min(2 * pause, _LONGEST_PAUSE)
            except Exception as error:
                logger.exception("group %s: %s failed", self._group, what)
                problem = BrokerError(f"the driver failed: {type(error).__name__}")
                problem.__cause__ = error
                if self._hopeless(problem, 0.0):
                    self._give_up(problem)
                    return
                wait = _LONGEST_PAUSE
            else:
                pause, wait = PAUSE, 0.0
            await asyncio.sleep(wait)

    def _hopeless(self, error: BrokerError, tried: float) -> bool:
        if isinstance(error, (ConfigError, AuthenticationError)):
            return True
        if self._joined:
            return False
        return not isinstance(error, BrokerUnavailable) or tried >= self._cluster.settings.timeout

    def _give_up(self, error: BrokerError) -> None:
        self.problem = error
        self.owned_until = self._proven = -math.inf
        if self._joining is not None and not self._joining.done():
            self._joining.set_exception(error)
        else:
            self._tell(self._told.fail, error)
        if self._scope is not None:
            self._scope.cancel()

    # ------------------------------------------------------------------ rounds

    async def _take_part(self) -> None:
        await self._due.wait()
        self._due.clear()
        self._asking = True
        self._turns += 1
        try:
            await self._round()
        except BaseException:
            self._due.set()
            raise
        finally:
            self._asking = False
            self._turns += 1

    async def _round(self) -> None:
        """Join, and learn one's share."""
        lives, sent, answer = self._lives, asyncio.get_running_loop().time(), None
        if not self.member and self._instance is None:
            # A name that was given and never heard would keep the group waiting for a session.
            with anyio.CancelScope(shield=True):
                answer = await self._join(_NAMING)
        if answer is None:
            sent = asyncio.get_running_loop().time()
            answer = await self._join(_PARKED)
        if answer is None or lives != self._lives:
            raise _Again
        self.member, self.generation = answer.member_id, int(answer.generation_id)
        self._prove(sent, calm=True)
        shares = await self._shares(answer) if answer.leader == answer.member_id else {}
        assignments = tuple(
            _sync_group.SyncGroupRequestAssignment(member_id=member, assignment=write_share(self._topic, share))
            for member, share in shares.items()
        )
        sent = asyncio.get_running_loop().time()
        answer = await self._ask(self._sync_request(assignments), _PARKED)
        if lives != self._lives:
            raise _Again
        self._check(answer.error_code, self.member)
        self._synced = self.generation
        self._prove(sent, calm=True)
        self._take(read_share(answer.assignment, self._topic))

    async def _join(self, timeout: float) -> Any:
        """Return the answer of who joins; None if it has a name now, and has to come again."""
        member, self._count = self.member, self._known()
        claim = Claim(frozenset(self._held), frozenset(self._leaving), self._synced, self._count)
        request = _join_group.JoinGroupRequest(
            group_id=self._group,
            session_timeout=dt.timedelta(seconds=self._session),
            rebalance_timeout=dt.timedelta(seconds=2 * self._session),
            member_id=member,
            group_instance_id=self._instance,
            protocol_type=PROTOCOL_TYPE,
            protocols=(_join_group.JoinGroupRequestProtocol(name=PROTOCOL, metadata=write_claim(self._topic, claim)),),
        )
        answer = await self._ask(request, timeout)
        if answer.error_code is ErrorCode.member_id_required:
            self.member = answer.member_id
            return None
        self._check(answer.error_code, member)
        return answer

    async def _ask(self, request: object, timeout: float) -> Any:
        """Make a request that may wait at the coordinator for the others."""
        loop = asyncio.get_running_loop()
        sent = loop.time()
        try:
            return await ask(self._cluster, self._group, request, timeout=timeout, line=self)
        except Unanswered:
            if loop.time() - sent < timeout - PAUSE:
                raise
            raise _Again from None

    async def _shares(self, answer: Any) -> dict[str, Share]:
        """Share out, as the leader."""
        claims = {one.member_id: read_claim(one.metadata, self._topic) for one in answer.members}
        if any(claim is not None and claim.count != self._known() for claim in claims.values()):
            try:
                await self._cluster.topic(self._topic, timeout=1.0, fresh=True)
            except BrokerError as error:
                logger.debug("group %s: %s", self._group, error)
        self._count = self._known()
        return share_out(self._count, claims)

    def _sync_request(self, assignments: tuple[Any, ...] = ()) -> Any:
        return _sync_group.SyncGroupRequest(
            group_id=self._group,
            generation_id=self.generation,
            member_id=self.member,
            group_instance_id=self._instance,
            protocol_type=PROTOCOL_TYPE,
            protocol_name=PROTOCOL,
            assignments=assignments,
        )

    def _check(self, code: ErrorCode, member: str) -> None:
        """Raise what *code*, the answer to a round's request of *member*, comes to."""
        if code is ErrorCode.none:
            return
        if code is ErrorCode.unknown_member_id:
            if member == self.member:
                self._lose()
            raise _Again
        if code in {ErrorCode.rebalance_in_progress, ErrorCode.illegal_generation}:
            raise _Again
        moved(self._cluster, self._group, code)
        raise of_code(int(code), f"READ on group {self._group}")

    # ------------------------------------------------------------------ signs of life

    async def _live(self) -> None:
        """Give one sign of life, when it is time."""
        loop = asyncio.get_running_loop()
        pause = min(1.0, self._session / 4)
        if loop.time() < self._moving_until:
            pause = min(pause, _SOON)
        self._soon.clear()
        with anyio.move_on_after(pause):
            await self._soon.wait()
            await asyncio.sleep(min(pause, _SOON))
        if self.generation < 0:
            return
        member, generation, turns, sent = self.member, self.generation, self._turns, loop.time()
        settled = self._synced == generation
        # A coordinator that has just taken over answers signs of life before it knows anything, but not this.
        sure = settled and not self._asking and sent >= self.owned_until
        request = self._sync_request() if sure else self._beat_request()
        try:
            answer = await ask(
                self._cluster, self._group, request, timeout=min(_PATIENCE, self._session / 3), line=_BEATS
            )
        except BrokerUnavailable:
            self._cluster.drop(self)  # a round that waits there waits in vain
            raise
        if member != self.member:
            return
        code = answer.error_code
        if code is ErrorCode.none:
            self._prove(sent, calm=settled)
        elif code is ErrorCode.rebalance_in_progress:
            self._prove(sent, calm=False)
            self._come_again(turns)
        elif code is ErrorCode.illegal_generation:
            self._come_again(turns)
        elif code is ErrorCode.unknown_member_id:
            self._lose()
        else:
            if code in RETRY:
                self._cluster.drop(self)
            self._check(code, member)

    def _beat_request(self) -> Any:
        return _heartbeat.HeartbeatRequest(
            group_id=self._group,
            generation_id=self.generation,
            member_id=self.member,
            group_instance_id=self._instance,
        )

    def _come_again(self, turns: int) -> None:
        """Make a round, unless one was under way when that was asked."""
        if turns == self._turns and not self._asking:
            self._due.set()

    # ------------------------------------------------------------------ positions

    async def _place(self) -> None:
        """Find out where to begin in what is new, and tell."""
        await self._new.wait()
        self._new.clear()
        new = {partition: self._held[partition] for partition in self._unplaced}
        try:
            found = await committed(self._cluster, self._group, self._topic, new, ATTEMPT)
        except BaseException:
            self._new.set()
            raise
        mine = {partition: found[partition] for partition, number in new.items() if self._is(partition, number)}
        self._unplaced -= mine.keys()
        if mine:
            self._tell(self._told.assigned, mine)
        if self._unplaced:
            self._new.set()
        elif self._synced >= 0:
            self._has_joined()

    def _is(self, partition: int, number: int) -> bool:
        return self._held.get(partition) == number

    async def commit(self, offsets: Mapping[int, tuple[int, str]], *, timeout: float) -> dict[int, BrokerError]:
        """Store *offsets*, each with its note, and return those that failed, with `DeliveryLost` where they are others'.

        It is sent before the first wait, unless the group is about to begin a generation: then it waits for that.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        numbers = {partition: self._held.get(partition, -1) for partition in offsets}
        left, failed = dict(offsets), dict[int, BrokerError]()
        problem: BrokerError = BrokerUnavailable(f"group {self._group} has not shared out its partitions in time")
        while True:
            for partition in [partition for partition in left if not self._is(partition, numbers[partition])]:
                failed[partition] = DeliveryLost()
                del left[partition]
            time = end - loop.time()
            if not left or time <= 0:
                return failed | dict.fromkeys(left, problem)
            if self._synced != self.generation:
                await self._change(time)
                continue
            try:
                codes = await self._commit(left, min(time, ATTEMPT))
            except BrokerUnavailable as error:
                problem = error
            except BrokerError as error:
                return failed | dict.fromkeys(left, error)
            else:
                for partition, code in codes.items():
                    if code is ErrorCode.none:
                        left.pop(partition, None)
                    elif code not in _LATER:
                        failed[partition] = commit_error(code, self._group, self._topic)
                        left.pop(partition, None)
                    else:
                        problem = of_code(int(code), f"storing the position of group {self._group}")
            if left:
                await asyncio.sleep(max(0.0, min(PAUSE, end - loop.time())))

    async def _commit(self, offsets: Mapping[int, tuple[int, str]], timeout: float) -> dict[int, ErrorCode]:
        """Ask once to store *offsets*, and take note of what the answer says about membership."""
        member, turns, sent = self.member, self._turns, asyncio.get_running_loop().time()
        request = commit_request(
            self._group,
            self._topic,
            offsets,
            generation=self.generation,
            member=member,
            instance=self._instance,
        )
        codes = commit_codes(await ask(self._cluster, self._group, request, timeout=timeout, line=OFFSETS))
        if member != self.member:
            return codes
        for code in set(codes.values()):
            if code is ErrorCode.none:
                self._prove(sent, calm=False)
            elif code in {ErrorCode.rebalance_in_progress, ErrorCode.illegal_generation}:
                self._come_again(turns)
            elif code is ErrorCode.unknown_member_id:
                self._lose()
            else:
                moved(self._cluster, self._group, code)
        return codes

    async def _change(self, timeout: float) -> None:
        """Wait until the group has shared out anew, or does so without us."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.add(waiting)
        try:
            with anyio.move_on_after(timeout):
                await waiting
        finally:
            self._changes.discard(waiting)
