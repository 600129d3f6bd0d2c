"""The reader of blocks: what it takes for a command, which marks it obeys, and that a failing line fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documents import blocks

DOCUMENT = """# Title

```sh
true                 # a comment
echo one \\
  two > out.txt
```

<!-- not run: it needs a GPU -->
```sh
false
```

<!-- exit 3: that is what it shows -->
```sh
true
exit 3
```

- a list

  ```python
  # named.py
  X = 1
  ```

```python
import named
assert named.X == 1
```

```yaml
tile: {mpp: [0.25]}
```
"""


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "doc.md"
    path.write_text(DOCUMENT)
    return path


def test_blocks_are_read_with_their_marks(document: Path) -> None:
    found = blocks.blocks(document)
    assert [b.language for b in found] == ["sh", "sh", "sh", "python", "python", "yaml"]
    assert [b.skipped for b in found] == ["", "it needs a GPU", "", "", "", ""]
    assert [b.code for b in found] == [0, 0, 3, 0, 0, 0]
    assert found[3].text == "# named.py\nX = 1"  # the list's indent is off
    assert blocks.commands(found[0].text) == ["true                 # a comment", "echo one    two > out.txt"]


def test_blocks_run_as_a_reader_would(document: Path) -> None:
    for block in blocks.blocks(document):
        if not block.skipped:
            blocks.run(block)
    assert Path("out.txt").read_text() == "one two\n"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "true\nfalse\ntrue"),
        ("sh", "pipeline tile nowhere/"),
        ("sh", "pipeline no-such-verb"),
        ("python", "assert 1 == 2"),
        ("yaml", "tile: {no_such_setting: 1}"),
    ],
)
def test_a_failing_line_fails(document: Path, language: str, text: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        blocks.run(blocks.Block(document, 1, language, text))
