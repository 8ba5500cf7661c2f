"""One member of a group as its coordinator knows it: what it says of itself in every request."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Mapping
from typing import Any

from ._api import schema
from ._assign import PROTOCOL, PROTOCOL_TYPE, Claim, Share, write_claim, write_share
from ._coordinator import commit_request
from ._hands import REBALANCE

_instances: set[tuple[str, str]] = set()
"""Group and name of the static members in this process."""

_heartbeat = schema("Heartbeat")
_join_group = schema("JoinGroup")
_leave_group = schema("LeaveGroup")
_sync_group = schema("SyncGroup")


class Member:
    """Name and generation of a member of *group*, which reads *topic*, and its requests."""

    def __init__(self, group: str, topic: str) -> None:
        self.group = group
        self.topic = topic
        self.id = ""
        """What the coordinator calls it; empty while it is none."""
        self.generation = -1
        self.instance: str | None = None
        """A name of its own, under which it comes back."""

    def enlist(self, base: str) -> None:
        """Have a name that no other consumer of this process has in the group: the lowest, so that it is found again."""
        names = (f"{base}..{number}" for number in itertools.count())
        self.instance = next(name for name in names if (self.group, name) not in _instances)
        _instances.add((self.group, self.instance))

    def retire(self) -> None:
        """Leave the name to others in this process."""
        if self.instance is not None:
            _instances.discard((self.group, self.instance))

    def forget(self) -> None:
        """Be no member any more."""
        self.id, self.generation = "", -1

    # ------------------------------------------------------------------ requests

    def join(self, claim: Claim, session: float) -> Any:
        """Ask to be part of the next generation."""
        return _join_group.JoinGroupRequest(
            group_id=self.group,
            session_timeout=dt.timedelta(seconds=session),
            rebalance_timeout=dt.timedelta(seconds=REBALANCE * session),
            member_id=self.id,
            group_instance_id=self.instance,
            protocol_type=PROTOCOL_TYPE,
            protocols=(_join_group.JoinGroupRequestProtocol(name=PROTOCOL, metadata=write_claim(self.topic, claim)),),
        )

    def sync(self, shares: Mapping[str, Share] | None = None) -> Any:
        """Ask for our share; the leader tells all *shares*."""
        assignments = tuple(
            _sync_group.SyncGroupRequestAssignment(member_id=member, assignment=write_share(self.topic, share))
            for member, share in (shares or {}).items()
        )
        return _sync_group.SyncGroupRequest(
            group_id=self.group,
            generation_id=self.generation,
            member_id=self.id,
            group_instance_id=self.instance,
            protocol_type=PROTOCOL_TYPE,
            protocol_name=PROTOCOL,
            assignments=assignments,
        )

    def beat(self) -> Any:
        """Give a sign of life."""
        return _heartbeat.HeartbeatRequest(
            group_id=self.group, generation_id=self.generation, member_id=self.id, group_instance_id=self.instance
        )

    def commit(self, offsets: Mapping[int, tuple[int, str]]) -> Any:
        """Store *offsets* as a member."""
        return commit_request(
            self.group,
            self.topic,
            offsets,
            generation=self.generation,
            member=self.id,
            instance=self.instance,
        )

    def leave(self) -> Any:
        """Be missed by nobody."""
        return _leave_group.LeaveGroupRequest(
            group_id=self.group,
            members=(_leave_group.MemberIdentity(member_id=self.id, group_instance_id=self.instance),),
        )
