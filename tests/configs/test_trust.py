"""Names out of files import nothing: only what ships, what was typed, and what is installed as an entry point."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mhim.configs import lookup, source, trust
from mhim.configs.load import ConfigError, resolve

FOLDERS = ("mhim.extract.tissue", "mhim.mil.models", "mhim.pipeline.backends")


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in the working folder that leaves a mark when it is imported. Returns the mark."""
    mark = tmp_path / "mark"
    (tmp_path / "stranger_x").mkdir()
    (tmp_path / "stranger_x" / "__init__.py").write_text(f"open({str(mark)!r}, 'a').close()\n")
    (tmp_path / "stranger_x" / "code.py").write_text(
        f"open({str(mark)!r}, 'a').close()\nfrom os import system\ndef segment(*a): ...\ndef build(*a): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield mark
    sys.path[:] = before
    for name in [n for n in sys.modules if n.partition(".")[0] == "stranger_x"]:
        del sys.modules[name]


@pytest.mark.parametrize("package", FOLDERS)
@pytest.mark.parametrize(
    "name", ["stranger_x.code", "stranger_x", "subprocess.run", "os", "mhim.pipeline.demo.cohort", "..x", ""]
)
def test_a_name_that_nobody_typed_imports_nothing(package: str, name: str, stranger: Path) -> None:
    with pytest.raises(lookup.LookupFailed):
        lookup.find(package, name)
    assert not stranger.exists()


@pytest.mark.parametrize(
    "name", ["stranger_x.code.system", "subprocess.getoutput", "mhim.pipeline.demo.cohort.make_cohort"]
)
def test_no_encoder_is_called_because_data_says_so(name: str, stranger: Path) -> None:
    from mhim.configs.schema import ExtractConfig
    from mhim.extract import encoders

    for ask in (encoders.identity, encoders.build):
        with pytest.raises(lookup.NotTrusted, match="--allow-plugin"):
            ask(ExtractConfig(encoder=name, encoder_params={"command": f"touch {stranger}"}))
    assert not stranger.exists()


def test_what_an_allowed_module_only_imported_is_not_its_encoder(stranger: Path) -> None:
    from mhim.configs.schema import ExtractConfig
    from mhim.extract import encoders

    trust.allow("stranger_x.code")
    ran = stranger.with_name("ran")
    with pytest.raises(lookup.LookupFailed, match=r"is not of 'stranger_x\.code'"):
        encoders.build(ExtractConfig(encoder="stranger_x.code.system", encoder_params={"command": f"touch {ran}"}))
    assert not ran.exists()


def test_what_is_typed_or_allowed_is_found_in_the_working_folder_behind_all_else(stranger: Path) -> None:
    resolve([], ["tile.segmenter=stranger_x.code"])
    assert lookup.find("mhim.extract.tissue", "stranger_x.code").__name__ == "stranger_x.code"
    assert sys.path[-1] == str(stranger.parent)
    trust.adopt(trust.Trust())
    with pytest.raises(lookup.NotTrusted):
        lookup.find("mhim.extract.tissue", "stranger_x.code")
    resolve([], ["train.model_params={student: stranger_x.code}"])
    lookup.find("mhim.mil.models", "stranger_x.code")


def test_installed_plugins_are_found_by_name_and_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    trust.adopt(trust.Trust())
    entry = EntryPoint("colour", "tests.extract.own_encoder:mean_colour", "mhim.encoders")
    model = EntryPoint("slow", "tests.pipeline.slow_tissue", "mhim.tissue")
    there = {"mhim.extract.encoders": {"colour": entry}, "mhim.extract.tissue": {"slow": model}}
    monkeypatch.setattr(trust, "installed", lambda package: there.get(package, {}))
    from mhim.configs.schema import ExtractConfig
    from mhim.extract import encoders

    assert encoders.build(ExtractConfig(encoder="colour")).dim == 6
    assert encoders.identity(ExtractConfig(encoder="colour"))["weights_id"].startswith("code-")
    assert lookup.find("mhim.extract.tissue", "slow").__name__ == "tests.pipeline.slow_tissue"
    assert lookup.find("mhim.extract.tissue", "tests.pipeline.slow_tissue")
    with pytest.raises(lookup.NotTrusted):
        lookup.find("mhim.mil.models", "tests.pipeline.toys")


def test_code_that_comes_with_weights_is_typed_or_not_run(tmp_path: Path) -> None:
    from mhim.configs.schema import ExtractConfig
    from mhim.extract import encoders

    file = tmp_path / "my.yaml"
    file.write_text("extract:\n  encoder: keep\n  encoder_params: {trust_remote_code: true}\n")
    with pytest.raises(ConfigError, match="type it: --set"):
        resolve([str(file)])
    data = ExtractConfig(encoder="hibou-b", encoder_params={"trust_remote_code": True}, offline=True)
    with pytest.raises(lookup.NotTrusted, match="no file may"):
        encoders.build(data)
    assert not trust.current().remote_code
    resolve([], ["extract.encoder_params.trust_remote_code=true"])
    assert trust.current().remote_code


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tile: " + "[" * 100_000, "levels deep"),
        ("tile: " + "{a: " * 70 + "1" + "}" * 70, "levels deep"),
        (LAUGHS, "aliases"),
        ("a: &a [*a]", "alias"),
        ("a: " + "x" * 2**21, "too long"),
        ("a: [", "not readable YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not readable YAML"),
        ("\x00", "not readable YAML"),
    ],
)
def test_yaml_beyond_limits_is_one_message(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        resolve([str(file)])


def test_the_hash_of_code_follows_what_a_module_imports_from_its_folder(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "alone_m.py").write_text("import os\n")
    alone = source.code_hash(tmp_path / "alone_m.py", "alone_m")
    assert alone == hashlib.sha256(b"import os\n").hexdigest()  # as features of version 0.1 say it
    package = tmp_path / "pack_m"
    package.mkdir()
    texts = {"seg": "from . import one\n", "one": "from pack_m.two import x\n", "two": "x = 1\n"}
    for name, text in {"__init__": "", "other": "", **texts}.items():
        (package / f"{name}.py").write_text(text)

    def now() -> str:
        return source.code_hash(package / "seg.py", "pack_m.seg")

    first = now()
    (package / "other.py").write_text("unrelated = 1\n")
    assert now() == first
    for name in ("seg", "one", "two", "__init__"):
        (package / f"{name}.py").write_text((package / f"{name}.py").read_text() + "y = 2\n")
        assert now() != first
        first = now()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of a name of its own that holds all four kinds, in a folder that nobody looks in. Nothing is allowed."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    file = folder / f"mine_{tmp_path.name[-1]}.py"
    file.write_text(
        "import numpy as np\n"
        "from mhim.extract.encoders import Encoder\n"
        "from mhim.mil.models import mean\n"
        "def encoder(scale: float = 1.0):\n"
        "    return Encoder('m', lambda t: t.mean((1, 2)) * scale, 3, None, None, '1')\n"
        "def other(): return encoder(2.0)\n"
        "class segmenter:\n"
        "    def segment(rgb, mpp, params): return rgb[..., 0] < 200\n"
        "class model:\n"
        "    Params, build = mean.Params, mean.build\n"
        "class backend:\n"
        "    def run(stage, items, replace, remake, cluster): return iter(())\n"
        "number = 3\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    trust.adopt(trust.Trust())
    yield file
    sys.modules.pop(file.stem, None)


KEYS = {
    "extract.encoder": "mhim.extract.encoders",
    "tile.segmenter": "mhim.extract.tissue",
    "tile.fallback_segmenter": "mhim.extract.tissue",
    "train.model": "mhim.mil.models",
    "cluster.backend": "mhim.pipeline.backends",
}


def value_of(config: object, key: str) -> str:
    section, _, name = key.partition(".")
    return str(getattr(getattr(config, section), name))


@pytest.mark.parametrize("key", KEYS)
def test_one_file_holds_all_four_kinds_and_is_one_name_in_records(key: str, mine: Path) -> None:
    config = resolve([], [f"{key}={mine}"])
    assert value_of(config, key) == mine.stem
    found = lookup.find(KEYS[key], mine.stem)
    kind = lookup.KINDS[KEYS[key]].called
    assert found is getattr(sys.modules[mine.stem], kind)
    assert sys.path[-1] == str(mine.parent)  # behind everything else
    # the same object named, as a file and as a module, is the same plug-in with the same code
    assert value_of(resolve([], [f"{key}={mine}:{kind}"]), key) == f"{mine.stem}.{kind}"
    assert value_of(resolve([], [f"{key}={mine.stem}:{kind}"]), key) == f"{mine.stem}.{kind}"
    assert lookup.find(KEYS[key], f"{mine.stem}.{kind}") is found
    codes = {lookup.code_of(KEYS[key], name) for name in (mine.stem, f"{mine.stem}.{kind}")}
    assert codes == {source.code_hash(mine, mine.stem)}
    # a record that holds the name imports nothing in a command that does not allow it
    trust.adopt(trust.Trust())
    with pytest.raises(lookup.LookupFailed):
        lookup.find(KEYS[key], f"{mine.stem}.{kind}")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("{file}:nothing", "no object 'nothing'"),
        ("{file}:number", "does not offer"),
        ("{file}x.py", "there is no file"),
        ("{folder}/random.py", "a module of Python itself"),
        ("{folder}/numpy.py", "is installed already"),
        ("{folder}/a-b.py", "cannot be the name of a module"),
        ("{folder}/empty_m.py", "has no object called"),
        ("{folder}/broken_m.py", "cannot import 'broken_m': ZeroDivisionError"),
    ],
)
def test_a_file_that_is_no_plug_in_is_told_alike_for_every_kind(key: str, named: str, says: str, mine: Path) -> None:
    for name in ("random", "numpy", "a-b", "empty_m"):
        (mine.parent / f"{name}.py").write_text("")
    (mine.parent / "broken_m.py").write_text("1 / 0\n")
    with pytest.raises(lookup.LookupFailed, match=says):
        lookup.find(KEYS[key], value_of(resolve([], [f"{key}={named.format(file=mine, folder=mine.parent)}"]), key))
    sys.modules.pop("empty_m", None)


def test_two_files_of_one_name_are_refused(mine: Path, tmp_path: Path) -> None:
    (tmp_path / mine.name).write_text("")
    with pytest.raises(lookup.LookupFailed, match="have one name"):
        resolve([], [f"tile.segmenter={mine}", f"train.model={tmp_path / mine.name}"])


def test_an_encoder_of_a_file_takes_its_settings_and_its_code_is_its_weights(mine: Path) -> None:
    import numpy as np

    from mhim.extract import encoders

    config = resolve([], [f"extract.encoder={mine}", "extract.encoder_params={scale: 3}"]).extract
    tiles = np.full((2, 4, 4, 3), 7, np.uint8)
    np.testing.assert_array_equal(encoders.build(config).encode(tiles), np.full((2, 3), 21.0))
    assert encoders.identity(config)["weights_id"] == f"code-{source.code_hash(mine, mine.stem)}"
    other = resolve([], [f"extract.encoder={mine}:other"]).extract
    np.testing.assert_array_equal(encoders.build(other).encode(tiles), np.full((2, 3), 14.0))


def test_what_is_allowed_by_file_is_allowed_so_in_other_processes(mine: Path) -> None:
    from mhim.configs import plugins_named

    plugins_named.taken_out(["--allow-plugin", str(mine), f"--allow-plugin={mine.stem}.model"])
    assert plugins_named.flags() == ["--allow-plugin", str(mine), "--allow-plugin", f"{mine.stem}.model"]
    assert lookup.find("mhim.mil.models", f"{mine.stem}.model")
    assert plugins_named.taken_out(["score", *plugins_named.flags()]) == ["score"]
    assert lookup.find("mhim.extract.tissue", mine.stem).segment


def test_names_out_of_received_settings_name_no_file(mine: Path) -> None:
    """What was not typed is looked up as it stands: a path is no name."""
    from mhim.configs.load import merged, validate

    config = validate(merged([], [f"train.model={mine}"]))
    with pytest.raises(lookup.LookupFailed):
        lookup.find("mhim.mil.models", config.train.model)
    assert mine.stem not in sys.modules


def test_own_code_of_before_0_2_is_told_the_new_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "older_x.py").write_text("from mil.models.mean import Params, build\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "mil", None)  # in a clone, the folder of that name would be found
    trust.allow("older_x")
    with pytest.raises(lookup.LookupFailed, match=r"begin with mhim since version 0\.2\.0: write mhim\.mil"):
        lookup.find("mhim.mil.models", "older_x")
