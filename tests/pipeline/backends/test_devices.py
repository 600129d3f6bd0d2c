"""Several devices share one list of items: each item is made once, by one of them, and the next one is prefetched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mhim.configs.schema import ClusterConfig
from mhim.pipeline.backends import local
from mhim.pipeline.resume.stage import Item, Made, Stage, State


@dataclass
class Echo(Stage):
    """Writes which device made an item, and whether it had been prefetched."""

    folder: Path
    device: int = -1
    name = "echo"
    heavy = True

    def __post_init__(self) -> None:
        self.ahead: set[str] = set()

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.folder

    def parts(self) -> list[Stage]:
        return [replace(self, device=device) for device in (3, 7)]

    def items(self) -> list[Item]:
        return [Item(f"i{k}", self.folder / f"i{k}") for k in range(6)]

    def settings(self) -> dict[str, Any]:
        return {}

    def prefetch(self, item: Item) -> None:
        self.ahead.add(item.key)

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        import time

        time.sleep(0.3)
        out.mkdir()
        (out / "by").write_text(f"{self.device} {item.key in self.ahead}")
        return Made()


def test_each_item_once_on_one_of_the_devices(tmp_path: Path) -> None:
    stage = Echo(tmp_path)
    outcomes = list(local.run(stage, stage.items(), False, False, ClusterConfig()))
    assert sorted(o.key for o in outcomes) == [f"i{k}" for k in range(6)]
    assert all(o.state is State.DONE for o in outcomes), outcomes
    said = [(tmp_path / f"i{k}" / "by").read_text().split() for k in range(6)]
    assert {device for device, _ in said} == {"3", "7"}
    assert sum(known == "True" for _, known in said) == 4, "all but the first of each device"


def test_one_copy_of_the_extraction_per_gpu(tmp_path: Path) -> None:
    from mhim.configs.schema import Config, ExtractConfig
    from mhim.pipeline.stages.extract import Extract
    from mhim.pipeline.store import layout

    config = Config(extract=ExtractConfig(gpus=(0, 2)))
    parts = Extract(layout.Work(tmp_path), config, []).parts()
    assert [p.config.extract.gpus for p in parts if isinstance(p, Extract)] == [(0,), (2,)]
    assert parts[0].settings() == parts[1].settings(), "which GPU it is changes no fingerprint"
