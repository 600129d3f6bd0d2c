"""What `pipeline encoders` shows: every encoder known by name, and whether its weights are on this machine.

In: a weights folder or nothing. Out: lines for a person. Reads the table and looks for files; builds no model and opens
no connection.
"""

from __future__ import annotations

from pathlib import Path

from mhim.configs import lookup
from mhim.extract import encoders, weights
from mhim.pipeline.resume import console


def show(folder: Path | None, name: str | None) -> int:
    """All encoders in a table; with `name`, all that is known of one. 2 if there is no such name."""
    rows = encoders.rows()
    if name is not None:
        row = rows.get(name)
        if row is None:
            console.err.print(f"no encoder {name!r} in the table; `pipeline encoders` lists them")
            return 2
        for key, value in row.model_dump().items():
            text = ", ".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
            console.out.print(f"{key:14} {console.escape(text)}")
        console.out.print(f"{'weights':14} {console.escape(_where(row, folder))}")
        return 0
    lines = [("encoder", "width", "tile px", "µm/px", "commercial", "gated", "beyond timm", "weights here")]
    for own in lookup.names("mhim.extract.encoders"):
        lines.append((own, "", "any", "any", "yes", "no", "", "needs none"))
    for row in rows.values():
        px = "/".join(map(str, row.tile_px)) or "any"
        mpp = "/".join(f"{m:g}" for m in row.mpp) or "any"
        needs = "" if row.loader == "timm" else row.needs.split(";")[0]
        where = _where(row, folder)
        lines.append((row.name, str(row.dim), px, mpp, row.commercial, row.gated, needs, where))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        console.out.print(console.escape("  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip()))
    console.out.print(
        "and timm:<any timm model>, and your own function as my_module.my_function.\n"
        "Licence, sources and doubts of one: pipeline encoders NAME"
    )
    return 0


def _where(row: encoders.Row, folder: Path | None) -> str:
    found = weights.local(row.name, str(folder)) if folder else None
    if found is None and row.wheel:
        found = weights.installed(row.wheel)
    if found is None and row.hub_id:
        found = weights.cached(row.hub_id, row.hub_files or weights.HUB_FILES)
    return str(found) if found else "-"


def fetch(name: str, to: Path) -> int:
    """Fetch the weights of one encoder into folder `to`. Raises WeightsError."""
    row = encoders.rows().get(name)
    if row is not None and row.loader in ("transformers", "open_clip") and not row.hub_files:
        path = weights.snapshot(name, row.hub_id, to)
    else:
        if row is not None:
            hub_id, files = row.hub_id, row.hub_files or weights.HUB_FILES
        elif name.startswith("timm:"):
            hub_id, files = encoders.hub_files(name)
        else:
            console.err.print(f"no encoder {name!r} has weights to fetch; `pipeline encoders` lists them")
            return 2
        if not hub_id:
            console.err.print(f"the weights of {name} are on no hub: {row.needs if row else 'ask its authors'}")
            return 2
        path = weights.download(name, hub_id, files, to)
    console.out.print(f"{path}\nnow: pipeline extract --encoder {name} --weights {to} --offline")
    return 0
