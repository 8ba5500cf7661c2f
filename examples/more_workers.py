"""More workers than partitions: six of them share a queue of two, on Kafka from 4.2.1 on.

    python examples/more_workers.py [kafka://HOST:PORT]

Each worker has one job at a time.  The first job takes two seconds: that holds up neither the others of its partition nor any
worker but its own.  Prints:

    2 partitions, 6 workers, 91 jobs
    all jobs are done, the long one was the last
    each of the five other workers did at least 12
"""

import asyncio
import os
import sys
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass

from brokerkit import Message, Queue, Service, connect

WORKERS = 6


@dataclass
class Job:
    number: int
    seconds: float


JOBS = Queue("example-jobs", Job)
done: list[tuple[int, int]] = []  # the number of the worker, and of the job
finished = asyncio.Semaphore(0)


def worker(number: int) -> Service:
    """Return a worker; each would be a process of its own, here they have connections of their own."""
    service = Service("worker")

    @service.subscribe(JOBS, concurrency=1, prefetch=1)  # takes nothing ahead that another could begin
    async def work(message: Message[Job]) -> None:
        await asyncio.sleep(message.value.seconds)
        done.append((number, message.value.number))
        finished.release()

    return service


async def main(url: str) -> None:
    options = {"queue_partitions": 2}  # of queues that are created; 4 otherwise
    async with connect(url, options=options) as broker, AsyncExitStack() as stack:
        stack.push_async_callback(broker.delete, JOBS)  # only so that this example can run again
        for number in range(WORKERS):
            own = await stack.enter_async_context(connect(url, options=options))
            await stack.enter_async_context(worker(number).running(own))
        jobs = [Job(0, 2.0), *(Job(number, 0.05) for number in range(1, 91))]
        print(f"2 partitions, {WORKERS} workers, {len(jobs)} jobs")
        await broker.publish(JOBS, jobs[0])
        await broker.publish_many(JOBS, jobs[1:])
        for _ in jobs:
            await finished.acquire()
    slow, last = done[-1]
    print(f"all jobs are done, the {'long' if last == 0 else 'short'} one was the last")
    counts = Counter(number for number, _ in done)
    others = sorted(count for number, count in counts.items() if number != slow)
    fair = len(others) == WORKERS - 1 and others[0] >= 12
    print("each of the five other workers did at least 12" if fair else f"the other workers did {others}")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BROKERKIT_URL", "kafka://localhost:9092")
    asyncio.run(main(url))
