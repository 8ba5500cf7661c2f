"""docs/redis.md tells of each option that there is, with its default."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from brokerkit.drivers.redis import _options

PAGE = (Path(__file__).parents[2] / "docs" / "redis.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`.*?) \| (?:`(.*?)`)?", PAGE, re.MULTILINE)
ANYWHERE = {"insecure", "password", "prefix", "username"}
"""Options of every remote scheme."""


def test_the_page_has_every_option_and_no_other() -> None:
    source = Path(_options.__file__).read_text(encoding="utf-8")
    asked = set(re.findall(r"\boptions\.(?:text|choice|whole|seconds|flag|secret)\(\s*\"(\w+)\"", source))
    files = {"ca_file", "cert_file", "key_file"}
    assert all(f'"{name}"' in source for name in files)
    told = [name for cell, _ in ROWS for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(asked | files | ANYWHERE)


def test_the_page_tells_the_defaults() -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(_options.Settings)}
    for names, default in ROWS:
        for name in re.findall(r"`(\w+)`", names):
            real = defaults.get({"db": "database"}.get(name, name))
            if default and name != "insecure":
                assert default == (f"{real:g}" if isinstance(real, float) else str(real)), name
