"""Keeps secrets out of logs, dead letters and error texts.

It recognises what secrets are written behind: ``scheme://user:…@``, names such as ``password=``, an Authorization header.
Where in doubt it masks too much.
"""

from __future__ import annotations

import re
from typing import Final

from .policy import MAX_REASON

MASK: Final = "***"
_LOOKED_AT: Final = 16 * MAX_REASON
"""Longer texts are cut before they are searched: what was cut is so far from what is shown that no secret ends in between."""

# Repetitions are bounded, so that a text made to be slow to search is not.
_BETWEEN = r"""["'\\]{0,8}\s{0,8}[:=]\s{0,8}"""
_QUOTED = r"""(?x:
      \\+ (?P<escaped>["']) (?: (?! \\+ (?P=escaped) ) [\s\S] ){0,4096} (?: \\+ (?P=escaped) )?  # in a repr of JSON
    | [bru]{0,2} (?P<quote>["']) (?: \\ [\s\S] | (?! (?P=quote) ) [^\\] ){0,4096} (?P=quote)?    # it may be cut off
)"""
_URL = re.compile(r"(://[^\s:@/]{0,256}:)\S{1,1024}@")
_AUTHORIZATION = re.compile(rf"(authorization{_BETWEEN})(?:{_QUOTED}|[^\r\n]+)", re.IGNORECASE)
_NAMED = re.compile(
    r"((?:password|passwd|passphrase|\bpass|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credentials?)"
    rf"[\w.-]{{0,40}}{_BETWEEN})(?:{_QUOTED}|[^\s&]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bbearer\s{1,8})[\w.~+/=-]+", re.IGNORECASE)
_JWT = re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*")
_PEM = re.compile(r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----)[\s\S]*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)")


def redact(text: str) -> str:
    """Return *text* with its secrets masked."""
    text = _PEM.sub(rf"\1{MASK}", text)
    text = _URL.sub(rf"\1{MASK}@", text)
    text = _AUTHORIZATION.sub(rf"\1{MASK}", text)
    text = _NAMED.sub(rf"\1{MASK}", text)
    text = _BEARER.sub(rf"\1{MASK}", text)
    return _JWT.sub(MASK, text)


def error_text(error: BaseException) -> str:
    """Return what *error* says, redacted, on one line, cut to `MAX_REASON`; its class if it says nothing."""
    inner: BaseException | None = error
    while inner is not None:
        error, inner = inner, _only(inner)
    try:
        text = str(error)
    except Exception:
        text = ""
    line = " ".join(redact(text[:_LOOKED_AT]).split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    if len(line) > MAX_REASON:
        line = line[: MAX_REASON - 3] + "..."
    return line or type(error).__name__


def _only(error: BaseException) -> BaseException | None:
    """Return the single error in a group of one: the group's own text says nothing."""
    inside: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return inside[0] if isinstance(error, BaseExceptionGroup) and len(inside) == 1 else None
