"""Where the numbers of the published program lie, when they are beside the project."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
GOLDEN = SHARED / "golden"

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the recorded numbers are not beside the project")
