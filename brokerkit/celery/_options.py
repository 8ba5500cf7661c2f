"""What may stand in ``broker_transport_options`` and ``broker_use_ssl``, and what has no meaning here."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Final

from .. import policy
from ..drivers._url import Secret
from ..errors import ConfigError

logger = logging.getLogger("brokerkit.celery")

Setting = str | int | float | bool | Secret

_COMMON: Final = frozenset({"insecure", "prefix", "session"})
_REMOTE: Final = frozenset(
    {"ca_file", "cert_file", "connect_timeout", "key_file", "password", "password_file", "timeout", "username"}
)
KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "memory": _COMMON | {"max_messages"},
    "redis": _COMMON | _REMOTE | {"db", "durability"},
    "kafka": _COMMON | _REMOTE | {"compression", "instance", "queue_partitions", "replication", "sasl"},
}
"""The options of brokerkit's URLs, by system."""
OWN: Final[Mapping[str, tuple[float, float]]] = {"lease": (1.0, 3600.0), "eta_window": (0.0, 3600.0)}
"""The options of the transport itself, in seconds: from and to."""
_KOMBU: Final = frozenset(
    {
        "callback",
        "confirm_publish",  # a task is stored when delay() returns, whatever this says
        "connect_retries_timeout",
        "errback",
        "interval_max",
        "interval_start",
        "interval_step",
        "max_retries",
    }
)
"""Read by Kombu itself, for every transport."""
_INSTEAD: Final[Mapping[str, str]] = {
    "ack_deadline_seconds": "",
    "ack_emulation": "",
    "body_encoding": "",
    "client_name": "",
    "client_properties": "",
    "deadletter_queue": "",
    "fanout_patterns": "",
    "fanout_prefix": "",
    "global_keyprefix": "prefix",
    "health_check_interval": "",
    "kafka_admin_config": "",
    "kafka_common_config": "",
    "kafka_consumer_config": "",
    "kafka_producer_config": "",
    "master_name": "",
    "max_connections": "",
    "num_partitions": "queue_partitions",
    "polling_interval": "",
    "predefined_queues": "",
    "priority_steps": "",
    "queue_name_prefix": "prefix",
    "queue_order_strategy": "",
    "region": "",
    "replication_factor": "replication",
    "retry_on_timeout": "",
    "retry_policy": "",
    "sasl_mechanism": "sasl",
    "security_protocol": "",
    "sentinel_kwargs": "",
    "sep": "",
    "socket_connect_timeout": "connect_timeout",
    "socket_keepalive": "",
    "socket_keepalive_options": "",
    "socket_timeout": "timeout",
    "topic_config": "",
    "unacked_index_key": "",
    "unacked_key": "",
    "unacked_mutex_expire": "",
    "unacked_mutex_key": "",
    "unacked_restore_interval": "",
    "unacked_restore_limit": "",
    "unacked_restore_throttle": "",
    "visibility_timeout": "lease",
    "wait_time_seconds": "",
}
"""Options of Kombu's transports, and the one of ours that serves the same end."""
_FILES: Final = {"ca_certs": "ca_file", "certfile": "cert_file", "keyfile": "key_file"}
_SURE: Final = {"cert_reqs", "check_hostname"}
_NEAR: Final = 0.85
"""From which likeness on an unknown option is one of ours, misspelt."""

_told: set[str] = set()


def sift(system: str, given: Mapping[str, object]) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """Return the options in *given* for brokerkit's URL and for the transport; warn once about others by name.

    Raises:
        ConfigError: a name is nearly one of ours, or a value makes no sense.
    """
    options: dict[str, Setting] = {}
    own: dict[str, Setting] = {}
    foreign: list[str] = []
    for name, value in given.items():
        if value is None or name in _KOMBU:
            continue
        if name in OWN:
            own[name] = own_setting(name, value)
        elif name in KNOWN[system]:
            options[name] = _plain(name, value)
        else:
            near = name not in _INSTEAD and get_close_matches(name, {*KNOWN[system], *OWN}, n=1, cutoff=_NEAR)
            if near:
                raise ConfigError(f"broker_transport_options: there is no option {name!r} (did you mean {near[0]!r}?)")
            foreign.append(name)
    _tell("broker_transport_options", system, foreign)
    return options, own


def tls(given: Mapping[str, object]) -> dict[str, str]:
    """Return the options for what ``broker_use_ssl`` has; warn once about what cannot be had.

    Raises:
        ConfigError: the name of a file is no text.
    """
    options: dict[str, str] = {}
    foreign: list[str] = []
    for name, value in given.items():
        short = name.removeprefix("ssl_")
        if short in _FILES:
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"broker_use_ssl: {name} must be the path of a file, not {type(value).__name__}")
            if value:
                options[_FILES[short]] = value
        elif short in _SURE:
            if value not in {True, "true", "required", "CERT_REQUIRED", ssl.CERT_REQUIRED}:
                _once(f"broker_use_ssl: {name}={value}: the broker's certificate and name are verified all the same")
        else:
            foreign.append(name)
    _tell("broker_use_ssl", "", foreign)
    return options


def own_setting(name: str, value: object) -> float:
    """Return an option of the transport itself.

    Raises:
        ConfigError: it is no number of seconds, or out of range.
    """
    low, high = OWN[name]
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"option {name} must be a number of seconds, not {value!r}") from None
    return policy.seconds(f"option {name}", value, low=low, high=high)  # type: ignore[arg-type]  # checked there


def _plain(name: str, value: object) -> Setting:
    if isinstance(value, (str, int, float, Secret)):
        return Secret(value) if name == "password" and isinstance(value, str) and value else value
    raise ConfigError(f"option {name} must be a text, a number or a truth value, not {type(value).__name__}")


def _tell(where: str, system: str, foreign: list[str]) -> None:
    names = [f"{name} (use {_INSTEAD[name]})" if _INSTEAD.get(name) else name for name in sorted(foreign)]
    if names:
        _once(f"{where}: brokerkit ignores what it has not{' on ' if system else ''}{system}: {', '.join(names)}")


def _once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        logger.warning(text)
