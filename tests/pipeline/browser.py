"""Headless Chromium for the tests that look at pages; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def page(width: int = 1400, height: int = 900) -> Iterator[Any]:
    """A page whose console errors, page errors and failed requests are in its list `.faults`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs a browser: Playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs a browser: no Chromium on this machine (install it, or set CHROMIUM to its path)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.faults = []
        opened.on("console", lambda m: opened.faults.append(m.text) if m.type == "error" else None)
        opened.on("pageerror", lambda e: opened.faults.append(str(e)))
        opened.on("requestfailed", lambda r: opened.faults.append(f"{r.url}: {r.failure}"))
        try:
            yield opened
        finally:
            browser.close()
