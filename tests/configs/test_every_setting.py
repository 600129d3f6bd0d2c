"""Every setting is given a value by some test, besides the generic ones that set them all."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from mhim.configs import lookup
from mhim.configs.schema import Config

ROOT = Path(__file__).resolve().parents[2]
# they go through all settings alike, or hold tables of names: what is named there shows nothing
GENERIC = {"tests/configs/test_every_setting.py", "tests/pipeline/resume/test_fingerprints.py"}
# the settings of models and segmenters: tests/contracts/test_settings.py shows what each one does
KINDS = ("mhim.extract.encoders", "mhim.pipeline.backends")
# not given a value by any test, with what it would take
UNTESTED = {
    "dask.worker_resources": "a cluster started here; the verbs' `resources` are tested on one started by hand",
    "dask.in_flight": "how many items wait at the scheduler at once shows in its memory only",
}


def settings() -> list[str]:
    """`section.name` of the schema, `plug-in.name` of what plug-ins add."""
    config = Config()
    found = [
        f"{section}.{name}"
        for section in type(config).model_fields
        if isinstance(getattr(config, section), BaseModel)
        for name in type(getattr(config, section)).model_fields
    ]
    for kind in KINDS:
        for plugin in lookup.names(kind):
            params = getattr(lookup.find(kind, plugin), "Params", None)
            if params is not None:
                found += [f"{plugin}.{name}" for name in params.model_fields]
    return found


def values_set(source: str) -> set[str]:
    """Names to which a source file gives a value: keywords of calls, keys of literal mappings, `name=value` and
    `name: value` inside strings, as after --set, and flags of the command line."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg:
            found |= {node.arg, node.arg.rpartition("__")[2]}
        elif isinstance(node, ast.Dict):
            found |= {
                k.value.rpartition(".")[2]
                for k in node.keys
                if isinstance(k, ast.Constant) and isinstance(k.value, str)
            }
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\b([a-z][a-z0-9_]*)(?:=|: )", node.value))
            if re.fullmatch(r"--[a-z0-9-]+", node.value):
                found.add(node.value[2:].replace("-", "_"))
    return found


@pytest.fixture(scope="module")
def set_somewhere() -> set[str]:
    files = [p for p in (ROOT / "tests").rglob("*.py") if p.relative_to(ROOT).as_posix() not in GENERIC]
    return set().union(*(values_set(p.read_text()) for p in files if "benchmarks" not in p.parts))


def test_every_setting_is_given_a_value_by_some_test(set_somewhere: set[str]) -> None:
    assert {name for name in settings() if name.rpartition(".")[2] not in set_somewhere} == set(UNTESTED)
