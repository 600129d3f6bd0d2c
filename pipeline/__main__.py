"""`python -m mhim.pipeline`: the command line, as the scripts of a cluster call it."""

from __future__ import annotations

import sys
from pathlib import Path

if not sys.flags.safe_path and Path(sys.path[0]).resolve() == Path.cwd():
    del sys.path[0]  # `python -m` puts the working folder there: nothing in it may stand before the program

from mhim.pipeline.cli.main import main

if __name__ == "__main__":
    main()
