"""The viewer's HTTP side: numbers in the address, pictures and JSON out, to this machine only.

It listens on the loopback interface, answers GET only, opens no name that comes from the address, and sends a policy
that lets the page load nothing from elsewhere. A request that names another host is refused (a page of the web could
otherwise reach this server through a name of its own). Listening elsewhere needs a token in every first address.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipeline import store
from pipeline.viewer.data import Gallery, Unknown

# The hash is that of the one style element that OpenSeadragon 6.1.1 adds by itself.
POLICY = (
    "default-src 'none'; script-src 'self'; "
    "style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; "
    "img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/static/app.css": ("app.css", "text/css; charset=utf-8"),
    "/static/openseadragon.min.js": ("openseadragon.min.js", "text/javascript; charset=utf-8"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}
COOKIE = "viewer_token"


class ViewerError(store.StoreError):
    """The viewer cannot be started as asked; the message says why."""


def loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_server(gallery: Gallery, host: str = "127.0.0.1", port: int = 0, token: str = "") -> ThreadingHTTPServer:
    """A server ready for `serve_forever`. Raises ViewerError without a token beyond loopback, or for a taken port."""
    if not loopback(host) and len(token) < 16:
        raise ViewerError(
            f"--host {host} can be reached from other machines: give --token with 16 or more characters that they must "
            "know (or stay on 127.0.0.1 and tunnel: ssh -L 8765:127.0.0.1:8765 this-machine)"
        )
    if token and not re.fullmatch(r"[A-Za-z0-9_-]+", token):
        raise ViewerError("--token: use letters, digits, - and _ only; it travels in an address")
    handler = type("Handler", (_Handler,), {"gallery": gallery, "token": token, "local": loopback(host)})
    try:
        server = ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise ViewerError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    gallery: Gallery
    token: str
    local: bool
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 20  # head and body leave together: sent apart, the second waits for the first to be acknowledged
    server_version = "viewer"
    sys_version = ""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {k: v[-1] for k, v in parse_qs(url.query).items()}
        if self.local and not self._host_is_ours():
            self._fail(HTTPStatus.FORBIDDEN, "this viewer answers to this machine only")
            return
        if self.token and not self._may(query):
            self._fail(HTTPStatus.FORBIDDEN, "the token is missing or wrong: open the address that the program printed")
            return
        try:
            body, kind, cache = self._answer(url.path, query)
        except Unknown as error:
            self._fail(HTTPStatus.NOT_FOUND, str(error))
        except Exception as error:  # one damaged slide must not stop the viewer; the page shows the message
            print(f"viewer: {url.path}: {error}", file=sys.stderr)
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        else:
            self._send(HTTPStatus.OK, body, kind, cache)

    def _answer(self, path: str, query: dict[str, str]) -> tuple[bytes, str, bool]:
        """(body, content type, may be cached) of a path. Raises Unknown."""
        if path in STATIC:
            name, kind = STATIC[path]
            return files("pipeline.viewer").joinpath("static", name).read_bytes(), kind, False
        if path == "/api/index":
            return _json(self.gallery.index()), "application/json", False
        if found := re.fullmatch(r"/api/slide/(\d{1,7})", path):
            return _json(self.gallery.about(int(found[1]))), "application/json", False
        if found := re.fullmatch(r"/tile/(\d{1,7})/(\d{1,2})/(\d{1,6})_(\d{1,6})\.jpg", path):
            number, level, column, row = (int(v) for v in found.groups())
            return self.gallery.tile(number, level, column, row), "image/jpeg", True
        if found := re.fullmatch(r"/thumb/(\d{1,7})\.jpg", path):
            return self.gallery.thumbnail(int(found[1])), "image/jpeg", True
        if found := re.fullmatch(r"/tissue/(\d{1,7})\.png", path):
            return self.gallery.tissue_png(int(found[1])), "image/png", True
        if found := re.fullmatch(r"/layer/(\d{1,4})/(\d{1,4})/(\d{1,7})\.png", path):
            run, layer, number = (int(v) for v in found.groups())
            how = "raw" if query.get("scale") == "raw" else "percentile"
            return self.gallery.layer_png(run, layer, number, how), "image/png", False
        raise Unknown("there is nothing here")

    def _host_is_ours(self) -> bool:
        host = self.headers.get("Host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return loopback(name.strip("[]"))

    def _may(self, query: dict[str, str]) -> bool:
        cookies = dict(part.strip().partition("=")[::2] for part in self.headers.get("Cookie", "").split(";"))
        given = query.get("token") or cookies.get(COOKIE, "")
        return hmac.compare_digest(given.encode(), self.token.encode())

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self._send(status, message.encode(), "text/plain; charset=utf-8", False)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, cache: bool) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.send_header("Cache-Control", "private, max-age=3600" if cache else "no-store")
            if self.token and status == HTTPStatus.OK:
                self.send_header("Set-Cookie", f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/")
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the browser no longer wants it: it has moved on

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing per request: a deep zoom asks for hundreds."""


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
