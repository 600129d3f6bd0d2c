"""Patch encoders: one file each (or one table for a family listed as data). Pixels in, one vector per tile out.

A name resolves in this order: a row of `table.csv`; `timm:<model>`; a file of this folder (`texture`); the user's own
function, `my_module.my_function` or `./mine.py:my_function` (`configs.lookup.KINDS`), called with `encoder_params` as
keyword arguments and returning an `Encoder`.
A file offers `Params`, `VERSION` (raise it when the features change) and `build(params) -> Encoder`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from mhim.configs import lookup
from mhim.configs.schema import ExtractConfig
from mhim.extract import weights
from mhim.extract.encoders import _table
from mhim.extract.encoders._contract import Encoder as Encoder
from mhim.extract.encoders._contract import EncoderError as EncoderError
from mhim.extract.encoders._contract import GpuFailed as GpuFailed
from mhim.extract.encoders._contract import NoGpu as NoGpu
from mhim.extract.encoders._contract import resolved_precision as resolved_precision
from mhim.extract.encoders._table import Row as Row
from mhim.extract.encoders._table import rows as rows

ENCODERS = "mhim.extract.encoders"
MPP_TOLERANCE = 0.05  # tiles within 5 % of the trained mpp are the same resolution for an encoder


def build(config: ExtractConfig) -> Encoder:
    """The encoder of `config.encoder`, ready to use. Raises EncoderError, WeightsError, LookupFailed or NoGpu."""
    name = config.encoder
    if name in _table.rows() or name.startswith("timm:"):
        from mhim.extract.encoders import _families

        return _families.build(config)
    if (own := _own(name)) is not None:
        return _users_own(config, own.load())
    module = _file(name)
    encoder: Encoder = module.build(lookup.params(module, config.encoder_params))
    return encoder


def identity(config: ExtractConfig) -> dict[str, Any]:
    """What decides the features besides the settings: name, weights, recipe. Builds no model and imports no torch.

    Keys: encoder, weights_id, pooling, transform, precision (what `auto` becomes; `own` where the encoder is not
    asked), tile_px and mpp (accepted values; empty: any). Weights that are not
    on this machine yet are fetched, unless `offline`. Raises as `build`, as far as it can be told without building.
    """
    name = config.encoder
    row = _table.rows().get(name)
    if row is not None or name.startswith("timm:"):
        from mhim.extract import weights

        hub_id, files = (row.hub_id, row.hub_files or weights.HUB_FILES) if row else _timm_hub(config)
        more = (row.wheel, row.needs) if row else ()
        path = weights.locate(name, hub_id, files, config.weights, config.offline, *more)
        return {
            "encoder": name,
            "weights_id": weights.sha256(path),
            "pooling": str(config.encoder_params.get("pooling") or (row.pooling if row else "model")),
            "transform": _recipe_text(row) if row else "timm's own of the model",
            "precision": resolved_precision(config, row.precision if row else "float32"),
            "tile_px": list(row.tile_px) if row else [],
            "mpp": list(row.mpp) if row else [],
        }
    if (own := _own(name)) is not None:
        code = own.code
        if config.weights is not None:
            from mhim.extract import weights

            found = weights.local(name, config.weights)
            code += f"+{weights.sha256(found)}" if found else ""
        return {
            "encoder": name,
            "weights_id": f"code-{code}",
            "pooling": "own",
            "transform": "own",
            "precision": "own",
            "tile_px": [],
            "mpp": [],
        }
    module = _file(name)
    lookup.params(module, config.encoder_params)
    return {
        "encoder": name,
        "weights_id": module.VERSION,
        "pooling": "own",
        "transform": "own",
        "precision": "own",
        "tile_px": [],
        "mpp": [],
    }


def known(name: str) -> None:
    """Raises EncoderError or LookupFailed unless there is an encoder of that name which this command may use."""
    if name in names() or name.startswith("timm:"):
        return
    own = _own(name)
    if own is None:
        _file(name)
    else:
        own.load()


def names() -> list[str]:
    """Every encoder known by name: the table's and this folder's. `timm:<model>` and the user's own come on top."""
    return sorted({*_table.rows(), *lookup.names(ENCODERS)})


def check_tiles(known: dict[str, Any], tile_px: int, mpp: float, allow_mismatch: bool) -> str:
    """Nothing ("") if tiles of `tile_px` at `mpp` µm/px suit the encoder of `identity()`; else a note, if allowed.

    Raises EncoderError naming both sides when they are not allowed.
    """
    wrong = []
    if known["tile_px"] and tile_px not in known["tile_px"]:
        wrong.append(f"{' or '.join(str(p) for p in known['tile_px'])} px tiles, not {tile_px}")
    if known["mpp"] and not any(abs(mpp / m - 1) <= MPP_TOLERANCE for m in known["mpp"]):
        wrong.append(f"{' or '.join(f'{m:g}' for m in known['mpp'])} µm/px, not {mpp:g}")
    if not wrong:
        return ""
    text = f"{known['encoder']} was made for {' and for '.join(wrong)}"
    if allow_mismatch:
        return text
    best = [f"--tile-px {known['tile_px'][0]}"] if known["tile_px"] else []
    best += [f"--mpp {known['mpp'][0]:g}"] if known["mpp"] else []
    raise EncoderError(
        f"{text}: tile again with {' '.join(best)}, or pass --allow-mismatch (recorded with the features)"
    )


def _file(name: str) -> Any:
    known = lookup.names(ENCODERS)
    if name not in known:
        near = "".join(f" (did you mean {n}?)" for n in difflib.get_close_matches(name, names(), 1))
        raise EncoderError(
            f"unknown encoder {name!r}{near}; there is: {', '.join(names())}; timm:<any timm model>; or your own "
            "function as my_module.my_function or ./my_file.py:my_function"
        )
    return lookup.find(ENCODERS, name)


def _recipe_text(row: _table.Row) -> str:
    crop = f" crop {row.input_px}" if row.resize_px != row.input_px else ""
    mean, std = (" ".join(map(str, v)) for v in (row.mean, row.std))
    return f"resize {row.resize_px} {row.interpolation}{crop} mean {mean} std {std}"


def _timm_hub(config: ExtractConfig) -> tuple[str, tuple[str, ...]]:
    """Hub id and files of a `timm:` model. Asks timm (4 s to import) only when the weights were not given locally."""
    from mhim.extract import weights

    if config.weights is not None:
        return "", weights.HUB_FILES
    from mhim.extract.encoders import _families

    return _families.timm_hub_id(config.encoder), weights.HUB_FILES


def _own(name: str) -> lookup.Own | None:
    """The user's own encoder of this name, allowed in this command; None for one that ships, or where there is none."""
    return None if name in names() or name.startswith("timm:") else lookup.own(ENCODERS, name)


def _users_own(config: ExtractConfig, function: Callable[..., Any]) -> Encoder:
    name = config.encoder
    try:
        encoder = function(**config.encoder_params)
    except TypeError as error:
        raise EncoderError(
            f"encoder {name!r} does not take encoder_params {sorted(config.encoder_params)}: {error}"
        ) from error
    if not isinstance(encoder, Encoder):
        raise EncoderError(
            f"encoder {name!r} returns {type(encoder).__name__}; it must return an mhim.extract.encoders.Encoder"
        )
    return encoder


def hub_files(name: str) -> tuple[str, tuple[str, ...]]:
    """Where the hub keeps the weights of a listed encoder that timm loads, or of `timm:<model>`: id and file names.

    Raises EncoderError."""
    from mhim.extract.encoders import _families

    return _families.timm_hub_id(name), weights.HUB_FILES


def check_device(config: ExtractConfig) -> None:
    """Raise NoGpu where the settings want a GPU that this machine has not."""
    from mhim.extract.encoders._torch import device_of

    device_of(config)
