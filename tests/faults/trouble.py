"""What went wrong while a play went on: faults that were done, and those that the histories themselves show."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from .history import Entry

SLOW: Final = 1.0
"""Seconds that a server takes for an answer if it is not in trouble, on a busy machine too."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was done to a process, or to the server."""

    what: str
    begin: float
    end: float = math.inf
    to: str | None = None
    """The process; None: whatever all processes have in common."""
    clean: bool = False
    """Nothing may be repeated because of it, but partitions move: a member came, or left as it should."""
    moves: bool = False
    """Partitions may move, so that a message that others have in hand is repeated too."""
    excuses: bool = True
    """Acknowledgements under way may be lost; else nothing may be repeated at all."""
    loses: float = 0.0
    """Seconds: what was stored in that time before it may be gone."""
    wipes: bool = False
    """All that was stored before its end is gone."""
    stops: bool = False
    """The process was stopped somewhere in what it did, and went on there in the end."""
    seen: bool = False
    """Nobody has done it: the histories show it."""
    times: int = 1
    """How often it may end what a process has with the server: each time counts a delivery."""

    def hits(self, process: str) -> bool:
        """Tell whether *process* is a victim."""
        return self.to is None or self.to == process


def stalled(entries: Iterable[Entry]) -> list[Fault]:
    """Return when an event loop stood still."""
    return [
        Fault(what="stall", begin=entry.at - entry.took, end=entry.at, to=entry.by, moves=True, stops=True, seen=True)
        for entry in entries
        if entry.what == "stalled"
    ]


def slow(entries: Iterable[Entry], faults: Sequence[Fault]) -> list[Fault]:
    """Return when the server has taken its time, though nobody has stopped who waited: on a busy machine that is a fault too."""
    asked: dict[tuple[str, str, str], float] = {}
    found: list[Fault] = []
    for entry in entries:
        match entry.what:
            case "publish" | "handled":
                asked[entry.by, entry.of, entry.id] = entry.at
            case "confirmed" | "unknown" | "acked":
                begin = asked.pop((entry.by, entry.of, entry.id), entry.at)
                stopped = any(
                    fault.to == entry.by and begin <= fault.end and fault.begin <= entry.at for fault in faults
                )
                if entry.at - begin <= SLOW or stopped:
                    continue
                while found and found[-1].end >= begin:
                    begin = min(begin, found.pop().begin)
                found.append(Fault(what="slow server", begin=begin, end=entry.at, seen=True))
            case _:
                pass
    return found


def caught_by(entries: Iterable[Entry], faults: Iterable[Fault]) -> dict[tuple[str, float], Fault]:
    """Return, by process and time, the runs that were about to begin when their process was stopped.

    Between its last look at the clock and the first line of a handler a process writes nothing down, and does nothing else: so
    there is one such run at most, and it is the first thing that is heard after the stop.
    """
    lines: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        lines[entry.by].append(entry)
    found: dict[tuple[str, float], Fault] = {}
    for fault in faults:
        if fault.stops and fault.to is not None:
            middle = (fault.begin + fault.end) / 2  # at its begin and its end the process may be running
            first = next((entry for entry in lines[fault.to] if entry.at > middle), None)
            if first is not None and first.what == "started":
                found.setdefault((first.by, first.at), fault)
    return found
