"""The demo's ledger: what the service tells about itself, and the sums that must come out.

The service writes each event of brokerkit as a line of a file, so that nothing is forgotten when it is killed.  Whoever counts
counts ids, since a message may come again after a crash: at least once is what brokers promise.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from brokerkit import Backlog, Letter, Queue, Topic
from brokerkit.events import Event

Entry = dict[str, Any]


class Ledger:
    """Lines of a file, written by any number of processes."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self._prefix = prefix
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_RDWR)

    def write(self, event: Event) -> None:
        """Write down an event of brokerkit: this is the `on_event` of the service's broker."""
        names = {
            "address": event.address.removeprefix(self._prefix),
            "group": (event.group or "").removeprefix(self._prefix),
        }
        self.note(type(event).__name__, **{**asdict(event), **names})

    def note(self, what: str, **facts: object) -> None:
        """Write down anything else."""
        # One write at the end of the file: nothing gets between.  What a kill has cut off before stands on a line of its own.
        os.write(self._file, b"\n" + json.dumps({"what": what, "at": time.time(), **facts}).encode() + b"\n")

    def read(self, what: str, **facts: object) -> list[Entry]:
        """Return the entries so far of one kind that have all of *facts*."""
        entries = self._entries()
        return [e for e in entries if e["what"] == what and all(e.get(name) == value for name, value in facts.items())]

    def _entries(self) -> Iterator[Entry]:
        *lines, _ = self.path.read_bytes().split(b"\n")  # whoever reads may see a part of what is being written
        for line in lines:
            with suppress(ValueError):  # empty, or cut off by a kill
                yield json.loads(line)


def nothing(ledger: Ledger) -> Mapping[str, str]:
    return {}


@dataclass
class Station:
    """A subscription of the demo: the ids that must come through it, and the key of each where order counts."""

    name: str
    address: Topic[Any] | Queue[Any, Any]
    group: str | None
    expected: Callable[[Ledger], set[str]]
    keys: Callable[[Ledger], Mapping[str, str]] = nothing

    @property
    def title(self) -> str:
        return f"topic {self.address.name}, group {self.group}" if self.group else f"queue {self.address.name}"

    def entries(self, ledger: Ledger, what: str) -> list[Entry]:
        return ledger.read(what, address=self.address.name, group=self.group or "")

    def missing(self, ledger: Ledger) -> set[str]:
        """Return what has neither been handled nor died so far."""
        seen = {entry["id"] for what in ("Handled", "DeadLettered") for entry in self.entries(ledger, what)}
        return self.expected(ledger) - seen


@dataclass
class Report:
    """Prints what happened and remembers what is wrong."""

    ledger: Ledger
    killed: bool
    wrong: list[str] = field(default_factory=list[str])

    def check(self, right: bool, otherwise: str) -> None:
        if not right:
            self.wrong.append(otherwise)

    def none(self, ids: Set[str], what: str) -> None:
        """Check that there are no such messages."""
        self.check(not ids, f"{what}: {len(ids)} messages, like {', '.join(sorted(ids)[:3])}")

    def station(self, station: Station, letters: list[Letter[Any]], backlog: Backlog) -> None:
        """Check that each message that came in also came out, once or as a dead letter, and print the sum."""
        name = station.name
        expected = station.expected(self.ledger)
        handled = Counter(entry["id"] for entry in station.entries(self.ledger, "Handled"))
        retried = {(entry["id"], entry["attempt"]) for entry in station.entries(self.ledger, "Retried")}
        died = {entry["id"] for entry in station.entries(self.ledger, "DeadLettered")}
        dead = Counter(letter.id for letter in letters)
        again = handled.total() + dead.total() - len(handled) - len(dead)

        self.check(bool(expected), f"{name}: nothing came")
        self.none(expected - {*handled, *dead}, f"{name}: neither handled nor dead")
        self.none({*handled, *dead} - expected, f"{name}: nobody has published")
        self.none(handled.keys() & dead.keys(), f"{name}: both handled and dead")
        self.none(died - dead.keys(), f"{name}: said to be dead, but not among the dead letters")
        self.none(dead.keys() - died, f"{name}: among the dead letters, but nobody said so")
        self.check(
            len(handled) + len(dead) == len(expected), f"{name}: {len(handled)} + {len(dead)} != {len(expected)}"
        )
        self.check(self.killed or again == 0, f"{name}: {again} handled again, although nobody was killed")
        left = [backlog.waiting, backlog.in_flight, backlog.delayed]
        self.check(not any(left), f"{name}: still there after the end: {backlog}")

        line = f"  {station.title:<31}{len(expected):>4} ={len(handled):>4} handled +{len(dead):>3} dead letters"
        line += f", {len(retried)} retries" if retried else ""
        keys = station.keys(self.ledger)
        if keys:
            unordered = self.unordered(station, keys)
            self.check(not unordered, f"{name}: out of order for {unordered}")
            line += f", in order for {len(set(keys.values()))} customers"
        print(line + (f", {again} came again" if again else ""))

    def unordered(self, station: Station, keys: Mapping[str, str]) -> list[str]:
        """Return the keys whose messages came in another order than they were published in, repetitions aside."""
        came: dict[str, list[str]] = {}
        ends = [entry for what in ("Handled", "DeadLettered") for entry in station.entries(self.ledger, what)]
        for entry in sorted(ends, key=lambda entry: float(entry["at"])):
            of_key = came.setdefault(keys.get(entry["id"], ""), [])
            if entry["id"] not in of_key:
                of_key.append(entry["id"])
        order = {id: number for number, id in enumerate(keys)}
        return [key for key, ids in came.items() if key and ids != sorted(ids, key=order.__getitem__)]

    def reasons(self, station: Station, letters: list[Letter[Any]]) -> None:
        """Print why messages were retried, and why they died."""
        retries = Counter(entry["error"] for entry in station.entries(self.ledger, "Retried"))
        causes: dict[str, list[str]] = {}
        for letter in letters:
            unread = letter.dead.error == "DecodeError"
            causes.setdefault("cannot be decoded, see below" if unread else letter.dead.reason, []).append(letter.id)
        lines = [(count, "retried", error) for error, count in retries.most_common()]
        for reason, ids in sorted(causes.items(), key=lambda cause: -len(cause[1])):
            shown = ", ".join(sorted(ids)[:2]) + (", ..." if len(ids) > 2 else "")
            lines.append((len(ids), "died", f"{reason} ({shown})"))
        for number, (count, fate, why) in enumerate(lines):
            print(f"  {'' if number else station.name:<10}{count:>5} {fate:<8} {why}")

    def unread(self, letters: list[Letter[Any]], source: Mapping[str, bytes]) -> None:
        """Print what could not be decoded, and check that nobody has touched it."""
        changed = {letter.id for letter in letters if letter.body != source.get(letter.id)}
        self.none(changed, "the body of a dead letter is not what was published")
        print("\nWhat could not be decoded; each group has it as a dead letter, byte by byte")
        for letter in sorted(letters, key=lambda letter: letter.id):
            if letter.dead.error == "DecodeError":
                _, _, why = letter.dead.reason.rpartition("the body is no Order: ")
                body = letter.body.decode("utf-8", "backslashreplace")
                print(f"  {letter.id:<10}{why}")
                print(f"  {'':<10}{body if len(body) < 100 else body[:50] + ' ... ' + body[-45:]}")
