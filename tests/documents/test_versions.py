"""The version stands in three places and the locked versions in one: they agree with pyproject.toml."""

from __future__ import annotations

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.documents import lock

ROOT = lock.ROOT


def test_every_requirement_is_locked_at_a_version_that_it_allows() -> None:
    lines = [line for line in lock.LOCK.read_text().splitlines() if line and not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    assert len(locked) == len(lines), "a package stands there twice"
    wrong = []
    for text in lock.wanted("test"):
        one = Requirement(text)
        version = locked.get(canonicalize_name(one.name))
        if version is None or not one.specifier.contains(version):
            wrong.append(f"{text}: locked is {version}; python -m tests.documents.lock")
    assert wrong == []


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    released = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released is not None
    assert (released[1], cited["version"]) == (version, version)
    assert str(cited["date-released"]) == released[2]
