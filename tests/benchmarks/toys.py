"""Rows that misbehave, for the tests of the frame."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

from .frame import Row
from .job import Order, order


class Honest(Row):
    """Handles each message once, in order."""

    name = "honest"
    ordered = True

    def handled(self, values: list[Order]) -> list[Order]:
        """Return what the handler sees."""
        return values

    async def run(self) -> None:
        got = self.job.counter()
        self.job.begin()
        for value in self.handled(self.job.values()):
            got(value)
        self.job.stop()


class Loses(Honest):
    """Never handles the seventh message."""

    name = "loses"

    def handled(self, values: list[Order]) -> list[Order]:
        return [value for value in values if value.n != 7]


class Doubles(Honest):
    """Handles the seventh message twice."""

    name = "doubles"

    def handled(self, values: list[Order]) -> list[Order]:
        return [*values, values[7]]


class Swaps(Honest):
    """Loses one message and handles another twice: the count alone is right."""

    name = "swaps"

    def handled(self, values: list[Order]) -> list[Order]:
        return [*values[:7], values[8], *values[8:]]


class Invents(Honest):
    """Handles a message that nobody published."""

    name = "invents"

    def handled(self, values: list[Order]) -> list[Order]:
        return [*values, order(len(values))]


class Reorders(Honest):
    """Handles the messages of each key backwards."""

    name = "reorders"

    def handled(self, values: list[Order]) -> list[Order]:
        return values[::-1]


class Careless(Reorders):
    """The same, and promises no order."""

    name = "careless"
    ordered = False


class Forgets(Honest):
    """Leaves a message unacknowledged."""

    name = "forgets"

    async def run(self) -> None:
        await super().run()
        self.job.unsettled = 1


class Fails(Honest):
    """Raises after its work is done."""

    name = "fails"

    async def run(self) -> None:
        await super().run()
        raise ValueError("no room")


class Hangs(Honest):
    """Waits for a message that does not come."""

    name = "hangs"

    async def run(self) -> None:
        self.job.begin()
        await self.job.finish()


class Dies(Honest):
    """Its process ends without a word."""

    name = "dies"

    async def run(self) -> None:
        os._exit(3)


class Timeless(Honest):
    """Never starts its clocks."""

    name = "timeless"

    async def run(self) -> None:
        got = self.job.counter()
        for value in self.job.values():
            got(value)


class Waits(Honest):
    """Takes 10 ms from publish to handler, but for its first tenth, which is left out."""

    name = "waits"

    async def run(self) -> None:
        got = self.job.timer()
        self.job.begin()
        for value in self.job.values():
            slow = 3600 * 10**9 if value.n < self.job.n // 10 else 10 * 10**6
            value.t = time.monotonic_ns() - slow
            got(value)
        self.job.stop()


class Relays(Row):
    """Three processes: one stores half before, one appends half beside, the measured one reads both."""

    name = "relays"

    @property
    def path(self) -> Path:
        """The file that stands in for a server."""
        return Path(tempfile.gettempdir()) / self.job.entity

    async def fill(self) -> None:
        self.path.write_text("".join(f"{value.n}\n" for value in self.job.values()[: self.job.n // 2]))

    async def run(self) -> None:
        got = self.job.counter()
        self.job.begin()
        with self.path.open() as file:
            self.job.ready()
            while len(self.job.seen) < self.job.n:
                if line := file.readline():
                    got(order(int(line)))
                else:
                    await asyncio.sleep(0.001)
        self.job.stop()
        self.path.unlink()

    async def feed(self) -> None:
        with self.path.open("a") as file:
            file.writelines(f"{value.n}\n" for value in self.job.values()[self.job.n // 2 :])


class Homeless(Honest):
    """Needs an environment that cannot be made."""

    name = "homeless"

    @staticmethod
    def interpreter() -> str:
        raise OSError("NOT COMPARED: no environment")
