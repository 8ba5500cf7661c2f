"""Puts each mutant into a copy of the project, runs real tests against the copy, and says which of them caught it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeAlias

import pytest

from .mutant import Mutant, Stale

LIMIT: Final = 40.0
"""Seconds for the tests named by a mutant."""
SOON: Final = 3.0
"""Seconds that a test waits at most which waits for what its module calls SOON."""
WHOLE: Final = 400.0
"""Seconds for all tests, where those named let it live."""
LIBRARIES: Final = (
    "pytest",
    "hypothesis",
    "anyio",
    "anyio.pytest_plugin",
    "pytest_asyncio",
    "msgspec",
    "orjson",
    "uvloop",
    "hiredis",
    "redis.asyncio",
    "aiokafka.record.default_records",
    "trustme",
)
"""Imported once and shared by all forks; never brokerkit, which each fork takes from its own copy."""
SUITES: Final[Mapping[str, tuple[str, ...]]] = {
    "brokerkit/drivers/redis/": ("tests/redis", "tests/conformance/test_redis.py"),
    "brokerkit/drivers/kafka/": ("tests/kafka", "tests/conformance/test_kafka.py"),
    "": ("tests/conformance/test_memory.py", "tests/unit"),
}
"""All tests that may catch a mutant of a file, by how its path begins: the first that fits."""
IGNORED: Final = shutil.ignore_patterns("__pycache__", "mutants", "benchmarks", "typing", ".*")


@dataclass
class Trial:
    """What one run of pytest said."""

    caught_by: str | None = None
    running: str | None = None
    trouble: str | None = None
    """Why the run says nothing about any test."""
    passed: int = 0
    loaded: str = ""
    """The file that the package came from."""
    hung: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one mutant."""

    mutant: Mutant
    kind: Literal["caught", "SURVIVED", "STALE", "BROKEN"]
    test: str = ""
    detail: str = ""
    seconds: float = 0.0
    elsewhere: bool = False
    """Not the tests that it names caught it, but another."""


@dataclass(frozen=True)
class Project:
    """What is copied, and all tests that may catch a mutant."""

    root: Path
    package: str = "brokerkit"
    trees: tuple[str, ...] = ("brokerkit", "tests")
    files: tuple[str, ...] = ("pyproject.toml", "docs/redis.md", "docs/kafka.md")
    suites: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SUITES)

    def suite(self, file: str) -> tuple[str, ...]:
        """Return all tests for mutants of *file*."""
        return next(suite for beginning, suite in self.suites.items() if file.startswith(beginning))


class Recorder:
    """A pytest plugin that writes down what happens as it happens, so that a killed run has told what it knew."""

    def __init__(self, out: int, package: str) -> None:
        self._out = out
        self._package = package

    def _say(self, word: str, text: str) -> None:
        os.write(self._out, (json.dumps([word, text]) + "\n").encode())

    def pytest_collection_finish(self) -> None:
        """Tell which package is under test, and let no test wait for long: here what it waits for may never come."""
        for each in [each for name, each in sys.modules.items() if name.startswith("tests.")]:
            if hasattr(each, "SOON"):
                each.SOON = min(each.SOON, SOON)
        module = sys.modules.get(self._package)
        self._say("loaded", str(getattr(module, "__file__", "")))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell which test runs."""
        self._say("running", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell how it went."""
        if report.failed:
            self._say("failed", report.nodeid)
        elif report.when == "call" and report.passed:
            self._say("passed", "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Tell that tests could not even be collected: the mutant is no program."""
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            self._say("trouble", f"{report.nodeid} cannot be collected: {text[-1] if text else ''}"[:300])


@dataclass(frozen=True)
class Request:
    """Run *tests* in *copy*."""

    copy: Path
    tests: tuple[str, ...]
    limit: float
    stop_at_first: bool = True
    collect_only: bool = False


Life: TypeAlias = Generator[Request, Trial, Verdict]


class Fork:
    """One run of pytest in a fork of this process."""

    def __init__(self, request: Request, project: Project) -> None:
        self._collect_only = request.collect_only
        self.deadline = time.monotonic() + request.limit
        self.failed: list[str] = []
        self._trial = Trial()
        self._text = b""
        self.pipe, out = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self.pipe)
            _run_pytest(request, project.package, project.trees, out)
        os.close(out)

    def read(self) -> bool:
        """Take in what the fork says; return whether it goes on."""
        data = os.read(self.pipe, 65536)
        self._text += data
        *lines, self._text = self._text.split(b"\n")
        trial = self._trial
        for line in lines:
            word, text = json.loads(line)
            if word == "failed":
                self.failed.append(text)
                trial.caught_by = trial.caught_by or text
            elif word == "running":
                trial.running = text
            elif word == "passed":
                trial.passed += 1
            elif word == "trouble":
                trial.trouble = trial.trouble or text
            elif word == "loaded":
                trial.loaded = text
        return bool(data)

    def kill(self) -> None:
        """End it, because its time is up: a test that does not end has caught the mutant."""
        os.kill(self._pid, signal.SIGKILL)
        self._trial.hung = True

    def end(self, copy: Path) -> Trial:
        """Clean up after it and return what is known."""
        os.close(self.pipe)
        _, status = os.waitpid(self._pid, 0)
        trial = self._trial
        if trial.hung and trial.running is not None:
            trial.caught_by = trial.caught_by or trial.running
        elif status != 0:
            trial.trouble = trial.trouble or f"pytest ended with status {status} in {trial.running or 'the beginning'}"
        elif not trial.loaded.startswith(str(copy)):
            trial.trouble = f"the tests ran against {trial.loaded or 'nothing'}"
        elif trial.passed == 0 and trial.caught_by is None and not self._collect_only:
            trial.trouble = trial.trouble or "no test has run"
        if trial.caught_by is not None:
            trial.trouble = None if trial.loaded.startswith(str(copy)) or trial.hung else trial.trouble
        return trial


def _run_pytest(request: Request, package: str, trees: tuple[str, ...], out: int) -> NoReturn:
    """Be the fork: run the tests and leave without unwinding the parent's frames."""
    status = 99
    try:
        os.chdir(request.copy)
        sys.dont_write_bytecode = False
        # The parent's own package is among the tests: here they come from the copy, every one of them.
        for name in [name for name in sys.modules if name.partition(".")[0] in trees]:
            del sys.modules[name]
        sys.path.insert(0, str(request.copy))
        tempfile.tempdir = str(request.copy)  # what a killed run leaves behind goes away with its copy
        with Path("output.txt").open("a", encoding="utf-8") as quiet:
            sys.stdout = sys.stderr = quiet
            os.dup2(quiet.fileno(), 1)
            os.dup2(quiet.fileno(), 2)
            options = ["-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=short"]
            if request.stop_at_first:
                options.append("-x")
            if request.collect_only:
                options.append("--collect-only")
            code = pytest.main([*options, *request.tests], plugins=[Recorder(out, package)])
            # 0: all passed, 1: some failed, 5: nothing collected.  The rest are troubles of pytest itself.
            status = 0 if code in (0, 1, 5) else int(code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def check_python(mutant: Mutant, changed: str) -> None:
    """Raise `Stale` if *changed* is no Python."""
    try:
        compile(changed, mutant.file, "exec")
    except SyntaxError as error:
        raise Stale(str(error)) from error


class Farm:
    """Runs mutants, *workers* at a time.  *check* raises `Stale` for a changed text that is no program."""

    def __init__(
        self,
        project: Project,
        *,
        check: Callable[[Mutant, str], None] = check_python,
        workers: int = 2,
        limit: float = LIMIT,
        whole: float = WHOLE,
    ) -> None:
        self._project = project
        self._check = check
        self._workers = workers
        self._limit = limit
        self._whole = whole

    def run(self, mutants: Sequence[Mutant], say: Callable[[Verdict], None] = lambda verdict: None) -> list[Verdict]:
        """Return one verdict each, in order; *say* gets them as they come.

        In the end the tests that caught something run without any mutant: one that fails then has caught nothing.
        """
        assert len({mutant.name for mutant in mutants}) == len(mutants), "two mutants have one name"
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        with tempfile.TemporaryDirectory(prefix="mutants-") as place:
            clean = Path(place).resolve() / "clean"
            self._copy(clean)
            # Compiles all of it; each copy finds the result beside its links.
            suites = dict.fromkeys(test for mutant in mutants for test in self._project.suite(mutant.file))
            warm, _ = self._finish(Request(clean, tuple(suites), WHOLE, collect_only=True))
            if warm.trouble:
                raise RuntimeError(f"without any mutant {warm.trouble}")
            lives = [self._life(mutant, clean) for mutant in mutants]
            try:
                verdicts = self._work(lives, say)
            finally:
                for life in lives:
                    life.close()
            caught = tuple(sorted({one.test for one in verdicts if one.kind == "caught"}))
            if not caught:
                return verdicts
            control, failed = self._finish(Request(clean, caught, WHOLE, stop_at_first=False))
        return [
            replace(one, kind="BROKEN", detail=control.trouble or f"{one.test} fails without the mutant too")
            if one.kind == "caught" and (control.trouble or one.test in failed)
            else one
            for one in verdicts
        ]

    def _copy(self, to: Path) -> None:
        to.mkdir()
        for tree in self._project.trees:
            shutil.copytree(self._project.root / tree, to / tree, ignore=IGNORED)
        for file in self._project.files:
            (to / file).parent.mkdir(exist_ok=True)
            shutil.copy2(self._project.root / file, to / file)

    def _finish(self, request: Request) -> tuple[Trial, list[str]]:
        fork = Fork(request, self._project)
        while fork.read():
            pass
        return fork.end(request.copy), fork.failed

    def _work(self, lives: Sequence[Life], say: Callable[[Verdict], None]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        waiting: deque[tuple[int, Life, Trial | None]] = deque(
            (number, life, None) for number, life in enumerate(lives)
        )
        running: dict[int, tuple[int, Life, Fork, Path]] = {}
        while waiting or running:
            while waiting and len(running) < self._workers:
                number, life, trial = waiting.popleft()
                try:
                    request = next(life) if trial is None else life.send(trial)
                except StopIteration as end:
                    verdicts[number] = end.value
                    say(end.value)
                    continue
                fork = Fork(request, self._project)
                running[fork.pipe] = (number, life, fork, request.copy)
            if not running:
                continue
            patience = min(fork.deadline for _, _, fork, _ in running.values()) - time.monotonic()
            readable, _, _ = select.select(list(running), [], [], max(0.0, patience))
            for pipe, (number, life, fork, copy) in list(running.items()):
                if pipe in readable:
                    if not fork.read():
                        del running[pipe]
                        # In front: a mutant that has begun ends before another begins.
                        waiting.appendleft((number, life, fork.end(copy)))
                elif time.monotonic() >= fork.deadline:
                    fork.kill()
                    fork.deadline += 10.0
        return [verdicts[number] for number in range(len(lives))]

    def _life(self, mutant: Mutant, clean: Path) -> Life:
        try:
            changed = mutant.apply((clean / mutant.file).read_text(encoding="utf-8"))
            self._check(mutant, changed)
        except (Stale, OSError) as error:
            return Verdict(mutant=mutant, kind="STALE", detail=str(error))
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=clean.parent, ignore_cleanup_errors=True) as place:
            copy = Path(place) / "copy"
            shutil.copytree(clean, copy, copy_function=os.link)
            # The copy's files are links to the clean ones: the changed one must be a file of its own.
            target = copy / mutant.file
            target.unlink()
            target.write_text(changed, encoding="utf-8")
            # Python tells compiled files by size and seconds, and a mutant may change neither.
            for compiled in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
                compiled.unlink()
            named = trial = yield Request(copy, mutant.tests, self._limit)
            if trial.caught_by is None and trial.trouble is None and self._whole:
                trial = yield Request(copy, self._project.suite(mutant.file), self._whole)
        verdict = Verdict(mutant=mutant, kind="caught", seconds=time.monotonic() - began, elsewhere=trial is not named)
        if trial.trouble is not None:
            return replace(verdict, kind="BROKEN", detail=trial.trouble)
        if trial.caught_by is None:
            return replace(verdict, kind="SURVIVED", detail=f"{trial.passed} tests passed")
        return replace(verdict, test=trial.caught_by, detail="did not end" if trial.hung else "")
