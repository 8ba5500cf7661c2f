"""The rules of the tree: layers, sizes, public names, documentation, and what must not be in it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import brokerkit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "brokerkit"

LAYERS = (
    ("_kombu",),
    ("errors",),
    ("clock",),
    ("policy",),
    ("address",),
    ("events",),
    ("driver",),
    ("_redact", "_tasks", "_thread", "_heartbeat"),
    ("_json",),
    ("_lossless",),
    ("_unions",),
    ("codecs",),
    ("message",),
    ("middleware",),
    ("_plan",),
    ("_binding", "_lanes", "_outcome", "_settle", "_letters", "_publishing"),
    ("_session",),
    ("_intake", "_plans"),
    ("_subscription", "_requests", "_workers"),
    ("drivers",),
    ("_connection",),
    ("_publisher",),
    ("broker",),
    ("_registration",),
    ("_running",),
    ("service",),
    ("_run",),
    ("__init__",),
    ("blocking",),
    ("celery",),
    ("testing",),
)
"""Each row imports only from rows above it, and from its own."""

DRIVERS_MAY = {"errors", "clock", "policy", "address", "events", "driver", "_redact", "_tasks", "drivers"}
REDIS = (
    ("_errors", "_frames", "_keys", "_options", "_scripts"),
    ("_wire",),
    ("_checks", "_wake"),
    ("_link",),
    ("_context", "_publish"),
    ("_queue_session", "_queue_wait", "_queue_bell", "_queue_copies", "_queue_member"),
    ("_queue",),
    ("_topic_place",),
    ("_topic_claim",),
    ("_topic_member",),
    ("_topic_commit",),
    ("_topic_reader",),
    ("_topic",),
    ("_browse",),
    ("_admin",),
    ("_driver",),
    ("redis",),
)
"""The same for the modules of this driver; the last one is the package."""
KAFKA = (
    ("_errors", "_options"),
    ("_api", "_inflate", "_records", "_sasl", "_tell", "_tiers", "_view"),
    (
        "_answer",
        "_ask",
        "_assign",
        "_batch",
        "_claim",
        "_connect",
        "_produce",
        "_share_ask",
        "_share_locks",
        "_share_open",
        "_share_place",
        "_time",
        "_tolerant",
        "_wire",
    ),
    ("_cluster", "_commit", "_part"),
    (
        "_calls",
        "_configs",
        "_coordinator",
        "_copies",
        "_create",
        "_cut",
        "_hands",
        "_member",
        "_offsets",
        "_outbox",
        "_remove",
        "_share_group",
        "_topic_settings",
    ),
    ("_fetch", "_group", "_look", "_publish", "_sender", "_share_member", "_share_session", "_silence"),
    ("_rescue", "_share"),
    ("_browse", "_context", "_engine", "_life"),
    ("_janitor", "_letters", "_reader", "_share_reader"),
    ("_owner", "_share_settle"),
    ("_consumer", "_share_consumer"),
    ("_migrate", "_progress"),
    ("_queue_admin",),
    ("_admin", "_delay"),
    ("_upkeep",),
    ("_queue",),
    ("_driver",),
    ("kafka",),
)
CELERY = (
    ("_collect", "_envelope", "_errors", "_feed", "_follower", "_hide", "_options", "_pace"),
    ("_names", "_running", "_url"),
    ("_bindings", "_tasks"),
    ("_mailboxes", "_revokes"),
    ("_exchanges", "_item"),
    ("_bridge", "_getting", "_outcomes"),
    ("_intake", "_prefork", "_stock"),
    ("_qos",),
    ("_channel",),
    ("transport",),
    ("_results", "pool"),
    ("_publish",),
    ("app",),
    ("worker",),
    ("celery",),
)
"""The same for what connects Celery; the last one is the package."""
TABLES = {"drivers/redis": REDIS, "drivers/kafka": KAFKA, "celery": CELERY}
CLIENTS = {
    "redis": {"redis", "hiredis"},
    "kafka": {"aiokafka", "kio", "cramjam"},
    "celery": {"celery", "kombu", "billiard", "vine"},
}
"""Which folder imports which client libraries; nobody else does, but for the entry point of Kombu."""
LONGEST = 500


def sources(*tops: str) -> list[Path]:
    found = [path for top in tops for path in sorted((ROOT / top).rglob("*.py")) if "__pycache__" not in path.parts]
    assert found, f"no sources below {tops}"
    return found


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(name: str) -> str:
    """Return what a module belongs to: the file or folder below brokerkit."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Yield the names of the modules of brokerkit that a file imports."""
    for parts in imported(path):
        yield ".".join(parts if len(parts) == 1 or is_module(parts) else parts[:-1])


def imported(path: Path) -> Iterator[list[str]]:
    """Yield what a file imports of brokerkit, in parts: a module, or one name of it."""
    package = module(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names if alias.name.split(".")[0] == "brokerkit")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base[:1] == ["brokerkit"]:
                yield from ([*base, alias.name] for alias in node.names)


def is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").exists() or path.is_dir()


def rows() -> dict[str, int]:
    return {name: number for number, row in enumerate(LAYERS) for name in row}


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    rooms = {room(module(path)) for path in sources("brokerkit")}
    assert rooms == set(rows())


@pytest.mark.parametrize("path", sources("brokerkit"), ids=module)
def test_a_row_imports_only_from_rows_above_it(path: Path) -> None:
    here = room(module(path))
    below = {name for name in imports(path) if rows()[room(name)] > rows()[here]}
    assert not below, f"{module(path)} imports {below} from rows below its own"
    if here == "drivers":
        assert {room(name) for name in imports(path)} <= DRIVERS_MAY


@pytest.mark.parametrize("folder", TABLES)
def test_every_module_of_a_folder_has_a_row_and_every_row_a_module(folder: str) -> None:
    found = {module(path).rpartition(".")[2] for path in sources(f"brokerkit/{folder}")}
    assert found == {name for row in TABLES[folder] for name in row}


@pytest.mark.parametrize("path", sources(*(f"brokerkit/{folder}" for folder in TABLES)), ids=module)
def test_a_module_of_a_folder_imports_only_from_rows_above_it(path: Path) -> None:
    folder = path.parent.relative_to(PACKAGE).as_posix()
    places = {name: number for number, row in enumerate(TABLES[folder]) for name in row}
    here, package = module(path).rpartition(".")[2], f"brokerkit.{folder.replace('/', '.')}."
    used = {name.removeprefix(package) for name in imports(path) if name.startswith(package)}
    below = {name for name in used if places[name] > places[here]}
    assert not below, f"{here} imports {below} from rows below its own"


@pytest.mark.parametrize("path", sources("brokerkit"), ids=module)
def test_what_is_private_to_a_module_is_imported_by_no_other(path: Path) -> None:
    private = [parts for parts in imported(path) if parts[-1][0] == "_" != parts[-1][1] and not is_module(parts)]
    assert not private


@pytest.mark.parametrize("path", sources("brokerkit"), ids=module)
def test_a_client_library_is_imported_by_its_driver_only(path: Path) -> None:
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            used.add((node.module or "").partition(".")[0])
    own = CLIENTS.get("celery" if path == PACKAGE / "_kombu.py" else path.parent.name, set())
    assert not used & set().union(*CLIENTS.values()) - own


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module(path): set(imports(path)) for path in sources("brokerkit")}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle of imports: {' → '.join((*trail, name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                # A package and what is in it: importing the part runs the whole first, in this order and no other.
                if not other.startswith(name + ".") and not name.startswith(other + "."):
                    visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_type_checking_hides_no_circle() -> None:
    hidden = [module(path) for path in sources("brokerkit") if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]
    assert not hidden


@pytest.mark.parametrize(
    "path", sources("brokerkit", "tests", "examples"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_no_file_is_called_for_nothing_in_particular() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
    assert not [path for path in sources("brokerkit", "tests", "examples") if path.stem.strip("_") in vague]


def test_importing_brokerkit_loads_no_client_library() -> None:
    code = "import sys, brokerkit; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert "brokerkit" in loaded
    assert not loaded & {"aiokafka", "redis", "celery", "kombu", "kio", "pydantic", "pytest", "hypothesis", "uvloop"}


def test_public_names_are_pinned() -> None:
    assert sorted(brokerkit.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(brokerkit, name) is not None


def test_public_names_are_all_that_the_package_shows() -> None:
    modules = {path.stem for path in PACKAGE.iterdir()}
    shown = {name for name in vars(brokerkit) if name.isidentifier() and not name.startswith("_")} - modules
    assert shown <= set(PUBLIC), "import it under a private name, or make it public"


def public_definitions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Yield the public classes, functions and methods of a file; of overloads only the implementation."""

    def walk(
        body: list[ast.stmt], where: str
    ) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list):
                continue
            yield f"{where}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{where}.{node.name}")

    yield from walk(ast.parse(path.read_text(encoding="utf-8")).body, module(path))


def documented() -> list[Path]:
    """Return the files that users read: all but private ones and the suite, whose tests are named as sentences."""
    return [
        path
        for path in sources("brokerkit")
        if not any(part.startswith("_") and part != "__init__" for part in path.with_suffix("").parts)
        and "conformance" not in path.parts
    ]


@pytest.mark.parametrize("path", documented(), ids=module)
def test_everything_public_is_documented(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{module(path)} has no docstring"
    bare = [name for name, node in public_definitions(path) if not ast.get_docstring(node)]
    assert not bare


@pytest.mark.parametrize("path", documented(), ids=module)
def test_a_docstring_begins_with_a_sentence(path: Path) -> None:
    bad = []
    for name, node in public_definitions(path):
        text = (ast.get_docstring(node) or "").strip()
        if text and not re.match(r"(?s)[^a-z].*?[.:?](\s|$)", text):
            bad.append(name)
    assert not bad


@pytest.mark.parametrize("path", documented(), ids=module)
def test_any_is_in_no_public_signature(path: Path) -> None:
    """But as the parameter of a generic type, where it says "of any payload"."""
    found = []
    for name, node in public_definitions(path):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        notes = [argument.annotation for argument in arguments if argument is not None]
        for note in [*notes, node.returns]:
            alternatives = [note]
            while alternatives:
                part = alternatives.pop()
                if isinstance(part, ast.BinOp):
                    alternatives += [part.left, part.right]
                elif isinstance(part, ast.Name) and part.id == "Any":
                    found.append(name)
    assert not found


def tree() -> list[Path]:
    """Return the files of the tree: what git has, or would take; of an unpacked archive all."""
    if (ROOT / ".git").exists():
        command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout.decode().split("\0")
        found = [ROOT / name for name in listed if name]
    else:
        made = re.compile(r"\.venv.*|__pycache__|\.\w+_cache|\.hypothesis|.*\.egg-info|build|dist")
        found = [p for p in ROOT.rglob("*") if not any(made.fullmatch(part) for part in p.relative_to(ROOT).parts)]
    return [path for path in found if path.is_file()]


FOREIGN = {
    "a path of somebody's machine": rb"/(?:root|work|Users|home/\w+)/",
    "the host of a package registry": rb"(?i)pypi\.(?:org|python)|pythonhosted|registry\.npmjs|artifactory|nexus|--(?:extra-)?index-url",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_the_tree_has_nothing_of_one_machine(what: str) -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in tree()
        if path != Path(__file__) and re.search(FOREIGN[what], path.read_bytes())
    ]
    assert not found, f"{what} in {found}"


def test_nothing_is_skipped() -> None:
    marks = re.compile(r"\b(?:pytest\.(?:skip|xfail|importorskip)|mark\.(?:skip|skipif|xfail)|unittest\.skip)\b")
    found = [
        module(path)
        for path in sources("brokerkit", "tests", "examples")
        if path != Path(__file__) and marks.search(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_the_top_has_only_what_every_project_has() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in tree()}
    assert names == {
        ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "brokerkit", "docs",
        "examples", "pyproject.toml", "tests",
    }  # fmt: skip


PUBLIC = [
    "Address", "AlreadySettled", "AuthenticationError", "AuthorizationError", "Backlog", "Batch", "Broker",
    "BrokerError", "BrokerUnavailable", "BufferFull", "CallNext", "CapabilityError", "Closed", "Codec",
    "ConfigError", "Dead", "DeadLetters", "DecodeError", "DeliveryLost", "EVERY_REPLICA", "EncodeError", "Event",
    "EveryReplica", "Health", "InsecureCredentials", "InvalidName", "Letter", "Message", "Middleware", "Nack",
    "NotAttempted", "NotFound", "Outcome", "Outgoing", "PositionLost", "PublishUnknown", "Queue", "Receipt",
    "RedriveReport", "Reject", "RemoteError", "Reply", "RequestTimeout", "RetryPolicy", "Service",
    "SettingsMismatch", "Start", "Stored", "Subscription", "TooLarge", "Topic", "connect", "run",
]  # fmt: skip
