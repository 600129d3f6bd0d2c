"""The contact sheet of `pipeline check`: one self-contained HTML page, no script, no network.

In: findings with their thumbnails, in order. Out: HTML text. Knows nothing of slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhim.pipeline.store import pages

if TYPE_CHECKING:
    from mhim.pipeline.cohort.finding import Finding

_TEMPLATE = Path(__file__).parent / "assets" / "check.html"


def page(title: str, findings: Sequence[Finding], summary: Sequence[str]) -> str:
    """One HTML document; every text is escaped, pictures are embedded."""
    return pages.page(_TEMPLATE, title=title, findings=[_shown(f) for f in findings], summary=summary)


def _shown(f: Finding) -> dict[str, Any]:
    facts = [f.state]
    if f.width:  # it was opened
        mpp = "mpp unknown" if f.mpp_x is None else f"{f.mpp_x:.4g} µm/px ({f.mpp_source})"
        facts += [f.vendor, f"{f.width} × {f.height} px", mpp]
    if f.tissue_fraction is not None:  # and its tissue looked for
        facts += [f"{f.tissue_fraction:.1%} tissue", f"{f.tiles} tiles"]
    uri = pages.data_uri("image/jpeg", f.thumbnail) if f.thumbnail else ""
    told = {"slide": f.slide, "problems": f.problems, "warnings": f.warnings}
    return {"uri": uri, "facts": " · ".join(facts), **told}
