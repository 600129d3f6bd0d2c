"""Every command block of every document runs, every relative link leads somewhere, what is generated is up to date."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.documents import blocks, write

ROOT = write.ROOT
README_BYTES = 9_000
# the order in which a reader comes to them: all in one folder, each goes on from what the ones before have left
# (so one of them alone, picked by its name, may miss what it goes on from)
ORDER = (
    "README.md",
    "pipeline/README.md",
    "pipeline/API.md",
    "pipeline/CLUSTERS.md",
    "pipeline/LAYOUT.md",
    "pipeline/TABLES.md",
    "extract/README.md",
    "mil/README.md",
    "configs/README.md",
    "configs/PLUGINS.md",
)
GUIDES = (
    "pipeline/README.md",
    "pipeline/API.md",
    "pipeline/CLUSTERS.md",
    "pipeline/LAYOUT.md",
    "pipeline/TABLES.md",
    "extract/README.md",
    "mil/README.md",
    "configs/PLUGINS.md",
    "docker/README.md",
    "tests/benchmarks/README.md",
    "CONTRIBUTING.md",
)
DOCUMENTS = [str(p.relative_to(ROOT)) for p in write.documents()]
READ = [*ORDER, *(name for name in DOCUMENTS if name not in ORDER)]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def mirrored(source: Path, target: Path) -> None:
    """Another slide of the same kind: `source` mirrored, which changes every pixel and no tissue."""
    import tifffile

    target.parent.mkdir(exist_ok=True)
    with tifffile.TiffFile(source) as slide, tifffile.TiffWriter(target) as out:
        for page in slide.pages:
            assert isinstance(page, tifffile.TiffPage)
            out.write(
                page.asarray()[:, ::-1],
                tile=(256, 256),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=(2, 2),
                subfiletype=page.subfiletype,
                description=page.description,
                metadata=None,
            )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_cohort: Path) -> Path:
    """What a reader has: slides/ and labels.csv of the painted cohort (its whole slides, each of a patient of its own),
    two new slides, and a table of bags."""
    here = tmp_path_factory.mktemp("reader")
    labels = (demo_cohort / "labels.csv").read_text().splitlines()
    rows = [line.split(",") for line in labels if line.startswith("case_")]
    (here / "slides").mkdir()
    for slide, *_ in rows:
        shutil.copy(demo_cohort / "slides" / slide, here / "slides" / slide)
    table = [f"{slide},P{k},{label},{site}" for k, (slide, _, label, site, *_) in enumerate(rows)]
    (here / "labels.csv").write_text("\n".join(["slide,patient,label,site", *table]) + "\n")
    mirrored(here / "slides" / rows[0][0], here / "new" / "slide.svs")
    lines = ["slide,patient,label"]
    for k in (1, 2):
        mirrored(here / "slides" / rows[k][0], here / "other_hospital" / f"other_{k}.svs")
        lines.append(f"other_{k}.svs,Q{k},{rows[k][2]}")
    (here / "other.csv").write_text("\n".join(lines) + "\n")
    bags = [f"{bag % 2},{bag},{bag % 2 + i / 10},{i / 7}" for bag in range(20) for i in range(4)]
    (here / "bags.csv").write_text("\n".join(["label,bag,f1,f2", *bags]) + "\n")
    return here


@pytest.mark.parametrize("name", READ)
def test_every_block_of_a_document_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for block in blocks.blocks(ROOT / name):
        if not block.skipped:
            blocks.run(block)


def test_every_block_says_what_it_is_and_why_it_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    wrong = []
    for name in DOCUMENTS:
        for block in blocks.blocks(ROOT / name):
            counts["not run" if block.skipped else "text" if block.language == "text" else "run"] += 1
            if block.language not in blocks.LANGUAGES:
                wrong.append(f"{name}:{block.line}: language {block.language!r}, not one of {blocks.LANGUAGES}")
            first = [line.split(" ")[0] for line in block.text.splitlines()]
            if block.language == "text" and set(first) & set(blocks.COMMANDS) and name != "README.md":
                wrong.append(f"{name}:{block.line}: a command in a block of text")
    with capsys.disabled():
        print(
            f"\nblocks of documents: {counts['run']} run, {counts['not run']} marked as not run, {counts['text']} text"
        )
    assert not wrong, "\n".join(wrong)
    assert counts["run"] > counts["not run"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    dead = []
    for match in LINK.finditer(prose(ROOT / name)):
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            dead.append(target)
    assert dead == []


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```\s*$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as the usual viewers of Markdown make them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", GUIDES)
def test_guides_list_their_contents(name: str) -> None:
    text = (ROOT / name).read_text()
    headings = re.findall(r"^## +(.+?)\s*$", prose(ROOT / name), flags=re.MULTILINE)
    missing = [h for h in headings if not re.search(rf"^- \[{re.escape(h)}", text, flags=re.MULTILINE)]
    assert missing == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_generated_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text() == write.made(ROOT / name), "python -m tests.documents.write"
