"""Running a service as a process: signals, drain, exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import AsyncExitStack
from typing import Any

from .broker import Broker, connect
from .errors import BrokerError, ConfigError
from .service import Service

logger = logging.getLogger("brokerkit")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(service: Service[Any], url: str | Broker | None = None, *, drain: float = 25) -> None:
    """Run *service* until SIGTERM or SIGINT, drain, and return.

    *url* is a URL, a broker that is not open yet, or None for the one in the environment variable ``BROKERKIT_URL``.  The
    first signal drains for at most *drain* seconds; the second one ends the process at once.

    Raises:
        ConfigError: there is no URL, or an event loop runs already.
        SystemExit: 1 when the service could not start or has failed; 128 + the signal's number after a second signal.
    """
    if url is None:
        url = os.environ.get("BROKERKIT_URL")
        if not url:
            raise ConfigError("no broker: pass a URL or set BROKERKIT_URL")
    if asyncio._get_running_loop() is not None:
        raise ConfigError("an event loop runs already: use 'async with service.running(broker)' in it, not run()")
    broker = connect(url) if isinstance(url, str) else url
    try:
        asyncio.run(_run(service, broker, drain))
    except BrokerError as error:
        logger.critical("service %s failed: %s: %s", service.name, type(error).__name__, error)
        raise SystemExit(1) from error


async def _run(service: Service[Any], broker: Broker, drain: float) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def signalled(number: signal.Signals) -> None:
        if stop.is_set():
            logger.error("second %s: ending at once; what was in hand is delivered again", number.name)
            os._exit(128 + number)
        logger.info("%s: draining", number.name)
        stop.set()

    async with AsyncExitStack() as stack:
        for number in _SIGNALS:
            loop.add_signal_handler(number, signalled, number)
            stack.callback(loop.remove_signal_handler, number)
        await stack.enter_async_context(broker)
        running = service.running(broker, drain=drain)
        await stack.enter_async_context(running)
        running.when_ended(stop.set)
        await stop.wait()
