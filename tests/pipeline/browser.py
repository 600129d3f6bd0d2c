"""Headless Chromium for the tests that look at pages; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

_kept: dict[str, Any] = {}  # while `shared`: what closes the browser, and the browser once one was needed


@contextmanager
def shared() -> Iterator[None]:
    """Pages of this block are opened in one browser, which the first of them starts; each has a session of its own."""
    with ExitStack() as stack:
        _kept["stack"] = stack
        try:
            yield
        finally:
            _kept.clear()


@contextmanager
def page(width: int = 1400, height: int = 900, scheme: str = "light", touch: bool = False) -> Iterator[Any]:
    """A page whose console errors, page errors and failed requests are in its list `.faults`. scheme: light or dark."""
    with ExitStack() as stack:
        browser = _kept.get("browser") or _launched(_kept.get("stack", stack))
        if _kept:
            _kept["browser"] = browser
        opened = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=touch, accept_downloads=True
        )
        stack.callback(opened.close)
        opened.faults = []
        opened.on("console", lambda m: opened.faults.append(m.text) if m.type == "error" else None)
        opened.on("pageerror", lambda e: opened.faults.append(str(e)))
        opened.on("requestfailed", lambda r: opened.faults.append(f"{r.url}: {r.failure}"))
        yield opened


def _launched(stack: ExitStack) -> Any:
    """A browser that `stack` closes."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs a browser: Playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("needs a browser: no Chromium on this machine (install it, or set CHROMIUM to its path)")
    playwright = stack.enter_context(sync_api.sync_playwright())
    browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    stack.callback(browser.close)
    return browser


def inaccessible(opened: Any) -> list[str]:
    """What axe-core calls serious or critical on a page: rule, help and the elements. Skips where axe is not there."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    found = axe.Axe().run(opened).response["violations"]
    return [
        f"{v['id']}: {v['help']}: {[n['target'] for n in v['nodes']][:5]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
