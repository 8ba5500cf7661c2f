"""Takes the password of a connection out of what Kombu shows and Celery tells: URLs, alternatives and options.

Celery's workers answer ``inspect stats`` with all that a connection is made from, but its field ``password``.  So the
password goes there, from wherever it was given, and copies of the connection get it from there.
"""

from __future__ import annotations

import re
from collections.abc import MutableSequence
from typing import Any, Final, cast
from urllib.parse import quote

from ..drivers._url import MASK, Secret, parse
from ..errors import ConfigError

_IN_QUERY: Final = re.compile(
    r"([?&][^=&]*(?:password|passphrase|secret|token|credential)[^=&]*=)[^&;]*", re.IGNORECASE
)
_OPTION: Final = re.compile(r"(?<=[?&])password=[^&]*&?")
_KEPT: Final = "_brokerkit_password"


def hide(client: Any) -> None:
    """Move the password of *client*, a `kombu.Connection`, to its field ``password``.

    Raises:
        ConfigError: it is given twice, or a URL makes no sense.
    """
    _from_url(client)
    options = client.transport_options or {}
    if options.get("password") is not None:
        client.transport_options = {name: value for name, value in options.items() if name != "password"}
        _take(client, options["password"])
    if client.password:
        client.__dict__[_KEPT] = client.password
    elif _KEPT in client.__dict__:  # Kombu went on to an alternative, which has none any more
        client.password = client.__dict__[_KEPT]
    _from_alternatives(client)


def _from_url(client: Any) -> None:
    host = client.hostname or ""
    if "://" in host:
        password = _password(host)
        if password is not None:
            client.hostname = bare(host)
            client.password = password.reveal()  # one beside the URL is for URLs without one


def _from_alternatives(client: Any) -> None:
    alternatives = cast(object, client.alt)
    if not isinstance(alternatives, MutableSequence):
        return
    urls = cast("MutableSequence[object]", alternatives)
    for number, url in enumerate(urls):
        if isinstance(url, str) and "://" in url and (password := _password(url)) is not None:
            if not client.password:
                client.password = client.__dict__[_KEPT] = password.reveal()
            if client.password == password.reveal():  # one of its own has to stay where it is
                urls[number] = bare(url)


def _take(client: Any, password: object) -> None:
    text = password.reveal() if isinstance(password, Secret) else password
    if client.password and client.password != text:
        raise ConfigError("password is given twice, as an option and with the broker's host")
    client.password = text


def _password(text: str) -> Secret | None:
    """Return the password in the URL *text*."""
    url = parse(text)
    asked = url.query.get("password")
    if url.password is not None and asked is not None:
        raise ConfigError("password is given twice, before the host and as an option")
    return Secret(asked) if asked is not None else url.password


def bare(text: str) -> str:
    """Return the URL *text* without its password."""
    scheme, _, rest = text.partition("://")
    login, at, rest = rest.rpartition("@")
    user = login.partition(":")[0]
    rest = _OPTION.sub("", rest).rstrip("?&")
    return f"{scheme}://{user}{at if user else ''}{rest}"


def as_uri(client: Any, include_password: bool = False, mask: str = "**") -> str:
    """Return the URL of *client*, one that Kombu kept whole, as it was written, with the password masked."""
    scheme, between, rest = (client.hostname or "").partition("://")
    secret = client.password
    if secret and between:
        secret = secret() if callable(secret) else secret
        user, _, after = rest.rpartition("@")
        secret = quote(str(secret), safe="") if include_password else mask
        rest = f"{user or quote(client.userid or '', safe='')}:{secret}@{after}"
    url = f"{scheme}{between}{rest}"
    return f"{client.uri_prefix or 'brokerkit'}+{url if include_password else masked(url, mask)}"


def masked(text: str, mask: str = MASK) -> str:
    """Return *text*, a URL or several with ``;`` between them, without passwords, however malformed it is."""
    # A ';' may be in a password: only what begins with a scheme is another URL.
    return ";".join(_masked(part, mask) for part in re.split(r";(?=[\w+.-]+://)", text))


def _masked(text: str, mask: str) -> str:
    scheme, between, rest = text.partition("://")
    login, at, rest = rest.rpartition("@") if between else ("", "", rest)
    user, colon, _ = login.partition(":")
    return _IN_QUERY.sub(rf"\g<1>{mask}", f"{scheme}{between}{user}{colon}{mask if colon else ''}{at}{rest}")
