"""Celery on brokerkit: Kafka and Redis, as Celery users write it.

::

    from brokerkit.celery import Celery

    app = Celery("shop", broker="kafka://localhost:9092")

A program that uses Kombu without Celery imports this first, so that Kombu knows brokerkit's URLs.
"""

from . import _prefork, _stock
from ._envelope import Envelope as Envelope
from ._names import service_queue as queue
from ._publish import adelay as adelay
from ._publish import apply as apply
from ._publish import asend_task as asend_task
from ._publish import task_message as task_message
from ._results import Result as Result
from .app import Celery as Celery
from .worker import AsyncWorker as AsyncWorker

__all__ = [
    "AsyncWorker",
    "Celery",
    "Envelope",
    "Result",
    "adelay",
    "apply",
    "asend_task",
    "queue",
    "task_message",
]

_stock.watch()
_prefork.watch()
