"""HTML pages out of templates: every value is escaped, a name that a template lacks is an error.

In: a template, a file beside the code that fills it, and its values. Out: text. Knows no page.
"""

from __future__ import annotations

import base64
from pathlib import Path


def page(template: Path, **values: object) -> str:
    """The filled template, which may include others of its folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(template.parent, encoding="utf-8")
    made = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return made.get_template(template.name).render(values)


def own(text: str) -> str:
    """Text of the program itself (styles, scripts) that goes into a page as it is."""
    from markupsafe import Markup

    return Markup(text)


def data_uri(kind: str, data: bytes) -> str:
    """A picture inside the page. kind: its media type, image/jpeg say."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
