"""Looking at what is stored, and moving dead letters back."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Self, final

import msgspec
from typing_extensions import TypeVar

from ._binding import Bound
from .address import AnyDeadLetters, AnyQueue, DeadLetters
from .driver import Driver, Source, StoredRecord
from .errors import BrokerError, NotFound
from .message import Letter, Stored
from .policy import Start

S_co = TypeVar("S_co", bound=Stored[Any], covariant=True)

PAGE = 100


@final
class RedriveReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a redrive did.

    *seen* letters were looked at and *matched* of them were wanted.  Of those, *moved* are where they should go, *gone* were
    taken by somebody else meanwhile, and *failed* could not be moved and are still dead letters; *errors* has the first ten.
    In a dry run nothing is moved.
    """

    seen: int = 0
    matched: int = 0
    moved: int = 0
    gone: int = 0
    failed: int = 0
    errors: tuple[BrokerError, ...] = ()


class Pages(Generic[S_co]):
    """Iterates over what is stored, reading page by page."""

    def __init__(
        self,
        driver: Driver,
        bind: Callable[[], Awaitable[Bound]],
        show: Callable[[StoredRecord, Bound], S_co],
        limit: int,
        start: Start | None,
    ) -> None:
        self._driver = driver
        self._bind = bind
        self._show = show
        self._left = limit
        self._start = start
        self._bound: Bound | None = None
        self._page: deque[StoredRecord] = deque()
        self._after: str | None = None
        self._through = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> S_co:
        bound = self._bound
        if bound is None:
            bound = await self._bind()
            if self._start is not None and self._start.kind in ("time", "position") and not bound.capabilities.replay:
                raise bound.refuse(f"start={self._start!r}")
            self._bound = bound
        if not self._page and self._left > 0 and not self._through:
            await self._read(bound)
        if not self._page:
            raise StopAsyncIteration
        return self._show(self._page.popleft(), bound)

    async def _read(self, bound: Bound) -> None:
        wanted = min(PAGE, self._left)
        page: Sequence[StoredRecord] = ()
        try:
            page = await self._driver.browse(bound.address, limit=wanted, start=self._start, after=self._after)
        except NotFound:
            # Dead letters exist from the first one on: none yet is an empty list, no mistake.
            if not isinstance(bound.address, DeadLetters):
                raise
        self._page.extend(page)
        self._left -= len(page)
        self._through = len(page) < wanted
        if page:
            self._after, self._start = page[-1].position, None


async def redrive(
    driver: Driver,
    bound: Bound,
    to: AnyQueue,
    where: Callable[[Letter[Any]], bool] | None,
    limit: int | None,
    dry_run: bool,
) -> RedriveReport:
    """Move the letters of *bound* that *where* accepts to *to*, up to the end as it is now."""
    letters = bound.address
    assert isinstance(letters, DeadLetters)
    left = (await driver.backlog(Source(letters))).waiting
    seen = matched = moved = gone = failed = 0
    errors: list[BrokerError] = []
    after: str | None = None
    while (left is None or left > 0) and (limit is None or matched < limit):
        wanted = PAGE if left is None else min(PAGE, left)
        try:
            page = await driver.browse(letters, limit=wanted, after=after)
        except NotFound:
            break
        if not page:
            break
        chosen: list[str] = []
        for item in page:
            if limit is not None and matched == limit:
                break
            seen += 1
            if where is None or where(Letter(item, bound)):
                matched += 1
                chosen.append(item.position)
        for error in await _move(driver, letters, chosen, to, dry_run):
            if error is None:
                moved += 1
            elif isinstance(error, NotFound):
                gone += 1
            else:
                failed += 1
                errors.append(error)
        after = page[-1].position
        left = None if left is None else left - len(page)
    return RedriveReport(seen=seen, matched=matched, moved=moved, gone=gone, failed=failed, errors=tuple(errors[:10]))


async def _move(
    driver: Driver, letters: AnyDeadLetters, chosen: Sequence[str], to: AnyQueue, dry_run: bool
) -> Sequence[BrokerError | None]:
    return await driver.redrive(letters, chosen, to) if chosen and not dry_run else ()
