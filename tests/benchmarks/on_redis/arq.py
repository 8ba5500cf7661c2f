"""arq, which needs a redis-py older than 6 and so an interpreter with libraries of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

from ..on_servers.client import PAGE, Client, Got, Publisher
from .server import client

NEEDS: Final = ("arq>=0.26", "uvloop>=0.21", "msgspec>=0.22")


@functools.cache
def interpreter() -> str:
    """Return the Python of a virtual environment with arq, beside the one that runs this; make it the first time."""
    place = Path(sys.prefix) / "arq"
    python = place / "bin" / "python"
    ready = place / ".ready"
    if ready.exists():
        return str(python)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *NEEDS],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            said = done.stdout.strip().splitlines() or ["no reason given"]
            raise OSError(f"NOT COMPARED: an environment with arq cannot be made: {said[-1][:200]}")
    ready.touch()
    return str(python)


def version() -> str:
    """Return what is in that environment, or why there is none."""
    code = "from importlib.metadata import version as v; print('arq', v('arq') + ',', 'redis', v('redis'))"
    try:
        told = subprocess.run([interpreter(), "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    except OSError as missing:
        return f"arq {missing}"
    return f"{told.strip()} in an environment of their own"


class Arq(Client):
    """arq, polling a hundred times a second."""

    peer = True
    name = "arq"
    note = (
        "keep_result=0, JSON, poll_delay=0.01 (by default 0.5 s: arq-default); many: gather of 100 enqueue_job(); an "
        "environment of its own, as it needs redis-py < 6"
    )
    least = 50
    poll: ClassVar[float] = 0.01

    @staticmethod
    def interpreter() -> str:
        return interpreter()

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        from arq import create_pool
        from arq.connections import RedisSettings

        settings = RedisSettings.from_dsn(self.job.url)
        pool: Any = await create_pool(settings, default_queue_name=self.job.entity, job_serializer=_dumps)
        try:
            yield Publisher(
                lambda item: pool.enqueue_job("bench", item),
                lambda items: asyncio.gather(*[pool.enqueue_job("bench", item) for item in items]),
            )
        finally:
            await pool.aclose()

    @contextlib.asynccontextmanager
    async def consumer(self, got: Got) -> AsyncIterator[None]:
        from arq.connections import RedisSettings
        from arq.worker import Worker, func

        async def handle(_: Any, value: dict[str, Any]) -> None:
            got(value)

        coroutine: Any = handle
        worker: Any = Worker(
            [func(coroutine, name="bench", keep_result=0)],
            queue_name=self.job.entity,
            max_jobs=self.work.handlers,
            poll_delay=self.poll,
            redis_settings=RedisSettings.from_dsn(self.job.url),
            handle_signals=False,
            log_results=False,
            job_serializer=_dumps,
            job_deserializer=json.loads,
        )
        running = asyncio.ensure_future(worker.async_run())
        await asyncio.sleep(0.3)
        try:
            yield
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await worker.close()

    def found(self) -> Iterator[bytes]:
        with client(self.job.url) as asking:
            ids = [one.decode() for one in asking.zrange(self.job.entity, 0, -1)]
            for at in range(0, len(ids), PAGE):
                yield from (value or b"" for value in asking.mget([f"arq:job:{one}" for one in ids[at : at + PAGE]]))

    def pending(self) -> int:
        with client(self.job.url) as asking:
            return int(asking.zcard(self.job.entity))


class ArqDefault(Arq):
    """arq as it comes."""

    name = "arq-default"
    note = "arq with its default poll_delay of 0.5 s"
    poll = 0.5


def _dumps(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
