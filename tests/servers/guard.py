"""Starts a server so that it cannot outlive its starter, however that ends."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_GUARD: Final = """
exec 3<&0
folder=$1
shift
(read -r _ <&3 || { kill -9 $$; until rm -rf "$folder"; do sleep 0.1; done; }) >/dev/null 2>&1 &
exec "$@" 3<&- </dev/null >>"$0" 2>&1
"""
"""Becomes the server, and leaves somebody behind who ends it, and removes its folder, when nobody can write to it any more."""


def start(
    command: Sequence[str], *, log: Path, folder: Path, cwd: Path | None = None, alive: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Run *command* as a server that ends, and whose *folder* goes, with this process, or with the writers of *alive*."""
    shell = ["/bin/sh", "-c", _GUARD, str(log), str(folder), *command]
    # A session of its own: Ctrl-C is for the tests, which end the server when they are done.
    return subprocess.Popen(shell, cwd=cwd or folder, stdin=alive, start_new_session=True)


def dismiss(process: subprocess.Popen[bytes]) -> None:
    """Let the guard of a server go that has ended."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.write(b"\n")
        process.stdin.close()
