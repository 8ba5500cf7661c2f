"""Celery's tasks as coroutines: they run on one event loop, hundreds at a time.

`service.py` publishes them, and runs them itself.  A worker of its own does as well, in this folder:

    celery -A shop worker -P brokerkit -c 200 --loglevel=info
"""

import asyncio
import os
from typing import Any

from brokerkit.celery import Celery

BROKER = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
RESULTS = os.environ.get("CELERY_RESULT_BACKEND", "redis://localhost:6379/1")

app = Celery("shop", broker=BROKER, backend=RESULTS)
app.conf.task_default_queue = "shop"
app.conf.task_routes = {"shop.audit": {"queue": "shop-audit"}}  # read by a service of brokerkit
app.conf.broker_connection_retry_on_startup = True

PRICES = {"tea": 4.0, "cup": 9.5, "pot": 24.0}
thanked = asyncio.Event()


@app.task
async def price(article: str) -> float:
    await asyncio.sleep(0.1)  # asks somebody
    return PRICES[article]


@app.task
async def total(prices: list[float]) -> float:
    return sum(prices)


@app.task(bind=True, max_retries=3)
async def charge(self: Any, customer: str, amount: float) -> str:
    if self.request.retries == 0:
        self.retry(countdown=0.1)  # the bank does not answer
    return f"{customer} has paid {amount:.2f} at attempt {self.request.retries + 1}"


@app.task
async def thank(customer: str) -> None:
    print("thank you,", customer)
    thanked.set()
