"""Whether a changed script is one: a real server is asked, as no other program here can read Lua."""

from __future__ import annotations

import re
from pathlib import Path

import redis.exceptions

import brokerkit.drivers.redis  # noqa: F401 - it makes the scripts known
from brokerkit.drivers.redis import _scripts
from tests.servers import shared

from .farm import check_python
from .mutant import Mutant, Stale


def check(mutant: Mutant, changed: str) -> None:
    """Raise `Stale` if *changed*, the text of a file with *mutant* in it, is no program."""
    path = Path(mutant.file)
    if path.suffix != ".lua":
        check_python(mutant, changed)
        return
    text = _scripts._read(path.stem)
    # Read anew, not as it was when it was imported: somebody may have saved a file since.
    sources = [_scripts._assemble(script.name).decode() for script in _scripts.every()]
    using = [source for source in sources if text in source]
    if not using:
        raise Stale(f"no script uses {mutant.file}")
    for source in using:
        try:
            shared("redis").command_now("SCRIPT", "LOAD", source.replace(text, changed))
        except redis.exceptions.ResponseError as error:
            raise Stale(re.sub(r"\s+", " ", str(error))) from error
