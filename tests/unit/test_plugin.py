"""The pytest plugin: one fixture and one marker, the same under every way to run an async test."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent.parent

SERVICE = """
import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

from brokerkit import Broker, Message, Queue, Reject, RetryPolicy, Service, Topic
from brokerkit.testing import VirtualLoop, dead_letters, faults, handled, idle, now, run, running, virtual_loop

ORDERS = Topic("orders", str)
REMINDERS = Queue("reminders", str)
service = Service("billing")

@service.subscribe(ORDERS, retry=RetryPolicy(attempts=2, wait_initial=0))
async def bill(message: Message[str]) -> None:
    if message.value == "bad":
        raise Reject("nothing to pay")
    await message.publish(REMINDERS, message.value, delay=86400)

@service.subscribe(REMINDERS)
async def remind(message: Message[str]) -> None:
    pass

billing = Service("billing")
billing.subscribe(ORDERS)(bill)

async def bills_and_rejects(broker: Broker) -> None:
    async with running(billing, broker):
        await broker.publish(ORDERS, "a")
        await broker.publish(ORDERS, "bad")
        await idle(broker)
        assert [message.value for message in handled(broker, ORDERS)] == ["a"]
        [letter] = await dead_letters(broker, ORDERS, "billing")
        assert letter.dead.reason == "nothing to pay"

async def waits_a_day(broker: Broker) -> None:
    async with running(service, broker):
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop), loop
        begin = loop.time()
        await broker.publish(ORDERS, "a")
        await idle(broker, timeout=100_000)
        assert loop.time() == begin + 86400
        assert [message.value for message in handled(broker, REMINDERS)] == ["a"]

async def order_of_tasks() -> list[int]:
    order: list[int] = []
    async def take(number: int) -> None:
        order.append(number)
    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(take(number))
    return order
"""

ASYNC = """
MARK
async def test_the_broker_is_fresh_and_opened_by_running(broker: Broker) -> None:
    await bills_and_rejects(broker)

MARK
async def test_it_is_fresh_in_each_test(broker: Broker) -> None:
    await bills_and_rejects(broker)

MARK
async def test_it_is_opened_by_hand(broker: Broker) -> None:
    async with broker:
        await broker.publish(REMINDERS, "a")
        assert (await broker.backlog(REMINDERS)).waiting == 1

MARK
async def test_time_is_real_unless_asked_for() -> None:
    assert not isinstance(asyncio.get_running_loop(), VirtualLoop)

MARK
@pytest.mark.virtual_time
async def test_a_day_passes_at_once(broker: Broker) -> None:
    await waits_a_day(broker)
    assert await order_of_tasks() == list(range(10))

MARK
@pytest.mark.virtual_time(seed=1)
async def test_a_seed_shuffles(broker: Broker) -> None:
    await waits_a_day(broker)
    assert await order_of_tasks() != list(range(10))

FIXTURE
async def ready(broker: Broker) -> AsyncIterator[Broker]:
    async with running(service, broker):
        yield broker

MARK
@pytest.mark.virtual_time
async def test_an_async_fixture_may_open_it(ready: Broker) -> None:
    await ready.publish(ORDERS, "a")
    await idle(ready, timeout=100_000)
    assert len(handled(ready, REMINDERS)) == 1

MARK
async def test_time_is_real_again() -> None:
    assert not isinstance(asyncio.get_running_loop(), VirtualLoop)
"""

PLAIN = """
def test_the_broker_belongs_to_no_loop_before_it_is_opened(broker: Broker) -> None:
    asyncio.run(bills_and_rejects(broker))

def test_run_of_ours_makes_time_virtual(broker: Broker) -> None:
    run(lambda: waits_a_day(broker), seed=3)

@pytest.mark.virtual_time
def test_so_does_the_marker(broker: Broker) -> None:
    asyncio.run(waits_a_day(broker))
    assert asyncio.run(order_of_tasks()) == list(range(10))

@pytest.mark.virtual_time(seed=1)
def test_a_seed_shuffles() -> None:
    assert asyncio.run(order_of_tasks()) != list(range(10))

def test_time_is_real_again() -> None:
    async def main() -> None:
        assert not isinstance(asyncio.get_running_loop(), VirtualLoop)
    asyncio.run(main())

def test_faults_can_be_set_before_it_is_opened(broker: Broker) -> None:
    faults(broker)

class TestUrl:
    @pytest.fixture
    def brokerkit_url(self) -> str:
        return "memory://mine?prefix=test."

    def test_the_fixture_follows_the_url(self, broker: Broker) -> None:
        assert repr(broker) == "<Broker memory://mine?prefix=test. new>"

def test_no_async_plugin_and_no_client_library_is_loaded() -> None:
    assert not {"pytest_asyncio", "anyio.pytest_plugin", "hypothesis", "aiokafka", "redis", "uvloop"} & set(sys.modules)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load no plugin that a test does not name, and find the package where it is."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def results(pytester: pytest.Pytester, source: str, *plugins: str, conftest: str = "") -> pytest.RunResult:
    if conftest:
        pytester.makeconftest(conftest)
    pytester.makepyfile(source)
    options = [option for plugin in (*plugins, "brokerkit.testing.plugin") for option in ("-p", plugin)]
    if "asyncio" in plugins:
        options += ["-o", "asyncio_default_fixture_loop_scope=function"]
    return pytester.runpytest_subprocess(*options, "-W", "error", "--strict-markers", timeout=60)


def styled(mark: str, fixture: str, header: str = "") -> str:
    return header + SERVICE + ASYNC.replace("MARK\n", mark).replace("FIXTURE\n", fixture)


def test_under_the_plugin_of_anyio(pytester: pytest.Pytester) -> None:
    source = styled("@pytest.mark.anyio\n", "@pytest.fixture\n")
    conftest = "import pytest\n@pytest.fixture\ndef anyio_backend() -> str:\n    return 'asyncio'\n"
    results(pytester, source, "anyio", conftest=conftest).assert_outcomes(passed=8)


def test_under_pytest_asyncio_in_strict_mode(pytester: pytest.Pytester) -> None:
    source = styled("@pytest.mark.asyncio\n", "@pytest_asyncio.fixture\n", "import pytest_asyncio\n")
    pytester.makeini("[pytest]\nasyncio_mode = strict\n")
    results(pytester, source, "asyncio").assert_outcomes(passed=8)


def test_under_pytest_asyncio_in_auto_mode_beside_anyio(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nasyncio_mode = auto\n")
    results(pytester, styled("", "@pytest.fixture\n"), "asyncio", "anyio").assert_outcomes(passed=8)


def test_without_any_async_plugin(pytester: pytest.Pytester) -> None:
    results(pytester, SERVICE + PLAIN).assert_outcomes(passed=8)


def test_a_loop_factory_of_anyios_plugin_runs_each_test_with_many_seeds(pytester: pytest.Pytester) -> None:
    """The recipe in the plugin's documentation."""
    source = (
        SERVICE
        + """
@pytest.fixture(params=range(5))
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return "asyncio", {"loop_factory": virtual_loop(request.param)}

@pytest.mark.anyio
async def test_a_day_passes_at_once(broker: Broker) -> None:
    await waits_a_day(broker)
"""
    )
    results(pytester, source, "anyio").assert_outcomes(passed=5)


def test_a_loop_factory_of_pytest_asyncio_makes_every_test_virtual(pytester: pytest.Pytester) -> None:
    """The recipe in the plugin's documentation."""
    conftest = """
        from brokerkit.testing import VirtualLoop
        def pytest_asyncio_loop_factories(config, item):
            return {"virtual": VirtualLoop}
        """
    source = (
        SERVICE + "@pytest.mark.asyncio\nasync def test_day(broker: Broker) -> None:\n    await waits_a_day(broker)\n"
    )
    results(pytester, source, "asyncio", conftest=conftest).assert_outcomes(passed=1)


def test_a_marker_that_means_nothing_or_has_no_effect_is_an_error(pytester: pytest.Pytester) -> None:
    source = (
        SERVICE
        + """
@pytest.fixture
def anyio_backend() -> object:
    return "asyncio", {"loop_factory": asyncio.SelectorEventLoop}

@pytest.mark.virtual_time
@pytest.mark.anyio
async def test_with_a_loop_factory() -> None:
    pass

@pytest.mark.virtual_time
def test_without_a_loop() -> None:
    pass

@pytest.mark.virtual_time("1")
def test_with_an_argument() -> None:
    pass

@pytest.mark.virtual_time(sede=1)
def test_with_a_misspelt_option() -> None:
    pass

@pytest.mark.virtual_time(seed="x")
def test_with_a_text() -> None:
    pass
"""
    )
    found = results(pytester, source, "anyio")
    found.assert_outcomes(failed=2, errors=3)
    found.stdout.fnmatch_lines(["*virtual_time had no effect: the test made no event loop*"])
    found.stdout.fnmatch_lines(["*virtual_time takes seed=, a whole number or None, and nothing else*"])


def test_a_test_that_hangs_fails_with_the_reason_and_the_next_one_runs(pytester: pytest.Pytester) -> None:
    hangs = (
        SERVICE
        + """
pytestmark = [pytest.mark.virtual_time, pytest.mark.MARK]

async def test_hangs(broker: Broker) -> None:
    async with broker:
        await asyncio.get_running_loop().create_future()

async def test_next(broker: Broker) -> None:
    await waits_a_day(broker)

@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
"""
    )
    pytester.makepyfile(test_other=hangs.replace("MARK", "asyncio"))
    found = results(pytester, hangs.replace("MARK", "anyio"), "asyncio", "anyio")
    found.assert_outcomes(passed=2, failed=2)
    found.stdout.fnmatch_lines(["*Deadlock: nothing can happen any more*", "*test_hangs (test_*.py:*)*"] * 2)


def test_one_loop_for_a_module_is_virtual_for_all_of_its_marked_tests(pytester: pytest.Pytester) -> None:
    source = (
        SERVICE
        + """
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.virtual_time(seed=1)]

async def test_one(broker: Broker) -> None:
    await waits_a_day(broker)

async def test_two(broker: Broker) -> None:
    await waits_a_day(broker)
    assert asyncio.get_running_loop().time() == 2 * 86400
"""
    )
    results(pytester, source, "asyncio").assert_outcomes(passed=2)


def test_it_is_listed_and_documented(pytester: pytest.Pytester) -> None:
    listed = pytester.runpytest_subprocess("-p", "brokerkit.testing.plugin", "--fixtures", timeout=60)
    listed.stdout.fnmatch_lines(["broker -- *", "    Return a fresh broker that is not open yet*"])
