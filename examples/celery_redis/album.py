"""Celery on Redis with one import changed: `redis://` is brokerkit's here, and so are `kafka://` and `memory://`.

Start this twice or more often, in this folder, then run `publish.py`:

    celery -A album worker --loglevel=info

Redis is at localhost:6379, or where CELERY_BROKER_URL and CELERY_RESULT_BACKEND say.  A worker that is killed (kill -9)
while it works holds up nothing: after `lease` seconds, not an hour, the others do what it had.
"""

import time

from brokerkit.celery import Celery

app = Celery("album", broker="redis://localhost:6379/0", backend="redis://localhost:6379/1")
app.conf.task_acks_late = True  # a picture counts as done when it is done
app.conf.task_reject_on_worker_lost = True
app.conf.worker_prefetch_multiplier = 1  # pictures take long: take none ahead
app.conf.broker_transport_options = {"lease": 10}
app.conf.broker_connection_retry_on_startup = True


@app.task
def resize(picture: str, width: int) -> str:
    time.sleep(0.1)  # the work
    return f"{picture}@{width}"


@app.task
def make_page(pictures: list[str]) -> str:
    return f"<page: {', '.join(sorted(pictures))}>"


@app.task
def publish(page: str) -> str:
    return page.replace("page", "published")
