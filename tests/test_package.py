"""What is built has what it needs: the scripts of the Redis driver, the mark that types are checked, and no tests."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    targets = ["--target", "wheel", "--target", "sdist"]
    command = [sys.executable, "-m", "hatchling", "build", *targets, "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def wanted() -> set[str]:
    package = ROOT / "brokerkit"
    found = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.suffix in {".py", ".lua"} or path.name == "py.typed"
    }
    assert any(name.endswith(".lua") for name in found)
    assert "brokerkit/py.typed" in found
    return found


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
        points = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert names == wanted() - {"brokerkit/_kombu.py"} | {"_brokerkit_kombu.py"}  # Kombu imports it without the package
    assert "orjson = _brokerkit_kombu:serializer" in points
    assert "Provides-Extra: redis" in metadata
    assert "Provides-Extra: kafka" in metadata
    assert "Provides-Extra: celery" in metadata


def test_the_archive_of_sources_has_all_to_build_and_to_test(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted() <= names
    assert {"Makefile", "README.md", "pyproject.toml", "tests/constraints.txt", "tests/servers/server.py"} <= names
