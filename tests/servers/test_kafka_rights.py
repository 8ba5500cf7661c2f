"""The commands of README and of the page give the rights that the conformance suite runs with."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from . import USER
from .kafka import Right, rights
from .kafka.rights import commands
from .kafka.wire import _OPERATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/kafka.md"])
def test_a_page_shows_the_commands(page: str) -> None:
    shown = (ROOT / page).read_text(encoding="utf-8")
    assert f"```sh\n{commands()}\n```\n" in shown, f"{page} has to show\n{commands()}"


def test_the_commands_give_the_rights_of_the_suite() -> None:
    given: list[Right] = []
    for line in commands().replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        options = dict(itertools.pairwise(words))
        assert (options["--allow-principal"], options["--resource-pattern-type"]) == (f"User:{USER}", "prefixed")
        (resource,) = {"--topic", "--group"} & set(words)
        for name, value in itertools.pairwise(words):
            if name == "--operation":
                operation = re.sub(r"(?<!^)(?=[A-Z])", "_", value).lower()
                assert operation in _OPERATIONS
                given.append(Right(USER, resource[2:], options[resource], operation, prefixed=True))  # type: ignore[arg-type]
    assert sorted(given, key=repr) == sorted(rights("shop."), key=repr)


def test_the_table_of_the_page_has_each_of_them() -> None:
    text = (ROOT / "docs" / "kafka.md").read_text(encoding="utf-8")
    shown = {
        (resource.strip(), name)
        for name, resources in re.findall(r"^\| `([A-Z]\w+)` \| ((?:topic|group)(?:, \w+)?) \|", text, re.MULTILINE)
        for resource in resources.split(",")
    }
    assert shown == {(right.resource, right.operation.title().replace("_", "")) for right in rights("shop.")}
