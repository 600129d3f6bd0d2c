"""The commands beside the verbs: looking, settings, the demo. Same rules as `cli.py`: parse and call, nothing heavy at
import, the work itself in the module a command names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import ConfigFiles, Sets, WorkDir, app


@app.command(rich_help_panel="Look")
def status(work: WorkDir = Path("work")) -> int:
    """What is done, empty, failed, running or missing, per stage, and the reason of each failure."""
    from pipeline.status import show

    return show(work)


@app.command(rich_help_panel="Look")
def config(
    config: ConfigFiles = [],  # noqa: B006
    set_: Sets = [],  # noqa: B006
    presets: Annotated[bool, typer.Option("--presets", help="list the presets instead")] = False,
) -> int:
    """Print all settings as commented YAML, ready to edit and pass with --config."""
    from configs import load

    print("\n".join(load.presets()) if presets else load.template(load.resolve(config, set_)))
    return 0
