"""The rights of README are enough for Celery on Kafka: with a prefix, and without one for the names that Celery's things have."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

from brokerkit.celery import AsyncWorker, Celery, adelay, apply
from brokerkit.celery._publish import close

from ..servers import USER
from ..servers.kafka import Right, rights, shared_kafka
from .workers import PATIENCE

pytestmark = pytest.mark.asyncio
LIMIT = 30 * PATIENCE


def allowed(prefix: str) -> list[Right]:
    if prefix:
        return rights(prefix)
    topics = [right for name in ("celery.", "bk..celery.") for right in rights(name) if right.resource == "topic"]
    return [*topics, *(right for right in rights("celery.") if right.resource == "group")]


@pytest.mark.parametrize("prefix", ["", f"r.{secrets.token_hex(3)}."], ids=["plain", "prefix"])
async def test_the_rights_of_the_page_are_enough(prefix: str) -> None:
    kafka, given = shared_kafka(rights=True), allowed(prefix)
    queue = f"q{secrets.token_hex(3)}@host"
    user, _, host = kafka.url("SASL", user=USER).removeprefix("kafka://").partition("@")
    app = Celery("rights", broker=f"kafka://{user}@{host}", backend="cache+memory://")
    app.conf.broker_transport_options = {"prefix": prefix}
    app.conf.task_default_queue = queue

    @app.task(shared=False)
    async def add(x: int, y: int) -> int:
        return x + y

    with kafka.wire() as admin:
        admin.allow(given)
        try:
            async with AsyncWorker(app, hostname="worker@rights"):
                assert await (await adelay(add, 2, 3)).get(LIMIT) == 5
                assert await (await apply(add.s(3, 4), countdown=1)).get(LIMIT) == 7
                pong = await asyncio.to_thread(app.control.inspect(timeout=5, limit=1).ping)
                assert pong == {"worker@rights": {"ok": "pong"}}
                revoked: Any = await apply(add.s(5, 6), countdown=300)
                await revoked.revoke()
                assert await asyncio.to_thread(app.control.purge) >= 0
        finally:
            close(app)
            app.close()
            admin.forbid(given)
            mine = prefix or ("bk..celery", "celery.q")
            admin.delete([name for name in admin.cluster(None).topics if name.startswith(mine)])
