"""A viewer that serves from a thread of this process, requests to it, and its page as a person opens it."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from typing import Any

from mhim.pipeline.viewer.data import Gallery
from mhim.pipeline.viewer.server import make_server

TOKEN = "a-long-enough-token"
SIZES = [(1400, 900), (1280, 800), (390, 844)]
READY = ".pane[data-side='0'][data-heat=ready][data-tissue=ready]"


def serving(gallery: Gallery, **options: str) -> Iterator[int]:
    server = make_server(gallery, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def get(port: int, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def opened(p: Any, port: int, address: str = "") -> None:
    p.goto(f"http://127.0.0.1:{port}/?token={TOKEN}{address}")
    p.wait_for_selector(READY)
    p.wait_for_function("() => location.hash.includes('um=')")


def shown(p: Any) -> dict[str, str]:
    """What the address tells."""
    p.wait_for_timeout(800)
    return dict(p.evaluate("[...new URLSearchParams(location.hash.slice(1))]"))
