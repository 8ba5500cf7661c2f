"""The archives that the suites are in: fetched once, by pip, and kept outside of the work tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final, Literal, TypeAlias

from ...servers import Missing
from ...servers.kafka.programs import _kept

Project: TypeAlias = Literal["kombu", "celery"]
VERSION: Final = "5.7.0"
SHA256: Final[dict[Project, str]] = {
    "kombu": "31e62fdfd2381caa3422f8e02b84a491d9a2180ddda74507b57f4cb1e1c2c2c9",
    "celery": "6a5dfcf6662287204f009a02002b9e66c83d4105e47ebabdc7079108772fc6f0",
}
CONFIGURATION: Final[dict[Project, str]] = {"kombu": "setup.cfg", "celery": "pyproject.toml"}
"""Where each project tells pytest how its tests are named."""


def tree(project: Project) -> Path:
    """Return the folder with a project's tests and their configuration, fetched the first time.

    Raises:
        Missing: the archive could not be fetched, or is not the one that was expected.
    """
    return _kept(f"suite-{project}-{VERSION}-{SHA256[project][:8]}", lambda folder: _fetch(project, folder))


def copy(project: Project, folder: Path) -> Path:
    """Return a copy in *folder* for one run: tests may write into it."""
    made = folder / f"{project}-{VERSION}"
    shutil.copytree(tree(project), made)
    return made


def _fetch(project: Project, folder: Path) -> None:
    print(f"fetching the sources of {project} {VERSION} ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="brokerkit-suite-") as name:
        wanted = Path(name) / "wanted"
        wanted.write_text(f"{project}=={VERSION} --hash=sha256:{SHA256[project]}\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
        ]
        options = ["--no-deps", "--no-binary", project, "--dest", name, "--requirement", str(wanted)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        found = list(Path(name).glob(f"{project}-*.tar.gz"))
        if done.returncode or len(found) != 1:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise Missing(
                f"the suite of {project} {VERSION} is in its source archive, which pip cannot fetch: "
                f"{said[0] if said else 'it says nothing'}"
            )
        with tarfile.open(found[0]) as archive:
            for member in archive.getmembers():
                # Its code stays behind: what is tested with is what is installed.
                inner = Path(*Path(member.name).parts[1:])
                if member.isfile() and (inner.parts[:1] == ("t",) or str(inner) == CONFIGURATION[project]):
                    if ".." in inner.parts:
                        raise Missing(
                            f"the source archive of {project} {VERSION} has a file outside of it: {member.name}"
                        )
                    content = archive.extractfile(member)
                    assert content is not None
                    (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                    (folder / inner).write_bytes(content.read())
