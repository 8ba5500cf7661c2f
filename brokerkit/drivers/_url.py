"""URLs and options of all drivers: parsed once, checked once, their secrets hidden."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final, NoReturn, Protocol, final, overload
from urllib.parse import unquote

from .. import policy
from ..driver import Driver
from ..errors import ConfigError
from ..events import Listener

MASK: Final = "***"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SECRET = re.compile(r"password|passphrase|secret|token|credential", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")
_TRUTH: Final = {"true": True, "1": True, "false": False, "0": False}


def nearest(name: str, known: Collection[str]) -> str:
    """Return `` (did you mean 'x'?)`` with the known name nearest to *name*, or all known names if none is near."""
    import difflib  # only for a text that ends the program

    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (there are: {', '.join(sorted(filter(None, known)))})" if known else ""


@final
class Secret:
    """A text that no repr, log or traceback shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text; call it where it is handed to the client library, and keep it nowhere."""
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return MASK

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")


@final
class Options:
    """The options of a URL's query and of ``options=`` together; each getter takes one, checks it and knows its name.

    What no getter asked for is unknown: `finish` says so.
    """

    def __init__(self, values: Mapping[str, object], backend: str) -> None:
        self._values = dict(values)
        self._backend = backend
        self._known: set[str] = set()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={MASK if _SECRET.search(name) else value!r}" for name, value in self._values.items())
        return f"<Options {shown}>"

    def _take(self, name: str) -> object:
        self._known.add(name)
        return self._values.get(name)

    def given(self, name: str) -> bool:
        """Return whether *name* was given."""
        self._known.add(name)
        return name in self._values

    @overload
    def text(self, name: str, default: str) -> str: ...
    @overload
    def text(self, name: str, default: None = None) -> str | None: ...
    def text(self, name: str, default: str | None = None) -> str | None:
        """Return a text."""
        if (value := self._take(name)) is None:
            return default
        if not isinstance(value, str):
            raise ConfigError(f"option {name} must be a text, not {type(value).__name__}")
        return value

    def secret(self, name: str) -> Secret | None:
        """Return a text that stays hidden."""
        value = self._take(name)
        if isinstance(value, str) and value:
            return Secret(value)
        if value is None or isinstance(value, Secret):
            return value
        raise ConfigError(f"option {name} must be a text that is not empty")

    def choice(self, name: str, default: str, allowed: Collection[str]) -> str:
        """Return one of the *allowed* texts."""
        value = self.text(name, default)
        if value not in allowed:
            raise ConfigError(f"option {name} cannot be {value!r}{nearest(value, allowed)}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self._take(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        if isinstance(value, str) and value.lower() in _TRUTH:
            return _TRUTH[value.lower()]
        raise ConfigError(f"option {name} must be true or false, not {value!r}")

    def whole(self, name: str, default: int, *, low: int, high: int) -> int:
        """Return a whole number."""
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
            value = int(value)
        return policy.whole(f"option {name}", value, low=low, high=high)  # type: ignore[arg-type]

    def seconds(self, name: str, default: float, *, low: float = 0.0, high: float = policy.MAX_DELAY) -> float:
        """Return a number of seconds."""
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value):
            value = float(value)
        return policy.seconds(f"option {name}", value, low=low, high=high)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Raise `ConfigError` for options that nobody asked for."""
        for name in self._values:
            if name not in self._known:
                raise ConfigError(f"{self._backend} has no option {name!r}{nearest(name, self._known)}")


@final
class Url:
    """The parts of a broker's URL, percent-decoded.  Its repr and str hide the password."""

    __slots__ = ("hosts", "password", "path", "query", "scheme", "username")

    def __init__(
        self,
        scheme: str,
        hosts: tuple[tuple[str, int | None], ...] = (),
        path: str = "",
        username: str | None = None,
        password: Secret | None = None,
        query: Mapping[str, str] | None = None,
    ) -> None:
        self.scheme = scheme
        self.hosts = hosts
        """Host and port, in order; IPv6 addresses without brackets."""
        self.path = path
        """What follows the hosts, with its leading slash; empty if nothing does."""
        self.username = username
        self.password = password
        self.query: Mapping[str, str] = query or {}
        """The options as texts, `Options` reads them."""

    def __repr__(self) -> str:
        user = self.username or ""
        user += f":{MASK}" if self.password is not None else ""
        hosts = ",".join(
            (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
            for host, port in self.hosts
        )
        query = "&".join(f"{name}={MASK if _SECRET.search(name) else value}" for name, value in self.query.items())
        return f"{self.scheme}://{user}{'@' if user else ''}{hosts}{self.path}{'?' if query else ''}{query}"

    __str__ = __repr__

    def loopback(self) -> bool:
        """Return whether nothing leaves this machine: all hosts are loopback addresses, or there is none."""
        return all(_is_loopback(host) for host, _ in self.hosts)


class DriverFactory(Protocol):
    """How a driver is made.

    *options* holds those of the query and of ``options=`` together, without the common ones (``prefix``, ``insecure``,
    ``username``, ``password``).  *emit* takes events, for what only a driver can see.  No I/O.

    Raises:
        ConfigError: the URL or an option makes no sense.
    """

    def __call__(self, url: Url, options: Options, emit: Listener) -> Driver: ...


def parse(text: str) -> Url:
    """Return the parts of *text*, or raise `ConfigError`, which never shows a password."""
    if not isinstance(text, str):
        raise ConfigError(f"a broker's URL is a text, not {type(text).__name__}")
    match = _SCHEME.fullmatch(text)
    if match is None:
        raise ConfigError("a broker's URL begins with its scheme, as in memory://")
    scheme, rest = match[1].lower(), match[2]
    if any(character.isspace() or not character.isprintable() for character in rest):
        raise ConfigError(f"the {scheme} URL contains blanks or control characters; percent-encode them")
    rest, hash_, _ = rest.partition("#")
    if hash_:
        raise ConfigError(f"the {scheme} URL contains '#'; write %23 inside a user name, password or option")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if "@" in path or "@" in query.partition("=")[0]:
        raise ConfigError(
            f"the {scheme} URL has an '@' behind its hosts; write %2F and %3F for '/' and '?' in a password"
        )
    user, at, hosts = authority.rpartition("@")
    username, colon, password = user.partition(":")
    if at and not user.strip(":"):
        raise ConfigError(f"the {scheme} URL has an '@' but no user name and no password")
    return Url(
        scheme,
        _hosts(scheme, hosts),
        _decoded(scheme, "path", slash + path),
        _decoded(scheme, "user name", username) or None,
        Secret(_decoded(scheme, "password", password)) if colon and password else None,
        _query(scheme, query),
    )


def _decoded(scheme: str, part: str, text: str) -> str:
    if _PERCENT.search(text):
        raise ConfigError(f"the {part} in the {scheme} URL has a '%' without two hex digits; write %25 for a '%'")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(f"the {part} in the {scheme} URL is not UTF-8 when percent-decoded") from None


def _hosts(scheme: str, text: str) -> tuple[tuple[str, int | None], ...]:
    return tuple(_host(scheme, host) for host in text.split(",")) if text else ()


def _host(scheme: str, text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        import ipaddress  # it takes milliseconds, and few URLs need it

        host, bracket, rest = text[1:].partition("]")
        try:
            host = str(ipaddress.IPv6Address(host))
        except ValueError:
            bracket = ""
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigError(f"the {scheme} URL has a host that is no IPv6 address in brackets")
        colon, port = rest[:1], rest[1:]
    else:
        host, colon, port = text.partition(":")
        if not _HOST.fullmatch(host):
            raise ConfigError(f"the {scheme} URL has no valid host name; several hosts are separated by ','")
    if not colon:
        return host, None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        # Not shown: it may be a password with a '/' in it.
        raise ConfigError(f"a port in the {scheme} URL is no number from 1 to 65535; is a password percent-encoded?")
    return host, int(port)


def _query(scheme: str, text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for item in text.split("&") if text else ():
        raw, _, value = item.partition("=")
        name = _decoded(scheme, "query", raw)
        if not name:
            raise ConfigError(f"the {scheme} URL has an option without a name")
        if not value:
            raise ConfigError(f"option {name} in the {scheme} URL has no value")
        if name in values:
            raise ConfigError(f"option {name} is given twice in the {scheme} URL")
        values[name] = _decoded(scheme, "query", value)
    return values


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    import ipaddress  # as above

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
