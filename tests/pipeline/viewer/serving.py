"""A viewer that serves from a thread of this process, and requests to it."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator

from mhim.pipeline.viewer.data import Gallery
from mhim.pipeline.viewer.server import make_server


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
