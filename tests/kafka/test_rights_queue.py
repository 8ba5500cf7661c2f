"""What docs/kafka.md says that each action on a queue needs is enough for it, where somebody else has made all."""

from __future__ import annotations

import asyncio
import itertools
import re
import shlex
from pathlib import Path

import pytest

from brokerkit import AuthorizationError, Broker, Queue, connect
from tests.kafka.test_rights import PATIENCE, allowed, fresh, opened, take
from tests.servers import USER
from tests.servers.kafka import Endpoints, Right

PAGE = (Path(__file__).parents[2] / "docs" / "kafka.md").read_text(encoding="utf-8")
EMAILS = Queue("emails", str, lease=15)


def told(action: str, prefix: str) -> list[Right]:
    """Return the rights that the page gives for *action*, on names that begin with *prefix*."""
    block = re.search(r"^For the queue `emails`, by action.*?```sh\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert block is not None
    found: list[Right] = []
    here = False
    for line in block[1].replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            here = action in line
        elif here:
            words = shlex.split(line)
            options = dict(itertools.pairwise(words))
            (resource,) = {"--topic", "--group"} & set(words)
            assert (options[resource], options["--resource-pattern-type"]) == ("emails", "prefixed")
            operations = [value.lower() for name, value in itertools.pairwise(words) if name == "--operation"]
            found += [Right(USER, resource[2:], prefix + "emails", one, prefixed=True) for one in operations]  # type: ignore[arg-type]
    assert found, action
    return found


async def made(endpoints: Endpoints, prefix: str) -> None:
    """Do as somebody who may do anything: make the queue, and all that is made when it is first needed."""
    async with connect(endpoints.url(query=f"session=1&prefix={prefix}")) as broker:
        await broker.declare(EMAILS)
        await broker.publish(EMAILS, "bad")
        await broker.publish(EMAILS, "late", delay=1)
        async with broker.subscribe(EMAILS) as messages:
            for message in await take(messages.receive, 2):
                await (message.reject("no good") if message.value == "bad" else message.ack(confirm=True))
        await broker.redrive(EMAILS.dead_letters)
        await broker.purge(EMAILS)


def limited(endpoints: Endpoints, prefix: str) -> Broker:
    return opened(endpoints, prefix, declare="never")


def test_publishing_takes_no_more_than_the_page_says() -> None:
    async def scenario() -> None:
        prefix = fresh()
        async with allowed(told("publish", prefix), prefix) as endpoints, asyncio.timeout(3 * PATIENCE):
            await made(endpoints, prefix)
            with endpoints.wire() as admin:
                names = (prefix + "emails", prefix + "emails..delay")
                before = [sum(admin.offsets(name, end=True).values()) for name in names]
                async with limited(endpoints, prefix) as broker:
                    await broker.publish(EMAILS, "now")
                    await broker.publish(EMAILS, "later", delay=3600)
                    with pytest.raises(AuthorizationError):
                        async with broker.subscribe(EMAILS) as messages:
                            await messages.receive(timeout=PATIENCE)
                after = [sum(admin.offsets(name, end=True).values()) for name in names]
            assert [late - early for early, late in zip(before, after, strict=True)] == [1, 1]

    asyncio.run(scenario())


def test_consuming_takes_no_more_than_the_page_says() -> None:
    async def scenario() -> None:
        prefix = fresh()
        async with allowed(told("consume", prefix), prefix) as endpoints, asyncio.timeout(3 * PATIENCE):
            await made(endpoints, prefix)
            async with limited(endpoints, prefix) as broker:
                for value in ("good", "again", "later", "bad"):
                    await broker.publish(EMAILS, value)
                assert {stored.value async for stored in broker.browse(EMAILS)} == {"good", "again", "later", "bad"}
                async with broker.subscribe(EMAILS) as messages:
                    done: list[str] = []
                    while len(done) < 4:
                        for message in await take(messages.receive, 1):
                            if message.value in {"good", "bad"} or message.attempt > 1:
                                done.append(message.value)
                            if message.value == "bad":
                                await message.reject("no good")
                            elif message.value == "good" or message.attempt > 1:
                                await message.ack(confirm=True)
                            else:
                                await message.nack(delay=1.2 if message.value == "later" else 0)
                    assert sorted(done) == ["again", "bad", "good", "later"]
                found = await broker.backlog(EMAILS)
                assert (found.waiting, found.delayed, found.dead) == (0, 0, 1)
                assert (await broker.redrive(EMAILS.dead_letters)).moved == 1
                with pytest.raises(AuthorizationError, match="DELETE"):
                    await broker.purge(EMAILS)

    asyncio.run(scenario())


def test_purging_takes_no_more_than_the_page_says() -> None:
    async def scenario() -> None:
        prefix = fresh()
        given = [*told("consume", prefix), *told("purge", prefix)]
        async with allowed(given, prefix) as endpoints, asyncio.timeout(3 * PATIENCE):
            await made(endpoints, prefix)
            async with limited(endpoints, prefix) as broker:
                for value in ("one", "two"):
                    await broker.publish(EMAILS, value)
                assert await broker.purge(EMAILS) == 2
                assert (await broker.backlog(EMAILS)).waiting == 0

    asyncio.run(scenario())
