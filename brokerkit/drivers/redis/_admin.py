"""Everything but publishing and consuming: what exists, what is in it, and what moves or goes."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...address import Address, AnyDeadLetters, AnyQueue, DeadLetters, Queue, Topic
from ...driver import Backlog, Source, StoredRecord, redriven
from ...errors import BrokerError, CapabilityError, ConfigError, NotFound, SettingsMismatch
from ...policy import Start
from ._browse import TIMEOUT, Ahead, browse_letters, browse_queue, browse_topic, find_letters, letter_id
from ._context import Context
from ._errors import code_of
from ._frames import MAGIC, PREFIX, queue_blob
from ._keys import entity
from ._link import Argument
from ._publish import derived_settings, kind_of, settings_of
from ._scripts import Script
from ._topic import trackers
from ._topic_place import backlog as group_backlog
from ._topic_place import seek as group_seek

_DECLARE: Final = Script("admin_declare")
_DELETE: Final = Script("admin_delete")
_PURGE: Final = Script("admin_purge")
_BACKLOG: Final = Script("admin_backlog")
_REDRIVE: Final = Script("admin_redrive")

_MOVED_AT_ONCE: Final = 100
"""Letters in one call."""
_FRONT = struct.Struct(">BBHd")
"""How a frame begins: the number of its format, flags, attempts, and when it was first published."""


class Admin:
    """What a driver does for an administrator."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._link = context.link
        self._sealed = context.sealed
        self._ahead: dict[str, Ahead] = {}

    async def _call(
        self,
        script: Script,
        address: Address,
        keys: Sequence[bytes],
        args: Sequence[Argument],
        *,
        changes: bool = False,
    ) -> Any:
        """Run a script that may be sent again; with *changes* the answer means that they are as durable as asked for."""
        link = self._sealed if changes else self._link
        try:
            return await link.call(script, keys, args, timeout=TIMEOUT)
        except BrokerError as error:
            raise self._named(error, address) from error.__cause__

    def _named(self, error: BrokerError, address: Address) -> BrokerError:
        """Return *error* with the name of what it is about; scripts do not know names."""
        shown = self._context.settings.shown
        if isinstance(error, NotFound):
            # What is derived from another address nobody can declare.
            hint = "" if ".." in address.name else "; declare it"
            return NotFound(f"{address!r} does not exist on {shown}{hint}")
        if isinstance(error, SettingsMismatch):
            return SettingsMismatch(f"{address!r}: that name is another kind of address on {shown}")
        if error.__cause__ is not None and code_of(error.__cause__) == "WRONGTYPE":
            key = entity(address.name).decode()
            return BrokerError(
                f"{address!r}: {key} or a key that begins with it was not written by brokerkit ({error.__cause__})"
            )
        return error

    # ------------------------------------------------------------------ what exists

    async def declare(self, address: Address) -> None:
        """Create *address* with its settings if it is missing; its dead letters too if it is a queue."""
        keys = [entity(address.name)]
        if isinstance(address, Queue) and ".." not in address.name:
            keys.append(entity(address.dead_letters.name))
        await self._call(_DECLARE, address, keys, [kind_of(address), settings_of(address)], changes=True)

    async def describe(self, address: Address) -> Mapping[str, object] | None:
        """Return the settings that exist, None if *address* is missing."""
        names = ("partitions", "retention") if isinstance(address, Topic) else ("priorities", "dedup", "lease")
        command: tuple[Argument, ...] = (b"HMGET", entity(address.name), b"kind", *names)
        try:
            kind, *values = await self._link.command(*command, timeout=TIMEOUT)
        except BrokerError as error:
            raise self._named(error, address) from error.__cause__
        if kind is None:
            return None
        if kind != kind_of(address):
            raise self._named(SettingsMismatch(), address)
        if isinstance(address, DeadLetters):
            return {}
        try:
            return {name: _setting(name, value) for name, value in zip(names, values, strict=True)}
        except (TypeError, ValueError):
            raise BrokerError(f"{address!r}: the settings in {entity(address.name).decode()} are damaged") from None

    async def delete(self, address: Address, group: str | None) -> None:
        """Remove *address* with all that is derived from it, or only what belongs to *group*."""
        if group is not None and not isinstance(address, Topic):
            raise ConfigError(f"{address!r} has no groups; only topics do")
        key = entity(address.name)
        self._ahead.pop(address.name, None)
        await self._call(_DELETE, address, [key, _once(key)], [kind_of(address), group or ""], changes=True)

    # ------------------------------------------------------------------ what is in it

    async def browse(
        self, address: Address, *, limit: int, start: Start | None, after: str | None
    ) -> Sequence[StoredRecord]:
        """Return up to *limit* stored records behind position *after*, the oldest first."""
        if not isinstance(address, Topic) and start not in {None, Start.EARLIEST}:
            raise CapabilityError(f"start is for topics; {address!r} on redis is browsed from its oldest message")
        try:
            if isinstance(address, Topic):
                return await browse_topic(self._link, address, limit, start, after)
            if isinstance(address, Queue):
                return await browse_queue(self._link, address, limit, after, self._ahead)
            return await browse_letters(self._link, address, limit, after)
        except BrokerError as error:
            raise self._named(error, address) from error.__cause__

    async def backlog(self, source: Source) -> Backlog:
        """Return what is left to do."""
        address = source.address
        if isinstance(address, Topic):
            if source.group is None:
                if await self.describe(address) is None:
                    raise self._named(NotFound(), address)
                return Backlog()
            try:
                letters = entity(address.dead_letters(source.group).name) + b":l"
                count = await self._link.command(b"XLEN", letters, timeout=TIMEOUT)
                own = trackers(self._context.readers, address.name, source.group)
                return await group_backlog(self._link, source, int(count), own)
            except BrokerError as error:
                raise self._named(error, address) from error.__cause__
        other = address.of if isinstance(address, DeadLetters) else address.dead_letters
        keys = [entity(address.name), entity(other.name)]
        now, waiting, flying, delayed, dead_, *fronts = await self._call(_BACKLOG, address, keys, [kind_of(address)])
        times = [
            time for front in fronts if (time := _timestamp(front, 0 if isinstance(address, DeadLetters) else PREFIX))
        ]
        return Backlog(
            waiting=int(waiting),
            in_flight=int(flying),
            delayed=int(delayed),
            dead=None if isinstance(address, DeadLetters) else int(dead_),
            oldest_age=max(0.0, int(now) / 1000 - min(times)) if times else None,
        )

    # ------------------------------------------------------------------ what moves or goes

    async def purge(self, address: AnyQueue | AnyDeadLetters) -> int:
        """Remove all that waits and return how many."""
        if isinstance(address, Topic):
            raise CapabilityError(f"{address!r} cannot be purged: other groups read it")
        key = entity(address.name)
        keys = [key, _once(key)]
        self._ahead.pop(address.name, None)
        if isinstance(address, DeadLetters):
            keys.append(entity(address.of.name))
        return int(await self._call(_PURGE, address, keys, [kind_of(address)], changes=True))

    async def redrive(
        self, letters: AnyDeadLetters, positions: Sequence[str], to: AnyQueue
    ) -> Sequence[BrokerError | None]:
        """Move letters to *to*, each as a whole; one result each."""
        ids = [letter_id(position, letters) for position in positions]
        results: list[BrokerError | None] = []
        while len(results) < len(ids):
            part = ids[len(results) : len(results) + _MOVED_AT_ONCE]
            try:
                moved = await self._move_some(letters, part, to)
            except BrokerError as error:
                if not results:
                    raise
                results += [error] * (len(ids) - len(results))  # what was moved before is moved
            else:
                for done in moved:
                    gone = NotFound(f"there is no letter {positions[len(results)]}")
                    results.append(None if done else gone)
        return results

    async def _move_some(self, letters: AnyDeadLetters, ids: Sequence[str], to: AnyQueue) -> list[bool]:
        """Move the first of *ids*, as many as one reply has room for; tell of each of them whether it was moved."""
        try:
            found = await find_letters(self._link, letters, ids)
        except BrokerError as error:
            raise self._named(error, letters) from error.__cause__
        here = [place for place, id in enumerate(ids) if id in found]
        if here:  # behind the last one of the reply there may be more, that it had no room for
            ids = ids[: here[-1] + 1]
        args: list[Argument] = [derived_settings(to)]
        there = [id for id in ids if id in found]
        for id in there:
            args += (id, queue_blob(redriven(found[id].record, to)))
        key = entity(letters.name)
        answer = await self._call(_REDRIVE, to, [key, _once(key), entity(to.name)], args, changes=True)
        moved = iter(answer.decode())
        return [id in found and next(moved) == "1" for id in ids]

    async def seek(self, source: Source) -> None:
        """Move the position of a group without members, or store that of a new one."""
        try:
            await group_seek(self._sealed, source)
        except BrokerError as error:
            raise self._named(error, source.address) from error.__cause__


def _once(key: bytes) -> bytes:
    """Return the key under which the answer to one call is kept, so that it has its effect once however often it is sent."""
    return key + b":p:" + os.urandom(8).hex().encode()


def _setting(name: str, value: bytes | None) -> float | int | None:
    if name == "retention" and value == b"":
        return None
    if value is None:
        raise ValueError(name)
    return float(value) if name in {"retention", "dedup", "lease"} else int(value)


def _timestamp(front: bytes, at: int) -> float | None:
    """Return when the record was first published whose first bytes are *front*; None if it is none of ours."""
    if len(front) < at + _FRONT.size:
        return None
    magic, _, _, timestamp = _FRONT.unpack_from(front, at)
    return timestamp if magic == MAGIC else None
