"""Which controls a test drives: read out of its source, so that none is forgotten though no test looks at all of them.

In: the source of tests. Out: ids of elements that a call presses, fills or chooses in; of ids in a literal loop each.
That an id merely stands somewhere in a text does not count.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

ACTS = frozenset({"click", "dblclick", "tap", "check", "uncheck", "fill", "select_option", "press"})
_ID = re.compile(r"#(\w+)$")  # what is looked for inside of a control is another element


def driven(source: str) -> set[str]:
    """Ids of the elements that the calls in `source` act on."""
    return {found[1] for text in _selectors(ast.parse(source), {}) if (found := _ID.match(text))}


def _selectors(node: ast.AST, bound: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.For):
        try:
            each = [_binding(node.target, value) for value in ast.literal_eval(node.iter)]
        except (ValueError, TypeError):  # no literal
            each = [{}]
        for own, part in itertools.product(each, node.body):
            yield from _selectors(part, bound | own)
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ACTS:
        asked = node.func.value  # p.locator("#id").fill(...)
        located = isinstance(asked, ast.Call) and isinstance(asked.func, ast.Attribute) and asked.func.attr == "locator"
        args = asked.args if located and isinstance(asked, ast.Call) else node.args
        yield from ([_text(args[0], bound)] if args else [])
    for part in ast.iter_child_nodes(node):
        yield from _selectors(part, bound)


def _binding(target: ast.expr, value: object) -> dict[str, str]:
    """The names that a turn of a loop gives texts to."""
    if isinstance(target, ast.Name):
        return {target.id: value} if isinstance(value, str) else {}
    if isinstance(target, ast.Tuple) and isinstance(value, tuple):
        return {k: v for t, one in zip(target.elts, value, strict=True) for k, v in _binding(t, one).items()}
    return {}


def _text(node: ast.expr, bound: dict[str, str]) -> str:
    """A text, of which names may be a part; "" where it is not known."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name):
        return bound.get(node.id, "")
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(p.value if isinstance(p, ast.FormattedValue) else p, bound) for p in node.values)
    return ""
