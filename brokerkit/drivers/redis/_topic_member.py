"""Membership of a group: signs of life, and which partitions are one's own."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

from ...address import AnyTopic
from ...errors import BrokerError, BrokerUnavailable, NotFound
from ._keys import entity
from ._link import Argument, Link, Unanswered, ignore
from ._scripts import TOPIC_SYNC
from ._topic_claim import Claim

PATIENT: Final = 3600.0
"""Seconds until a call is given up that a reader cannot do without: when the connection is gone it hears of it at once."""
_SOONER: Final = 0.005
"""Seconds behind the end of another member's session at which one looks whether it has died."""


def new_name() -> bytes:
    """Return a name for a member that nobody else has."""
    return os.urandom(10).hex().encode()


class Told(Protocol):
    """Who takes part."""

    def granted(self, claims: Sequence[Claim]) -> None:
        """*claims* are ours."""
        ...

    def taken(self, claims: Sequence[Claim]) -> None:
        """*claims* belong to others by now."""
        ...

    def surplus(self, count: int) -> None:
        """Others wait for *count* partitions that are ours."""
        ...

    def renamed(self, name: bytes) -> None:
        """The member has another name."""
        ...

    def late(self) -> None:
        """A sign of life came too late, and what is left is ours all the same; call `Membership.go_on` when the program has
        begun to hear what is not.
        """
        ...

    def fail(self, error: BrokerError) -> None:
        """It cannot go on."""
        ...


class Membership:
    """One member of a group."""

    def __init__(
        self, link: Link, topic: AnyTopic, group: str, session: float, ends: list[int] | None, told: Told
    ) -> None:
        self._link = link
        self._topic = topic
        self._group = group
        self._session = session
        self._ends = ends
        self._told = told
        self._keys = [entity(topic.name)]
        self.name = new_name()
        self.claims: dict[int, Claim] = {}
        self.deadline = math.inf
        """When others may have taken over, as far as is known here; by the loop's clock."""
        self._proven = math.inf
        self._late = False
        self._letting: dict[Claim, bytes] = {}
        """Partitions that are let go, with the position to store."""
        self._busy = False
        self._again = False
        self._joins = False
        """Whether a call to join is not answered."""
        self._in = False
        self._member = False
        """Whether the server had this member the last time."""
        self._timer: asyncio.TimerHandle | None = None
        self._joining: asyncio.Future[None] | None = None

    # ------------------------------------------------------------------ taking part

    async def join(self) -> None:
        """Take part.

        Raises:
            NotFound: the group was deleted meanwhile.
            BrokerUnavailable: no answer.
        """
        self._in = True
        self._joining = joined = asyncio.get_running_loop().create_future()
        try:
            self._send()
            await joined
        finally:
            self._joining = None

    def soon(self) -> None:
        """Look at once who owns what."""
        if self._in:
            self._send()

    def go_on(self) -> None:
        """Begin and hand out again."""
        self._late = False
        self.deadline = self._proven

    def release(self, claims: Sequence[Claim]) -> None:
        """Let *claims* go, with what is done of them."""
        for claim in claims:
            self._letting[claim] = claim.position(claim.tracker)
            self.forget(claim)
        self.soon()

    def forget(self, claim: Claim) -> None:
        """Have nothing to do with *claim* any more."""
        claim.gone = True
        if self.claims.get(claim.number) is claim:
            del self.claims[claim.number]

    def stop(self) -> None:
        """Send no more signs of life."""
        self._in = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leave(self, *, stored: bool) -> asyncio.Future[Any]:
        """Let everything go, with what is done of it if *stored*; if the connection is gone, when it is back."""
        self.stop()
        letting = dict(self._letting)
        for claim in list(self.claims.values()):
            letting[claim] = claim.position(claim.tracker) if stored else b""
            self.forget(claim)
        return self._leave(letting)

    def _leave(self, letting: Mapping[Claim, bytes]) -> asyncio.Future[Any]:
        # A call to join that is not answered may arrive behind this one: it must find that it comes too late.
        args: list[Argument] = [self._group, self.name, 0, 3 if self._joins else 1, ""]
        for claim, position in letting.items():
            args += (claim.number, claim.epoch, position)
        left = self._link.call(TOPIC_SYNC, self._keys, args, timeout=self._session)
        left.add_done_callback(partial(self._left, args, asyncio.get_running_loop().time() + self._session))
        return left

    def _left(self, args: list[Argument], until: float, answer: asyncio.Future[Any]) -> None:
        """Try once more when the connection is mended, unless the session has ended by then."""
        if answer.cancelled() or not isinstance(answer.exception(), BrokerUnavailable):
            return
        watchers, loop = self._link.watchers, asyncio.get_running_loop()

        def mended(up: bool) -> None:
            if up:
                watchers.discard(mended)
                if loop.time() < until:
                    again = self._link.call(TOPIC_SYNC, self._keys, args, timeout=self._session)
                    again.add_done_callback(ignore)

        watchers.add(mended)
        loop.call_at(until, watchers.discard, mended)

    def _rename(self) -> None:
        """Be another member from now on: what was sent under the old name must find nothing."""
        self.name = new_name()
        self._told.renamed(self.name)

    # ------------------------------------------------------------------ signs of life

    def _send(self) -> None:
        if self._busy:
            self._again = True
            return
        self._busy, self._again = True, False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        known = " ".join(f"{claim.number}:{claim.epoch}" for claim in self.claims.values())
        self._joins = not self._member
        how = 2 if self._joins else 0
        args: list[Argument] = [self._group, self.name, math.ceil(self._session * 1000), how, known]
        letting = list(self._letting.items())
        for claim, position in letting:
            args += (claim.number, claim.epoch, position)
        # A call to join is never sent again: a late copy would bring a member back to life that has left.
        answer = self._link.call(TOPIC_SYNC, self._keys, args, timeout=PATIENT, again=not self._joins)
        answer.add_done_callback(partial(self._answered, loop.time(), [claim for claim, _ in letting]))

    def _answered(self, sent: float, let: list[Claim], answer: asyncio.Future[Any]) -> None:
        error = answer.exception()
        self._busy = False
        if not self._in:
            return
        if isinstance(error, Unanswered) and self._joins:
            self._leave({})
            self._rename()
            self._send()
            return
        if error is not None:
            self._failed(error)
            return
        self._joins = False
        reply = answer.result()
        self._member = reply[0] != -2
        if not self._member:
            self._apply(())
            self._rename()
            self._send()
            return
        self._proven = sent + self._session
        late = asyncio.get_running_loop().time() >= self.deadline
        for claim in let:
            self._letting.pop(claim, None)
        self._apply(reply[2:])
        if not late and not self._late:
            self.deadline = self._proven
        elif not self._late:
            # The program begins nothing any more: it must not go on before it has heard what was lost.
            self._late = True
            self._told.late()
        if self._joining is not None and not self._joining.done():
            self._joining.set_result(None)
        if self._again:
            self._send()
            return
        soonest = reply[0]
        wait = self._session / 4
        if soonest >= 0:
            wait = min(wait, soonest / 1000 + _SOONER)
        self._timer = asyncio.get_running_loop().call_later(wait, self._send)
        if reply[1]:
            self._told.surplus(reply[1])

    def _apply(self, owned: Sequence[Any]) -> None:
        """Take note of what is ours by now."""
        seen: set[Claim] = set()
        granted: list[Claim] = []
        for at in range(0, len(owned), 4):
            number, epoch, position, mark = int(owned[at]), int(owned[at + 1]), owned[at + 2], owned[at + 3]
            claim = self.claims.get(number)
            if claim is not None and claim.epoch == epoch:
                seen.add(claim)
            elif not any((let.number, let.epoch) == (number, epoch) for let in self._letting):
                end = None if self._ends is None else self._ends[number]
                granted.append(Claim(self._topic, number, epoch, position.decode() or "0-0 ", mark, end))
        taken = [claim for claim in self.claims.values() if claim not in seen]
        for claim in taken:
            self.forget(claim)
        if taken:
            self._told.taken(taken)
        for claim in granted:
            self.claims[claim.number] = claim
        if granted:
            self._told.granted(granted)

    def _failed(self, error: BaseException) -> None:
        failure = error if isinstance(error, BrokerError) else BrokerError(str(error))
        if isinstance(failure, NotFound):
            failure = NotFound(f"{self._topic.name} or its group {self._group} was deleted")
        if self._joining is not None:
            self._in = False
            if not self._joining.done():
                self._joining.set_exception(failure)
        elif isinstance(failure, BrokerUnavailable):
            self._timer = asyncio.get_running_loop().call_later(min(0.2, self._session / 8), self._send)
        else:
            self._told.fail(failure)
