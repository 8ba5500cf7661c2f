"""A consumer that inserts in batches: readings of sensors go into a table, many with one transaction, each once.

    python examples/batch_insert.py [URL]

Messages come at least once: what comes again has the same id, which is the table's primary key.

Prints:

    1000 readings of 20 sensors, in at most 100 transactions
    all of them once more: 1000 readings of 20 sensors
"""

import asyncio
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from brokerkit import Batch, Message, Service, Start, Topic, connect


@dataclass
class Reading:
    sensor: int
    celsius: float


READINGS = Topic("example-readings", Reading, partitions=4)
READ = 1000


class Table:
    """Where readings are kept; a real service has a server for that."""

    def __init__(self) -> None:
        self.database = sqlite3.connect(":memory:", check_same_thread=False)
        self.database.execute("CREATE TABLE readings (id TEXT PRIMARY KEY, sensor INTEGER, celsius REAL)")
        self.came = 0
        self.transactions = 0

    def insert(self, rows: Sequence[tuple[str, int, float]]) -> None:
        with self.database:  # commits, or rolls back: then no message of the batch is acknowledged
            self.database.executemany("INSERT INTO readings VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING", rows)
        self.came += len(rows)
        self.transactions += 1

    def sums(self) -> str:
        rows, sensors = self.database.execute("SELECT count(*), count(DISTINCT sensor) FROM readings").fetchone()
        return f"{rows} readings of {sensors} sensors"


table = Table()
progress = asyncio.Event()


@asynccontextmanager
async def kept() -> AsyncIterator[Table]:
    yield table


service = Service("archive", lifespan=kept)


@service.subscribe(READINGS, batch=Batch(max=200, wait=0.2))
async def archive(messages: Sequence[Message[Reading]], table: Table) -> None:
    rows = [(message.id, message.value.sensor, message.value.celsius) for message in messages]
    await asyncio.to_thread(table.insert, rows)
    progress.set()


async def archived(count: int) -> None:
    """Wait until so many readings have come."""
    while table.came < count:
        progress.clear()
        await progress.wait()


async def main(url: str) -> None:
    async with connect(url) as broker:
        await broker.publish_many(
            READINGS,
            [
                READINGS.outgoing(Reading(number % 20, 20 + number / READ), key=f"sensor-{number % 20}")
                for number in range(READ)
            ],
        )
        async with service.running(broker):
            await archived(READ)
        print(table.sums() + ",", "in at most 100 transactions" if table.transactions <= 100 else "one by one")

        await broker.seek(READINGS, "archive", Start.EARLIEST)  # as after a restore of the table from yesterday
        async with service.running(broker):
            await archived(2 * READ)
        print("all of them once more:", table.sums())
        await broker.delete(READINGS)  # only so that this example can run again


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BROKERKIT_URL", "memory://")))
