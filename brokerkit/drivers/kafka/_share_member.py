"""Membership of a share group: signs of life.

It decides nothing about what is read, since a session may fetch every partition of the topic.  It keeps the group from being
empty, so that nobody moves its position or removes it meanwhile, and it shows operators who takes part.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from collections.abc import Callable
from typing import Any, Final

import anyio
from kio.schema.errors import ErrorCode

from ...errors import BrokerError, BrokerUnavailable, ConfigError
from ._api import schema
from ._cluster import PAUSE, Cluster
from ._coordinator import ask, moved
from ._errors import DENIED, STALE_COORDINATOR, of_code

logger = logging.getLogger("brokerkit")

_BEATS: Final = "signs of life"
"""The line of requests that are answered at once, those of all members in this process."""
_PATIENCE: Final = 3.0
"""Seconds that a sign of life may take."""
_LONG: Final = 1.0
"""Seconds until something is tried again that is not allowed, or for which there is no room, at most."""
_JOIN, _LEAVE = 0, -1
_FORGOTTEN: Final = frozenset({ErrorCode.unknown_member_id, ErrorCode.fenced_member_epoch})
"""The group goes on without this member: it joins again."""
_NEVER: Final = frozenset({ErrorCode.unsupported_version, ErrorCode.invalid_request, ErrorCode.invalid_group_id})
"""What trying again does not help against."""

_heartbeat = schema("ShareGroupHeartbeat")


class ShareMember:
    """One member of a share group that reads one topic.

    Whatever happens after `run` was started, call `leave` in the end.
    """

    def __init__(self, cluster: Cluster, group: str, topic: str, fail: Callable[[BrokerError], None]) -> None:
        """Take part from `run` on; *fail* is told why that cannot be."""
        self.id = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        """Its own for good: what it holds stays with it when it joins again."""
        self.problem: BrokerError | None = None
        """What keeps it from taking part at the moment."""
        self._cluster = cluster
        self._group = group
        self._topic = topic
        self._fail = fail
        self._epoch = _JOIN
        self._joined: asyncio.Future[None] | None = None
        self._left = False
        self._scope: anyio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<ShareMember {self.id} of {self._group} epoch={self._epoch}>"

    async def join(self, *, timeout: float) -> None:
        """Return when the group has taken it up; `run` has begun, or does so meanwhile.

        Raises:
            BrokerUnavailable: that takes longer than *timeout* seconds.
        """
        if self._joined is None:
            self._joined = asyncio.get_running_loop().create_future()
        await asyncio.wait((self._joined,), timeout=timeout)
        if not self._joined.done():
            error = BrokerUnavailable(
                f"the group of {self._topic} takes nobody up: {self.problem or 'no answer in time'}"
            )
            error.__cause__ = self.problem
            raise error

    async def run(self) -> None:
        """Give signs of life until `leave`, or until *fail* was told why that cannot be."""
        with anyio.CancelScope() as self._scope:
            while not self._left:
                due = await self._beat()
                await asyncio.sleep(due)
        self._scope = None

    async def leave(self, *, timeout: float) -> None:
        """Take part no more; within *timeout* seconds the group is told."""
        self._left = True
        if self._scope is not None:
            self._scope.cancel()
        with anyio.move_on_after(timeout):
            while self._epoch != _JOIN:
                try:
                    answer = await self._ask(_LEAVE)
                except BrokerError as error:
                    if not isinstance(error, BrokerUnavailable):
                        break
                else:
                    if answer.error_code not in STALE_COORDINATOR:
                        break
                    moved(self._cluster, self._group, answer.error_code)
                await asyncio.sleep(PAUSE)
        self._epoch = _JOIN

    async def _ask(self, epoch: int) -> Any:
        request = _heartbeat.ShareGroupHeartbeatRequest(
            group_id=self._group,
            member_id=self.id,
            member_epoch=epoch,
            subscribed_topic_names=(self._topic,) if epoch == _JOIN else None,
        )
        return await ask(self._cluster, self._group, request, timeout=_PATIENCE, line=_BEATS)

    async def _beat(self) -> float:
        """Give one sign of life; return in how many seconds the next is due."""
        try:
            answer = await self._ask(self._epoch)
        except BrokerUnavailable as error:
            self._trouble(error)
            return 2 * PAUSE
        except BrokerError as error:
            return self._refused(error)
        except Exception as error:
            logger.exception("%s: a sign of life failed", self._group)
            broken = BrokerError(f"the driver failed: {type(error).__name__}")
            broken.__cause__ = error
            self._trouble(broken)
            return _LONG
        code = answer.error_code
        if code is ErrorCode.none:
            if self.problem is not None:
                logger.info("%s: takes part again", self._group)
            self.problem = None
            self._epoch = int(answer.member_epoch)
            if self._joined is None:
                self._joined = asyncio.get_running_loop().create_future()
            if not self._joined.done():
                self._joined.set_result(None)
            return max(PAUSE, float(answer.heartbeat_interval.total_seconds()))
        if code in _FORGOTTEN:
            self._epoch = _JOIN
            return PAUSE
        moved(self._cluster, self._group, code)
        return self._refused(self._error(code, answer.error_message))

    def _error(self, code: ErrorCode, said: str | None) -> BrokerError:
        if code is ErrorCode.group_id_not_found:
            error: BrokerError = ConfigError(
                f"group {self._group} is no share group any more: enter its queue anew ({said or 'says the broker'})"
            )
            error.__cause__ = of_code(int(code), "taking part").__cause__
            return error
        if code is ErrorCode.group_max_size_reached:
            text = f"the share group of {self._topic} has as many members as the brokers' group.share.max.size allows"
            error = ConfigError(text)
            error.__cause__ = of_code(int(code), "taking part").__cause__
            return error
        if code in DENIED:
            right = "DESCRIBE on topic" if code is ErrorCode.topic_authorization_failed else "READ on group"
            return of_code(int(code), f"{right} {self._topic}", said)
        return of_code(int(code), f"taking part in group {self._group}", said)

    def _refused(self, error: BrokerError) -> float:
        """Something is wrong that may not go away by itself: before it has joined that is the end."""
        joined = self._joined is not None and self._joined.done()
        code = getattr(error.__cause__, "code", 0)
        if isinstance(error, ConfigError) or code in _NEVER or not (joined or isinstance(error, BrokerUnavailable)):
            self._left = True
            self.problem = error
            self._fail(error)
            return 0.0
        self._trouble(error)
        return 2 * PAUSE if isinstance(error, BrokerUnavailable) else _LONG

    def _trouble(self, error: BrokerError) -> None:
        if self.problem is None and self._epoch != _JOIN:
            logger.warning("%s: a sign of life failed: %s", self._group, error)
        self.problem = error
