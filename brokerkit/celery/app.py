"""Celery's app with every URL brokerkit's, and with tasks that are coroutines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias, overload

import celery as stock
from celery.app import utils as stock_utils

from ..errors import ConfigError
from . import _hide, _publish, _url
from ._tasks import AsyncTasks

__all__ = ["Celery"]

Task: TypeAlias = Any
"""A task: Celery's class has no types."""

_settings: Any = stock_utils
_URLS = ("broker_url", "broker_read_url", "broker_write_url")


class Celery(AsyncTasks, stock.Celery):  # type: ignore[misc]  # it comes without types
    """Celery on brokerkit: ``kafka://``, ``redis://``, ``rediss://`` and ``memory://`` are brokerkit's, other URLs Celery's.

    ::

        app = Celery("shop", broker="kafka://localhost:9092")

        @app.task
        async def add(x: int, y: int) -> int: ...

    Everything else is as it is in `celery.Celery`.  A task may be an ``async def``; where an event loop runs, `adelay` and
    `apply` publish without blocking it.
    """

    @overload
    def task(self, function: Callable[..., object], /) -> Task: ...
    @overload
    def task(self, /, **options: object) -> Callable[[Callable[..., object]], Task]: ...
    def task(self, function: Callable[..., object] | None = None, /, **options: object) -> object:
        """Make a task of *function*, which may be an ``async def``; the options are Celery's."""
        made: object = super().task(**options) if function is None else super().task(function, **options)
        return made

    def close(self) -> None:
        """Let go of everything, as Celery does; a program that ends need not."""
        _publish.close(self)
        super().close()

    def _connection(self, url: object, *arguments: object, **options: object) -> Any:
        connection: Any = super()._connection(_url.ours(url), *arguments, **options)
        if str(connection.transport_cls).startswith("brokerkit"):
            with suppress(ConfigError):  # which connecting raises
                _hide.hide(connection)
        return connection

    @property
    def _conf(self) -> object:
        return self.__dict__.get("_conf")

    @_conf.setter
    def _conf(self, settings: object) -> None:
        if type(settings) is _settings.Settings:
            object.__setattr__(settings, "__class__", _Settings)  # which its own __setattr__ takes for a setting
        self.__dict__["_conf"] = settings


class _Settings(_settings.Settings):  # type: ignore[misc]  # it comes without types
    """Celery's settings, which show the URLs that only brokerkit understands, such as one of several hosts."""

    def table(self, with_defaults: bool = False, censored: bool = True) -> Mapping[str, object]:
        table: dict[str, object] = dict(super().table(with_defaults, censored=False))
        if not censored:
            return table
        urls = {name: _shown(table.pop(name)) for name in list(table) if str(name).lower().endswith(_URLS)}
        return {**_settings.filter_hidden_settings(table), **urls}


def _shown(url: object) -> object:
    if isinstance(url, (list, tuple)):
        return [_shown(part) for part in _url.texts(url)]
    return _hide.masked(url) if isinstance(url, str) else url
