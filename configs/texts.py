"""YAML and JSON texts that may come from strangers: read within limits, or refused with one message.

In: a text and what it is called in messages. Out: plain values. A text that is too long, too deep, or that grows by
aliases (a few lines of YAML can stand for billions of values) is refused before it is expanded. Knows no setting.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from mhim.configs.errors import UserError

LONGEST = 2**20  # bytes of a settings text; the longest preset has 3 kB
DEEPEST = 64
MOST = 100_000  # values, aliases written out
_OPEN = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_CLOSE = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


class TextError(UserError, ValueError):
    """A text is not readable, or beyond what is read; the message says which and why."""


def read_yaml(text: str, called: str) -> Any:
    """The plain values of a YAML text. Raises TextError."""
    if len(text) > LONGEST:
        raise TextError(f"{called} is too long for settings: {len(text)} characters, at most {LONGEST} are read")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, _OPEN) - isinstance(event, _CLOSE)
            if depth > DEEPEST:
                raise TextError(f"{called} is nested more than {DEEPEST} levels deep")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _size(node, {}, called) > MOST:
            raise TextError(f"{called} stands for more than {MOST} values, by aliases of aliases")
        return yaml.safe_load(text)
    except TextError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TextError(f"{called} is not readable YAML: {' '.join(str(error).split())}") from error


def read_json(text: str | bytes, called: str) -> Any:
    """The plain values of a JSON text. Raises TextError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise TextError(f"{called} is damaged: nested too deep to be read") from error
    except ValueError as error:
        raise TextError(f"{called} is damaged: {error}") from error


def _size(node: yaml.Node, known: dict[int, int], called: str) -> int:
    """How many values a node is when every alias is written out. Raises TextError for one that holds itself."""
    if id(node) in known:
        if not known[id(node)]:
            raise TextError(f"{called} has an alias inside of what it stands for")
        return known[id(node)]
    known[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    known[id(node)] = 1 + sum(_size(part, known, called) for part in parts)
    return known[id(node)]
