"""Membership of a consumer group: signs of life, and which partitions are one's own.

A rebalance stops nothing that stays: members keep what they hold while the group shares out anew (see `_assign`).  Three
things run side by side, none of which waits for another's connection: the rounds (joining, and learning one's share), the
signs of life, which go on while a round takes its time, and reading where to begin in what is new.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final

import anyio
from kio.schema.errors import ErrorCode

from ...errors import AuthenticationError, BrokerError, BrokerUnavailable, Closed, ConfigError, DeliveryLost
from ._assign import Share, read_claim, read_share, share_out
from ._cluster import PAUSE, Cluster
from ._coordinator import ATTEMPT, OFFSETS, ask, commit_codes, commit_error, committed, moved
from ._errors import LOST_MEMBER, RETRY, Unanswered, of_code
from ._hands import Hands, Told
from ._member import Member

logger = logging.getLogger("brokerkit")

_BEATS: Final = "signs of life"
"""The line of requests that are answered at once."""
_BEAT: Final = 1.0
"""Seconds between signs of life; less where the session is short."""
_PATIENCE: Final = 3.0
"""Seconds that one may take."""
_PARKED: Final = 5.0
"""Seconds until a request is made again that the coordinator answers when all others have come; that changes nothing."""
_NAMING: Final = 2.0
"""Seconds that being given a name may take, which is not given up half-way."""
_SOON: Final = 0.1
"""Seconds between signs of life while partitions move from one member to another."""
_MOVING: Final = 5.0
"""Seconds after a round that they are expected to."""
_LONG: Final = 1.0
"""Seconds until something is tried again that fails, or is not allowed, at most."""
_LATER: Final = (RETRY | LOST_MEMBER | {ErrorCode.rebalance_in_progress}) - {ErrorCode.unknown_topic_or_partition}
"""Answers to a commit after which it is sent again, if the partition is still in hand."""


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
        self._member = Member(group, topic)
        self._hands = Hands(group, session, told)
        self._problems: dict[str, BrokerError] = {}
        self._lives = 0
        """How often membership was lost."""
        self._count = -1
        """How many partitions were known when it joined, or shared out, for the last time."""
        self._moving_until = -math.inf
        self._asking = False
        """Whether a round is under way."""
        self._turns = 0
        """How many rounds have begun or ended: what was sent before says nothing about what is now."""
        self._due, self._new, self._soon = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._change = asyncio.Event()
        """Set, and made anew, when it shares out anew or does so without us."""
        self._joining: asyncio.Future[None] | None = None
        self._joined = self._left = False
        self._since = math.inf
        """Since when nobody has answered."""
        self._scope: anyio.CancelScope | None = None
        self._ended = asyncio.Event()
        self._ended.set()

    def __repr__(self) -> str:
        return f"<Group {self._group} generation={self._member.generation} held={sorted(self._hands.held)}>"

    @property
    def owned_until(self) -> float:
        """Until when what it holds is certainly its own, on the loop's clock."""
        return self._hands.owned_until

    @property
    def problem(self) -> BrokerError | None:
        """What keeps it from taking part at the moment."""
        return next(iter(self._problems.values()), None)

    # ------------------------------------------------------------------ taking part

    async def join(self) -> None:
        """Take part; `run` has begun, or does so meanwhile.

        Returns when the first share has been told.

        Raises:
            ConfigError: the group is another kind of client's, or the session not what brokers allow.
            AuthorizationError: the group may not be read.
            BrokerUnavailable: nobody answered.
        """
        loop = asyncio.get_running_loop()
        self._joining = loop.create_future()
        self._since = loop.time()
        self._due.set()
        await self._joining

    async def run(self) -> None:
        """Take part until `leave`, or until `join` or `Told.fail` was told why that cannot be."""
        if self._left:
            return
        self._ended.clear()
        if self._base:
            self._member.enlist(self._base)
        self._cluster.watch(self._topic)
        self._cluster.watchers.add(self._looked)
        try:
            async with anyio.create_task_group() as tasks:
                self._scope = tasks.cancel_scope
                tasks.start_soon(self._persist, self._live, "signs of life")
                tasks.start_soon(self._persist, self._place, "positions")
                await self._persist(self._take_part, "rounds")
        finally:
            self._scope = None
            self._cluster.watchers.discard(self._looked)
            self._cluster.unwatch(self._topic)
            self._cluster.drop(self)
            self._member.retire()
            if self._joining is not None and not self._joining.done():
                self._joining.set_exception(Closed("the consumer was left while it joined"))
            self._ended.set()
            self._changed()

    async def leave(self, *, timeout: float) -> None:
        """Take part no more, within *timeout* seconds: what is in hand is nobody's.

        A member with a name of its own is missed only when its session has ended.
        """
        self._left = True
        self._hands.drop()
        if self._scope is not None:
            self._scope.cancel()
        with anyio.move_on_after(timeout):
            await self._ended.wait()
            if self._member.id and self._member.instance is None:
                await self._sign_off()
        self._hands.drop()  # it may have been given something in the last moment
        self._member.forget()

    async def _sign_off(self) -> None:
        while True:
            try:
                answer = await ask(self._cluster, self._group, self._member.leave(), timeout=_PATIENCE, line=_BEATS)
            except BrokerError as error:
                if not isinstance(error, BrokerUnavailable):
                    return
            else:
                moved(self._cluster, self._group, answer.error_code)
                if answer.error_code not in RETRY:
                    return
            await asyncio.sleep(PAUSE)

    def let_go(self, partitions: Collection[int]) -> None:
        """Have nothing to do with *partitions* any more: others may have them."""
        if self._hands.let_go(partitions):
            self._due.set()

    def go_on(self) -> None:
        """Begin what is in hand again, after `Told.late`."""
        self._hands.go_on()

    def _looked(self) -> None:
        """Share out anew when the topic has other partitions than before."""
        if self._hands.generation >= 0 and self._known() not in {0, self._count}:
            self._due.set()

    def _known(self) -> int:
        info = self._cluster.known(self._topic)
        return 0 if info is None else len(info.partitions)

    def _prove(self, sent: float, *, calm: bool) -> None:
        if not self._left and self._hands.prove(sent, calm=calm):
            self._since = asyncio.get_running_loop().time()

    def _lose(self) -> None:
        """Be no member any more."""
        self._member.forget()
        self._lives += 1
        self._cluster.drop(self)  # what is asked for there is out of date
        self._due.set()
        self._hands.lose()
        self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _has_joined(self) -> None:
        self._joined = True
        if self._joining is not None and not self._joining.done():
            self._joining.set_result(None)

    # ------------------------------------------------------------------ surviving

    async def _persist(self, once: Callable[[], Awaitable[None]], what: str) -> None:
        """Do *once* again and again, whatever happens, until there is no hope."""
        pause = PAUSE
        while True:
            try:
                await once()
            except _Again:
                pause, wait = PAUSE, 0.0
            except BrokerError as error:
                if self._hopeless(error):
                    self._give_up(error)
                self._trouble(what, error)
                wait = pause if isinstance(error, BrokerUnavailable) else _LONG
                pause = min(2 * pause, _LONG, self._session / 4)
            except Exception as error:
                logger.exception("group %s: the driver failed", self._group)
                problem = BrokerError(f"the driver failed: {type(error).__name__}")
                problem.__cause__ = error
                if self._hopeless(problem):
                    self._give_up(problem)
                self._trouble(what, problem)
                wait = _LONG
            else:
                self._trouble(what, None)
                pause, wait = PAUSE, 0.0
            await asyncio.sleep(wait)

    def _hopeless(self, error: BrokerError) -> bool:
        if isinstance(error, (ConfigError, AuthenticationError)):
            return True
        if self._joined:
            return False
        silent = asyncio.get_running_loop().time() - self._since
        return not isinstance(error, BrokerUnavailable) or silent >= self._cluster.settings.timeout

    def _give_up(self, error: BrokerError) -> None:
        self._hands.drop()
        if self._joining is not None and not self._joining.done():
            self._joining.set_exception(error)
        elif not self._left:
            self._hands.tell(self._told.fail, error)
        if self._scope is not None:
            self._scope.cancel()

    def _trouble(self, of: str, error: BrokerError | None) -> None:
        """Note what *of* fails with, and tell the log of the first problem and the end of the last."""
        before = self.problem
        if error is None:
            self._problems.pop(of, None)
        else:
            self._problems[of] = error
        if error is not None and before is None:
            logger.warning("group %s: %s", self._group, error)
        elif before is not None and self.problem is None:
            logger.info("group %s: its coordinator answers again", self._group)

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
        loop, member, lives = asyncio.get_running_loop(), self._member, self._lives
        sent, answer = loop.time(), None
        if not member.id and member.instance is None:
            # A name that was given and never heard would keep the group waiting for a session.
            with anyio.CancelScope(shield=True):
                answer = await self._join(_NAMING)
        if answer is None:
            sent = loop.time()
            answer = await self._join(_PARKED)
        if answer is None or lives != self._lives:
            raise _Again
        member.id, member.generation = answer.member_id, int(answer.generation_id)
        self._prove(sent, calm=True)
        shares = await self._shares(answer) if answer.leader == answer.member_id else {}
        sent = loop.time()
        answer = await self._ask(member.sync(shares), _PARKED)
        if lives != self._lives:
            raise _Again
        self._check(answer.error_code, member.id)
        share = read_share(answer.assignment, self._topic)
        back = member.instance is not None and self._hands.generation < 0
        # Who is back under its name gets what it had without a rebalance: nobody would let go what was on its way then.
        if self._hands.take(share, member.generation) or (back and share.moving):
            self._due.set()
        self._prove(sent, calm=True)
        self._moving_until = loop.time() + _MOVING if share.moving else -math.inf
        self._soon.set()
        self._changed()
        if self._hands.unplaced:
            self._new.set()
        else:
            self._has_joined()
        self._looked()

    async def _join(self, timeout: float) -> Any:
        """Return the answer of who joins; None if it has a name now, and has to come again."""
        id, self._count = self._member.id, self._known()
        answer = await self._ask(self._member.join(self._hands.claim(self._count), self._session), timeout)
        if answer.error_code is ErrorCode.member_id_required:
            self._member.id = answer.member_id
            return None
        self._check(answer.error_code, id)
        return answer

    async def _ask(self, request: object, timeout: float) -> Any:
        """Make a request that may wait at the coordinator for the others."""
        late = asyncio.get_running_loop().time() + timeout - PAUSE
        try:
            return await ask(self._cluster, self._group, request, timeout=timeout, line=self)
        except Unanswered:
            if asyncio.get_running_loop().time() < late:
                raise
            raise _Again from None

    async def _shares(self, answer: Any) -> dict[str, Share]:
        """Share out, as the leader."""
        claims = {one.member_id: read_claim(one.metadata, self._topic) for one in answer.members}
        known = self._known()
        if not known or any(claim is not None and claim.count != known for claim in claims.values()):
            try:
                await self._cluster.topic(self._topic, timeout=1.0, fresh=True)
            except BrokerError as error:
                logger.debug("group %s: %s", self._group, error)
        self._count = self._known()
        return share_out(self._count, claims)

    def _check(self, code: ErrorCode, id: str) -> None:
        """Raise what *code*, the answer to a request of member *id*, comes to."""
        if code is ErrorCode.none:
            return
        if code is ErrorCode.unknown_member_id:
            if id == self._member.id:
                self._lose()
            raise _Again
        if code in {ErrorCode.rebalance_in_progress, ErrorCode.illegal_generation}:
            raise _Again
        moved(self._cluster, self._group, code)
        denied = code is ErrorCode.group_authorization_failed
        raise of_code(int(code), f"{'READ on' if denied else 'being a member of'} group {self._group}")

    # ------------------------------------------------------------------ signs of life

    async def _live(self) -> None:
        """Give one sign of life, when it is time."""
        loop, member = asyncio.get_running_loop(), self._member
        pause = min(_BEAT, self._session / 4)
        if loop.time() < self._moving_until or self.problem is not None:
            pause = min(pause, _SOON)
        self._soon.clear()
        with anyio.move_on_after(pause):
            await self._soon.wait()
            await asyncio.sleep(min(pause, _SOON))
        if member.generation < 0:
            return
        id, turns, sent = member.id, self._turns, loop.time()
        settled = self._hands.generation == member.generation
        # A coordinator that has just taken over answers signs of life before it knows anything, but not this.
        sure = settled and not self._asking and sent >= self.owned_until
        request, patience = member.sync() if sure else member.beat(), min(_PATIENCE, self._session / 2)
        try:
            answer = await ask(self._cluster, self._group, request, timeout=patience, line=_BEATS)
        except BrokerUnavailable:
            self._cluster.drop(self)  # a round that waits there waits in vain
            raise
        code = answer.error_code
        if id != member.id:
            return
        if code is ErrorCode.none:
            if sure or loop.time() < self.owned_until:
                self._prove(sent, calm=settled)
        elif code is ErrorCode.unknown_member_id:
            self._lose()
        elif code in {ErrorCode.rebalance_in_progress, ErrorCode.illegal_generation}:
            if code is ErrorCode.rebalance_in_progress:
                self._prove(sent, calm=False)
            self._come_again(turns)
        else:
            if code in RETRY:
                self._cluster.drop(self)
            self._check(code, id)

    def _come_again(self, turns: int) -> None:
        """Make a round, unless one was under way when that was asked."""
        if turns == self._turns and not self._asking:
            self._due.set()

    # ------------------------------------------------------------------ positions

    async def _place(self) -> None:
        """Find out where to begin in what is new, and tell."""
        hands = self._hands
        await self._new.wait()
        self._new.clear()
        numbers = hands.numbered(hands.unplaced)
        try:
            found = await committed(self._cluster, self._group, self._topic, numbers, ATTEMPT)
        except BaseException:
            self._new.set()
            raise
        hands.placed(found, numbers)
        if hands.unplaced:
            self._new.set()
        elif hands.generation >= 0:
            self._has_joined()

    async def commit(self, offsets: Mapping[int, tuple[int, str]], *, timeout: float) -> dict[int, BrokerError]:
        """Store *offsets*, each with its note, and return those that failed, with `DeliveryLost` where they are others'.

        It is sent before the first wait, unless the group is about to begin a generation: then it waits for that.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        numbers = self._hands.numbered(offsets)
        left, failed = dict(offsets), dict[int, BrokerError]()
        problem: BrokerError = BrokerUnavailable(f"group {self._group} has not shared out its partitions in time")
        while True:
            for partition in [partition for partition in left if not self._hands.has(partition, numbers[partition])]:
                failed[partition] = DeliveryLost()
                del left[partition]
            time = end - loop.time()
            if not left or time <= 0:
                return failed | dict.fromkeys(left, problem)
            if self._hands.generation != self._member.generation:
                with anyio.move_on_after(time):
                    await self._change.wait()
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
        id, turns, sent = self._member.id, self._turns, asyncio.get_running_loop().time()
        request = self._member.commit(offsets)
        codes = commit_codes(await ask(self._cluster, self._group, request, timeout=timeout, line=OFFSETS))
        if id != self._member.id:
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
