"""From the errors of redis-py and of the server to the errors of brokerkit, with texts that say what to do."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from typing import Final

from redis import exceptions as native

from ...errors import (
    AuthenticationError,
    AuthorizationError,
    BrokerError,
    BrokerUnavailable,
    BufferFull,
    ConfigError,
    DeliveryLost,
    NotFound,
    SettingsMismatch,
)

_CODE: Final = re.compile(r"(?:BK|[A-Z][A-Z0-9]{2,})(?= |$)")
_SCRIPT: Final = re.compile(r",? ?script: (?:[0-9a-f]{40}, )?on @user_script:\d+\.?$")
_ARGUMENTS: Final = ", with args beginning with"
"""What follows it in an error's text are the arguments of a command, maybe a password."""
_CODES_OF_CLASSES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (native.OutOfMemoryError, "OOM"),
    (native.NoPermissionError, "NOPERM"),
    (native.AuthenticationError, "WRONGPASS"),
    (native.ReadOnlyError, "READONLY"),
    (native.BusyLoadingError, "LOADING"),
    (native.MasterDownError, "MASTERDOWN"),
    (native.ClusterDownError, "CLUSTERDOWN"),
    (native.TryAgainError, "TRYAGAIN"),
    (native.MovedError, "MOVED"),
    (native.AskError, "ASK"),
    (native.ClusterCrossSlotError, "CROSSSLOT"),
    (native.NoScriptError, "NOSCRIPT"),
)
"""redis-py takes these codes off the text, and its older versions keep them nowhere else."""

_OURS: Final[dict[str, Callable[[str], BrokerError]]] = {
    "NOTFOUND": NotFound,
    "MISMATCH": SettingsMismatch,
    "LOST": DeliveryLost,
    "LIVE": ConfigError,
    "CONFIG": ConfigError,
    "BROKEN": BrokerError,
}
"""By the second word of what our scripts return: ``BK CODE text``."""

_THEIRS: Final[dict[str, tuple[Callable[[str], BrokerError], str]]] = {
    "OOM": (
        BufferFull,
        "the server has used all memory that its maxmemory allows; consume, purge or raise maxmemory",
    ),
    "WRONGPASS": (AuthenticationError, "the server refused the user name or password"),
    "NOAUTH": (AuthenticationError, "the server wants a password; put one into the URL or use password_file"),
    "READONLY": (BrokerUnavailable, "the server is a replica, which takes no writes; connect to the primary"),
    "LOADING": (BrokerUnavailable, "the server is loading its data"),
    "MASTERDOWN": (BrokerUnavailable, "the server is a replica without its primary"),
    "CLUSTERDOWN": (BrokerUnavailable, "the cluster is down"),
    "TRYAGAIN": (BrokerUnavailable, "the cluster is moving these keys"),
    "NOREPLICAS": (BrokerUnavailable, "the server has fewer replicas than its min-replicas-to-write asks for"),
    "MISCONF": (
        BrokerUnavailable,
        "the server cannot write to its disk and takes no writes until it can; see its log",
    ),
    "BUSY": (BrokerUnavailable, "the server is busy with a script that runs too long"),
    "UNKILLABLE": (BrokerUnavailable, "the server is busy with a script that runs too long"),
    "NOSCRIPT": (BrokerUnavailable, "the server has lost its scripts; they are loaded again"),
    "MOVED": (
        ConfigError,
        "the server is a node of a cluster, which this release cannot use; connect to a server without cluster mode",
    ),
    "ASK": (ConfigError, "the server is a node of a cluster, which this release cannot use"),
    "CROSSSLOT": (ConfigError, "the server is a node of a cluster, which this release cannot use"),
    "NOPROTO": (ConfigError, "the server is too old: brokerkit needs Redis 7.0 or newer, or Valkey"),
    "WRONGTYPE": (
        BrokerError,
        "a key of it holds something that brokerkit did not write; look at the keys that begin with bk: and remove the foreign one",
    ),
}


def translate(error: BaseException, what: str) -> BrokerError:
    """Return *error*, met in *what* ("publishing to emails"), as an error of ours, with the cause set.

    A lost connection is `BrokerUnavailable`; whether what was under way has happened only the caller can tell.
    """
    if isinstance(error, BrokerError):
        return error
    root = _root(error)
    cause, text = _without_arguments(root)
    if isinstance(root, native.ResponseError) or _code(root, text):
        translated = _answered(root, text, what)
    elif isinstance(root, ssl.SSLError) or isinstance(_tls(error), ssl.SSLError):
        translated = _refused_tls(error, what)
    elif isinstance(root, (OSError, native.ConnectionError, native.TimeoutError, TimeoutError)):
        translated = BrokerUnavailable(f"{what}: {_line(text) or type(root).__name__}")
    else:
        translated = BrokerError(f"{what}: {type(root).__name__}: {_line(text)}")
    translated.__cause__ = cause
    return translated


def code_of(error: BaseException) -> str:
    """Return the code that the server's answer begins with, "OOM" for example; "" if it has none."""
    return _code(error, str(error))


def _answered(error: BaseException, text: str, what: str) -> BrokerError:
    """Return what the server said no with."""
    code = _code(error, text)
    text = _SCRIPT.sub("", text.removeprefix(code).strip()) if code else text
    if code == "BK":
        ours, _, rest = text.partition(" ")
        return _OURS.get(ours, BrokerError)(rest or f"{what}: {ours}")
    if code == "NOPERM" or "user executing the script can't" in text:
        return AuthorizationError(
            f"{what}: {_line(text)}; README, section Redis, has the access list that brokerkit needs"
        )
    if code in _THEIRS:
        kind, help_ = _THEIRS[code]
        detail = (
            "" if code in {"OOM", "WRONGTYPE", "MOVED", "ASK", "CROSSSLOT"} else f" ({code} {_line(text)})".rstrip()
        )
        return kind(f"{what}: {help_}{detail}")
    if "unknown command" in text.lower():
        return ConfigError(
            f"{what}: {_line(text)}; brokerkit needs Redis 7.0 or newer, or Valkey, with no command renamed or removed"
        )
    if "max number of clients" in text:
        return BrokerUnavailable(f"{what}: {_line(text)}; raise the server's maxclients")
    if "DB index is out of range" in text or "invalid DB index" in text:
        return ConfigError(
            f"{what}: the server has no such database; lower the number in the URL or raise its databases"
        )
    return BrokerError(f"{what}: the server answered: {code and code + ' '}{_line(text)}")


def _refused_tls(error: BaseException, what: str) -> BrokerUnavailable:
    text = " ".join(str(each) for each in _chain(error))
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = re.search(r"certificate verify failed: ([^(\]]+)", text)
        return BrokerUnavailable(
            f"{what}: the server's certificate was refused{f': {_line(reason[1])}' if reason else ''}; "
            "name the authority that signed it in ca_file=, and the host as the certificate does"
        )
    return BrokerUnavailable(
        f"{what}: TLS failed: {_line(text)}; does this port speak TLS, and does the server want a cert_file?"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and what it was made from."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        yield inner
        wrapped = inner.args[0] if inner.args and isinstance(inner.args[0], BaseException) else None
        inner = inner.__cause__ or wrapped or inner.__context__


def _root(error: BaseException) -> BaseException:
    """Return the error itself, or the answer of the server that redis-py has wrapped (it does so over unix sockets)."""
    if isinstance(error, native.ConnectionError) and not code_of(error):
        for inner in _chain(error):
            if isinstance(inner, native.RedisError) and code_of(inner):
                return inner
            if isinstance(inner, native.ResponseError):
                return inner
    return error


def _tls(error: BaseException) -> BaseException | None:
    return next((inner for inner in _chain(error) if isinstance(inner, ssl.SSLError)), None)


def _code(error: BaseException, text: str) -> str:
    if not isinstance(error, native.RedisError):
        return ""
    status = getattr(error, "status_code", None)
    if isinstance(status, str) and status:
        return status if status != "ERR" else ""
    for kind, code in _CODES_OF_CLASSES:
        if isinstance(error, kind):
            return code
    match = _CODE.match(text) if isinstance(error, native.ResponseError) else None
    return match[0] if match and match[0] != "ERR" else ""


def _without_arguments(error: BaseException) -> tuple[BaseException, str]:
    """Return *error* and its text without the arguments of a command that the server did not know: one may be a password."""
    text = str(error)
    head, cut, _ = text.partition(_ARGUMENTS)
    if not cut:
        return error, text
    return native.ResponseError(head), head


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
