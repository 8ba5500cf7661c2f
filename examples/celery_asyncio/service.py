"""One asyncio program that publishes Celery's tasks, runs them, and reads what Celery publishes without being its worker.

    python service.py

Redis is at localhost:6379, or where CELERY_BROKER_URL and CELERY_RESULT_BACKEND say.  Prints:

    300 prices: 3750.00
    a chord: 37.50
    ann has paid 37.50 at attempt 2
    audit: shop.audit ['ann', 37.5]
    thank you, ann
"""

import asyncio
import json

from celery import chord
from shop import BROKER, app, charge, price, thanked, total

from brokerkit import Message, Service, connect
from brokerkit.celery import AsyncWorker, Envelope, adelay, apply, asend_task, queue, task_message

SHOP, AUDIT = queue("shop"), queue("shop-audit")  # Celery's queues as addresses of brokerkit
service = Service("audit")


@service.subscribe(AUDIT)
async def audit(message: Message[Envelope]) -> None:
    """Do what no worker does: there is no task of this name anywhere."""
    task = message.value
    args, _, _ = json.loads(task.body)
    print("audit:", task.headers["task"], args)
    # A task by its name, stored together with the acknowledgement of what is handled here.
    await message.publish(SHOP, task_message("shop.thank", (args[0],), queue="shop"))


async def main() -> None:
    async with AsyncWorker(app, concurrency=100), connect(BROKER) as broker, service.running(broker):
        results = [await adelay(price, article) for article in ["tea", "cup", "pot"] * 100]
        print(f"{len(results)} prices: {sum([await result for result in results]):.2f}")

        bill = await (await apply(chord([price.s("tea"), price.s("cup"), price.s("pot")], total.s())))
        print(f"a chord: {bill:.2f}")

        print(await (await adelay(charge, "ann", bill)))

        await asend_task(app, "shop.audit", ("ann", bill))  # the code of the task is elsewhere
        await thanked.wait()


asyncio.run(main())
