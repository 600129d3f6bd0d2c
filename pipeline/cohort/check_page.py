"""The contact sheet of `pipeline check`: one self-contained HTML page, no script, no network.

In: findings with their thumbnails, in order. Out: HTML text. Knows nothing of slides.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhim.pipeline.cohort.finding import Finding

_STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:1.5rem;color:#222;background:#fff}
.grid{display:flex;flex-wrap:wrap;gap:12px}
figure{margin:0;width:330px;border:1px solid #ccc;border-radius:6px;padding:8px}
figure.bad{border-color:#c60;background:#fff6ec}img{max-width:320px;max-height:240px;display:block;margin-bottom:6px}
b{overflow-wrap:anywhere}.why{color:#a40}.note{color:#666}"""


def page(title: str, findings: Sequence[Finding], summary: Sequence[str]) -> str:
    """One HTML document; every text is escaped, pictures are embedded."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary)
    cards = "".join(_card(f) for f in findings)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Check of {escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>Check of {escape(title)}</h1><ul>{lines}</ul>"
        "<p>Least tissue first. Green: outline of the tissue; blue: tiles; orange frame: needs a person.</p>"
        f'<div class="grid">{cards}</div></body></html>\n'
    )


def _card(f: Finding) -> str:
    picture = ""
    if f.thumbnail:
        data = base64.b64encode(f.thumbnail).decode()
        picture = f'<img loading="lazy" alt="{escape(f.slide)}" src="data:image/jpeg;base64,{data}">'
    facts = [f.state]
    if f.width:  # it was opened
        mpp = "mpp unknown" if f.mpp_x is None else f"{f.mpp_x:.4g} µm/px ({f.mpp_source})"
        facts += [f.vendor, f"{f.width} × {f.height} px", mpp]
    if f.tissue_fraction is not None:  # and its tissue looked for
        facts += [f"{f.tissue_fraction:.1%} tissue", f"{f.tiles} tiles"]
    why = "".join(f'<div class="why">{escape(p)}</div>' for p in f.problems)
    notes = "".join(f'<div class="note">{escape(w)}</div>' for w in f.warnings)
    told = escape(" · ".join(facts))
    bad = ' class="bad"' if f.problems else ""
    return f"<figure{bad}>{picture}<b>{escape(f.slide)}</b><div>{told}</div>{why}{notes}</figure>"
