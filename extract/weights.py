"""Weights of encoders: where they are on this machine, their SHA-256, how they are fetched, how they are loaded safely.

In: an encoder's name, its hub id, and what the user said (`--weights`, `--offline`). Out: a file, its hash, a state
dict. Nothing here ever runs code found in a file: safetensors, or torch.load with weights_only=True. With `offline` no
socket is opened. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

from mhim.configs.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class WeightsError(UserError, ValueError):
    """Weights that are missing, damaged, refused or of another model; the message says what to do."""


def file_name(encoder: str) -> str:
    """The stem under which an encoder's weights lie in a weights folder: `timm:resnet18` -> `timm-resnet18`."""
    return encoder.replace(":", "-").replace("/", "-")


def local(encoder: str, weights: str | None) -> Path | None:
    """The file (or folder of a hub snapshot) that `weights` holds for `encoder`; None if it holds none.

    `weights` is a file, or a folder with `<name>.safetensors`, `<name>.pt` ..., `<name>/model.safetensors` or a
    snapshot folder `<name>/`. Raises WeightsError if `weights` itself is not there.
    """
    if weights is None:
        return None
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"--weights {weights}: no such file or folder")
    stems = [file_name(encoder)]
    if encoder.startswith("timm:"):
        stems.append(file_name(encoder.removeprefix("timm:")))
    for stem in stems:
        for suffix in SUFFIXES:
            if (path / (stem + suffix)).is_file():
                return path / (stem + suffix)
        if (path / stem / "config.json").is_file():
            return path / stem
        for name in HUB_FILES:
            if (path / stem / name).is_file():
                return path / stem / name
    return None


def locate(
    encoder: str,
    hub_id: str,
    hub_files: tuple[str, ...],
    weights: str | None,
    offline: bool,
    wheel: str = "",
    needs: str = "",
) -> Path:
    """The weights file of `encoder`: `--weights` first, then the file `wheel` of an installed Python package, then the
    hub's cache, then (unless offline) the hub.

    Raises WeightsError that tells how to get the file when it is nowhere; needs: what to install, in words.
    """
    found = local(encoder, weights)
    if found is None and weights is None and wheel:
        found = installed(wheel)
    if found is None and weights is None and hub_id:
        found = cached(hub_id, hub_files)
        if found is None and not offline:
            return download(encoder, hub_id, hub_files)
    if found is None:
        where = f"in {weights}" if weights else "on this machine"
        if wheel and weights is None:
            raise WeightsError(f"no weights of {encoder!r} {where}: {needs}")
        source = (
            f"`pipeline weights fetch {encoder} --to DIR` on a machine with a network"
            if hub_id
            else (f"get the file from its authors and name it {file_name(encoder)}.safetensors or .pth")
        )
        raise WeightsError(
            f"no weights of {encoder!r} {where}{' (offline)' if offline else ''}: {source}, "
            "then pass --weights DIR (or the file itself)"
        )
    return found


def installed(wheel: str) -> Path | None:
    """A file in the folder of an installed Python package, `package/path/in/it`; None where it is not installed. The
    package's code is not run."""
    from importlib.util import find_spec

    package, _, inside = wheel.partition("/")
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / inside).is_file():
            return Path(folder) / inside
    return None


def cached(hub_id: str, hub_files: tuple[str, ...] = HUB_FILES) -> Path | None:
    """The file in the local hub cache, without any network; None if it is not there."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for name in hub_files:
        path = try_to_load_from_cache(hub_id, name)
        if isinstance(path, str) and os.path.isfile(path):
            return Path(path)
    return None


def download(encoder: str, hub_id: str, hub_files: tuple[str, ...] = HUB_FILES, to: Path | None = None) -> Path:
    """Fetch the weights from the hub, into its cache or as a file in folder `to`. Raises WeightsError."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise WeightsError("fetching weights needs the package huggingface_hub: pip install huggingface_hub") from error
    _reach_hub(encoder)
    reasons = []
    for name in hub_files:
        try:
            got = Path(hf_hub_download(hub_id, name))
        except Exception as error:  # the hub's client raises a dozen unrelated types: all mean "not fetched"
            reasons.append(
                f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
            continue
        return got if to is None else _copy(got, to, encoder, hub_id, name)
    raise WeightsError(
        f"cannot fetch the weights of {encoder!r} from hub repository {hub_id} ({'; '.join(reasons)}). "
        "If the model is gated, ask for access on its page and run `hf auth login`; without a network, fetch elsewhere "
        f"(`pipeline weights fetch {encoder} --to DIR`) and pass --weights DIR"
    )


def _reach_hub(encoder: str) -> None:
    """Raise WeightsError at once where there is no network: the hub's client would retry for a minute."""
    import socket
    from urllib.parse import urlsplit

    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # the proxy resolves names
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host, port = hub.hostname or "huggingface.co", hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise WeightsError(
            f"no weights of {encoder!r} on this machine, and {host} cannot be reached ({error}): run `pipeline weights "
            f"fetch {encoder} --to DIR` on a machine with a network, copy DIR here and pass --weights DIR"
        ) from error


def snapshot(encoder: str, hub_id: str, to: Path) -> Path:
    """Fetch a whole model folder (weights, configuration, the authors' code) into `to`/<name>. Raises WeightsError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise WeightsError("fetching weights needs the package huggingface_hub: pip install huggingface_hub") from error
    folder = to / file_name(encoder)
    _reach_hub(encoder)
    try:
        snapshot_download(
            hub_id, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.py", "*.txt"]
        )
    except Exception as error:  # as in `download`
        raise WeightsError(f"cannot fetch {hub_id} ({type(error).__name__}: {error}); is the model gated?") from error
    return folder


def _copy(got: Path, to: Path, encoder: str, hub_id: str, name: str) -> Path:
    """Copy a downloaded file aside into `to`, rename it, and leave a note of where it came from."""
    import shutil

    to.mkdir(parents=True, exist_ok=True)
    final = to / (file_name(encoder) + Path(name).suffix)
    aside = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.copyfile(got, aside)
    os.replace(aside, final)
    note = {"encoder": encoder, "hub_id": hub_id, "file": name, "sha256": sha256(final)}
    final.with_suffix(".json").write_text(json.dumps(note, indent=1) + "\n")
    return final


def sha256(path: Path) -> str:
    """SHA-256 of a weights file, or of the weights files of a snapshot folder (names and contents, sorted)."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _sha256(path: str, mtime_ns: int, size: int) -> str:
    target = Path(path)
    if target.is_dir():
        total = hashlib.sha256()
        for file in sorted(target.rglob("*")):
            if file.suffix in (*SUFFIXES, ".json", ".py") and file.is_file():
                total.update(file.relative_to(target).as_posix().encode() + sha256(file).encode())
        return total.hexdigest()
    with target.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_state(path: Path) -> dict[str, Any]:
    """The tensors of a weights file by name, on the CPU. Code in the file is never run.

    A checkpoint that wraps its tensors (`model`, `state_dict`, `teacher` ...) is unwrapped.
    Raises WeightsError for a file that is not there or truncated, a pickle with anything but tensors in it, or a file
    without tensors.
    """
    import torch

    if not path.exists():
        raise WeightsError(f"{path} does not exist")
    if path.is_dir():
        inside = next((path / name for name in HUB_FILES if (path / name).is_file()), None)
        if inside is None:
            raise WeightsError(f"{path} holds neither {' nor '.join(HUB_FILES)}")
        path = inside
    with path.open("rb") as stream:
        head = stream.read(9)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{path} is damaged or not a safetensors file ({error}); fetch it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is refused: it is not a plain file of tensors and could run code when opened "
            f"({str(error).strip().splitlines()[0]}). Convert it to safetensors on a machine you can lose"
        ) from error
    # a file that is something else is read as instructions by torch's reader, which stumbles over any of these
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise WeightsError(f"{path} is damaged or truncated, or no file of tensors ({said}); fetch it again") from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Any]:
    import torch

    for _ in range(3):
        if isinstance(content, dict) and content and all(isinstance(v, torch.Tensor) for v in content.values()):
            return content
        inner = [
            k
            for k in ("state_dict", "model", "teacher", "model_state_dict", "module")
            if isinstance(content, dict) and isinstance(content.get(k), dict)
        ]
        if not inner:
            break
        content = content[inner[0]]
    raise WeightsError(f"{path} holds no table of tensors (nor one under state_dict, model or teacher)")


def load_into(model: Any, state: dict[str, Any], path: Path, encoder: str, unused: tuple[str, ...] = ()) -> None:
    """Load `state` into `model`, strictly: every parameter must be there with its shape, and nothing else.

    Keys that start with one of `unused` (a classifier that the encoder does not have) are left out.
    Raises WeightsError naming the first keys that do not fit.
    """
    own = model.state_dict()
    state = {k.removeprefix("module."): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in own or not k.startswith(unused or ("\0",))}
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    wrong = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or wrong:
        parts = []
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape", wrong)):
            if names:
                parts.append(f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
        raise WeightsError(
            f"{path} does not hold the weights of {encoder!r}: {'; '.join(parts)}. Is it the file of another model?"
        )
    model.load_state_dict(state, strict=False)
