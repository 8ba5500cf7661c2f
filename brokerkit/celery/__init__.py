"""Celery on brokerkit: Kafka and Redis, as Celery users write it.

::

    from brokerkit.celery import Celery

    app = Celery("shop", broker="kafka://localhost:9092")
"""

from . import _stock
from .app import Celery as Celery

__all__ = ["Celery"]

_stock.watch()
