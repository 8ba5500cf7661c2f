"""The demo as it is on a real broker: shop and service in two processes, the service killed in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import FLAVORS, Flavor, RedisServer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.processes.server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"socket://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def test_the_sums_add_up_when_the_service_is_killed(url: str) -> None:
    perform(url)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_the_sums_add_up_on_a_real_server(flavor: Flavor) -> None:
    with RedisServer(flavor, appendonly=True) as server:
        perform(server.url())


def perform(url: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, str(ROOT / "examples" / "orders.py"), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The service was killed with " in done.stdout
    assert "The sums add up" in done.stdout
