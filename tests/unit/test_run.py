"""`brokerkit.run` as a process: signals, drain, exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest

import brokerkit
from brokerkit import ConfigError, Service

PROGRAM = """
import asyncio, logging, sys
import brokerkit
from brokerkit import Message, Queue, Service, connect

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
JOBS = Queue("jobs", int)
service = Service("workers")

@service.subscribe(JOBS)
async def work(message: Message[int]) -> None:
    print("begins", message.value, flush=True)
    await asyncio.sleep(SECONDS)
    print("ends", message.value, flush=True)

@service.subscribe(Queue("seed", int))
async def seed(message: Message[int]) -> None: ...

class Seeded(brokerkit.Broker):
    async def __aenter__(self):
        await super().__aenter__()
        await self.publish(JOBS, 1)
        return self

broker = Seeded("memory://", {}, "auto", (), None)
"""


def start(seconds: float, ending: str = "brokerkit.run(service, broker)") -> subprocess.Popen[str]:
    """Run the program until its handler has begun."""
    program = textwrap.dedent(PROGRAM).replace("SECONDS", str(seconds)) + ending + "\nprint('returned', flush=True)\n"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("begins"):
            return process
    raise AssertionError(f"the handler never began; exit code {process.wait(10)}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_returns(number: signal.Signals) -> None:
    """What runs is finished, what is reported adds up, and the exit code is 0."""
    process = start(0.3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "ends 1" in output
    assert "1 messages handled, 0 handed back unstarted, 0 cancelled" in output
    assert output.rstrip().endswith("returned")


def test_a_handler_over_the_drain_is_cancelled() -> None:
    """The drain has its own deadline, and the report says what it cost."""
    process = start(60, "brokerkit.run(service, broker, drain=0.1)")
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "ends" not in output
    assert "1 cancelled" in output


def test_the_second_signal_ends_at_once() -> None:
    """128 + its number, as shells count."""
    process = start(60)
    process.terminate()
    assert process.stdout is not None
    while "draining" not in process.stdout.readline():
        pass
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_service_that_stops_itself_ends_the_process() -> None:
    """`Service.stop` from a handler drains like a signal."""
    ending = """
@service.subscribe(Queue("stops", int))
async def stops(message: Message[int]) -> None:
    service.stop()

class Stopping(Seeded):
    async def __aenter__(self):
        await super().__aenter__()
        await self.publish(Queue("stops", int), 1)
        return self

brokerkit.run(service, Stopping("memory://", {}, "auto", (), None))
"""
    process = start(0.2, ending)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "ends 1" in output


def test_a_service_that_cannot_start_exits_with_1() -> None:
    """And one log line says why."""
    program = textwrap.dedent("""
        import logging, brokerkit
        logging.basicConfig(format="%(message)s")
        brokerkit.run(brokerkit.Service("empty"), "memory://")
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "service empty failed: ConfigError" in done.stderr


def test_the_url_comes_from_the_environment() -> None:
    """BROKERKIT_URL is read when no URL is given."""
    program = "import brokerkit; brokerkit.run(brokerkit.Service('s'))"
    environment = {**os.environ, "BROKERKIT_URL": "amqp://localhost"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False, env=environment
    )
    assert done.returncode != 0
    assert "amqp" in done.stderr


def test_inside_of_an_event_loop_it_says_what_to_do() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="an event loop runs already"):
            brokerkit.run(Service("workers"), "memory://")

    asyncio.run(main())


def test_without_a_url_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """ConfigError before anything starts."""
    monkeypatch.delenv("BROKERKIT_URL", raising=False)
    with pytest.raises(ConfigError, match="BROKERKIT_URL"):
        brokerkit.run(Service("s"))
