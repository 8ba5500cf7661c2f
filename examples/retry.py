"""A queue whose messages are tried again, end as dead letters, and are brought back when the cause is gone.

Prints:

    ann@post.example: sent at attempt 2
    bob: dead after 1 attempt, not an address
    cleo@mail.example: dead after 3 attempts, failed after 3 attempts: mail.example is down
    redriven: 1
    cleo@mail.example: sent at attempt 1
"""

import asyncio
import logging

from brokerkit import Broker, Message, Queue, Reject, RetryPolicy, Service, connect

logging.getLogger("brokerkit").setLevel(logging.CRITICAL)  # brokerkit logs each dead letter; here we print them

EMAILS = Queue("emails", str)
service = Service("mailer")
sent: asyncio.Queue[str] = asyncio.Queue()
down = {"mail.example"}


@service.subscribe(EMAILS, retry=RetryPolicy(attempts=3, wait_initial=0.01))
async def send(message: Message[str]) -> None:
    host = message.value.partition("@")[2]
    if not host:
        raise Reject("not an address")  # no attempt can help: dead letter at once
    if host in down:
        raise TimeoutError(f"{host} is down")  # any exception: again after a while
    if message.attempt == 1 and host == "post.example":
        raise TimeoutError(f"{host} is busy")
    await sent.put(f"{message.value}: sent at attempt {message.attempt}")


async def dead(broker: Broker, count: int) -> None:
    """Wait until *count* messages have died."""
    while ((await broker.backlog(EMAILS)).dead or 0) < count:
        await asyncio.sleep(0.01)


async def main() -> None:
    async with connect("memory://") as broker, service.running(broker):
        await broker.publish_many(EMAILS, ["ann@post.example", "bob", "cleo@mail.example"])
        print(await sent.get())
        await dead(broker, 2)
        async for letter in broker.browse(EMAILS.dead_letters):
            attempts = f"{letter.dead.attempts} attempt{'s' if letter.dead.attempts > 1 else ''}"
            print(f"{letter.value}: dead after {attempts}, {letter.dead.reason}")
        down.clear()
        report = await broker.redrive(EMAILS.dead_letters, where=lambda letter: letter.dead.error == "TimeoutError")
        print("redriven:", report.moved)
        print(await sent.get())


asyncio.run(main())
