"""The viewer's HTTP side: numbers in the address, pictures and JSON out, to whoever knows the token.

It opens no name that comes from the address, and sends a policy that lets the page load nothing from elsewhere. One
thing can be written, the regions that are drawn on a slide (POST), and only by whoever knows the token. On a shared
machine every user reaches the loopback interface, so a token is asked for there too: it comes once, in the first
address or in a header, and is moved into a cookie; the address is then without it and may be shared. A request that
names another host is refused (a page of the web could otherwise reach this server through a name of its own, DNS
rebinding).
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import io
import json
import re
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from mhim.pipeline.viewer import drawn
from mhim.pipeline.viewer.colours import palette_of
from mhim.pipeline.viewer.data import Gallery, Scale, Unknown
from mhim.pipeline.viewer.listen import HEAD_S, Incoming, Outgoing, Server, ViewerError, loopback

# The hash is that of the one style element that OpenSeadragon 6.1.1 adds by itself.
POLICY = (
    "default-src 'none'; script-src 'self'; "
    "style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; "
    "img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NUMBERS = "application/octet-stream"
_KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
SCRIPTS = ("app", "state", "list", "slide", "panes", "legend", "address", "tiles", "regions", "picture", "keys", "map")
STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/map": ("map.html", "text/html; charset=utf-8"),
    **{
        f"/static/{name}": (name, _KINDS[name[name.rindex(".") :]])
        for name in ("app.css", "map.css", "openseadragon.min.js", "icon.svg", *(f"{s}.js" for s in SCRIPTS))
    },
}
PACKED_FROM = 1 << 12  # bytes of JSON and numbers that are compressed on their way
LEAST_TOKEN = 16  # characters


def make_server(gallery: Gallery, host: str = "127.0.0.1", port: int = 0, token: str = "") -> Server:
    """A server ready for `serve_forever`. token: the secret to ask for; none is allowed on loopback only.

    Raises ViewerError without a token beyond loopback, for one that is short or cannot stand in an address, and where
    it cannot listen."""
    if not loopback(host) and not token:
        raise ViewerError(
            f"--host {host} can be reached from other machines and needs a --token: leave --no-token away (or stay on "
            "127.0.0.1 and tunnel: ssh -L 8765:127.0.0.1:8765 this-machine)"
        )
    if token and not re.fullmatch(r"[A-Za-z0-9_-]+", token):
        raise ViewerError("--token: use letters, digits, - and _ only; it travels in an address")
    if token and len(token) < LEAST_TOKEN:
        raise ViewerError(f"--token: {len(token)} characters can be guessed; use {LEAST_TOKEN} or more")
    server = Server(host, port, type("Handler", (_Handler,), {"gallery": gallery, "local": loopback(host)}))
    handler: Any = server.RequestHandlerClass
    handler.token = token
    # Cookies know no port: a name with it keeps two viewers apart. The value is made from the token, and is not it.
    handler.cookie = f"viewer_{server.server_port}"
    handler.pass_ = hmac.new(token.encode(), handler.cookie.encode(), hashlib.sha256).hexdigest()
    return server


class _Handler(BaseHTTPRequestHandler):
    gallery: Gallery
    token: str
    cookie: str
    pass_: str
    local: bool
    protocol_version = "HTTP/1.1"
    server_version = "viewer"
    sys_version = ""

    def setup(self) -> None:
        self.connection = self.request
        self._incoming = Incoming(self.connection)
        self.rfile = io.BufferedReader(self._incoming)
        self.wfile = Outgoing(self.connection)

    def handle_one_request(self) -> None:
        self._incoming.expect(HEAD_S)
        try:
            super().handle_one_request()
        except OSError:  # too slow, or gone: a browser moves on
            self.close_connection = True

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # a body nobody asked for must not be read as the next request
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        given = query.pop("token", None)
        if not self._let_in(given):
            return
        if given is not None:
            self._without_token(query)
            return
        self._told(url.path, lambda: self._answer(url.path, query))

    def do_POST(self) -> None:
        """Keep drawn regions, or write them as GeoJSON for the browser to keep. The connection ends with the answer."""
        self.close_connection = True
        path = urlsplit(self.path).path
        found = re.fullmatch(r"/(api/regions|geojson)/(\d{1,7})", path)
        if not self._let_in(None):
            return
        if why := self._not_our_page() or (found and found[1] == "api/regions" and self._may_not_save()) or "":
            self._fail(HTTPStatus.FORBIDDEN, why)
            return
        if not found:
            self._fail(HTTPStatus.NOT_FOUND, "there is nothing here")
            return
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length) or "Transfer-Encoding" in self.headers:
            self._fail(HTTPStatus.LENGTH_REQUIRED, "say how long the regions are")
            return
        if int(length) > drawn.MAX_BYTES:
            self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {drawn.MAX_BYTES >> 20} MiB of regions are kept")
            return
        self._incoming.expect(HEAD_S)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return  # it was cut short: there is nobody to answer
        try:
            sent = json.loads(body)
        except (ValueError, RecursionError):
            self._fail(HTTPStatus.BAD_REQUEST, "the regions are no JSON")
            return
        number = int(found[2])
        if found[1] == "geojson":
            self._told(path, lambda: (self.gallery.drawing(number, sent).encode(), "application/geo+json", False))
        else:
            self._told(path, lambda: (_json(self.gallery.save_regions(number, sent)), "application/json", False))

    def _let_in(self, given: str | None) -> bool:
        """Whether the request is for this host and knows the token; refuses it otherwise."""
        if self.local and not self._host_is_ours():
            self._fail(HTTPStatus.FORBIDDEN, "this viewer answers to this machine only")
            return False
        if self.token and not self._may(given):
            self._fail(HTTPStatus.FORBIDDEN, "the token is missing or wrong: open the address that the program printed")
            return False
        return True

    def _not_our_page(self) -> str:
        """Why a request with a body is not taken; "" where it is. A page elsewhere can send a form here, with the
        reader's cookies or none; it cannot send JSON, nor hide that it is another origin."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        origin = self.headers.get("Origin")
        same = origin is None or origin.partition("://")[2] == self.headers.get("Host", "")
        if kind != "application/json" or not same or self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            return "regions are taken from the viewer's own page only"
        return ""

    def _may_not_save(self) -> str:
        """Without a token every user of the machine may look, and nobody may write."""
        return "" if self.token else "a viewer with --no-token saves nothing: start it without, or download the regions"

    def _told(self, path: str, answer: Callable[[], tuple[bytes, str, bool]]) -> None:
        """Send (body, content type, may be cached), or why there is none."""
        try:
            body, kind, cache = answer()
        except Unknown as error:
            self._fail(HTTPStatus.NOT_FOUND, str(error))
        except drawn.BadDrawing as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:  # one damaged slide must not stop the viewer; the page shows the message
            print(f"viewer: {path}: {error}", file=sys.stderr)
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        else:
            self._send(HTTPStatus.OK, body, kind, cache)

    def _answer(self, path: str, query: dict[str, str]) -> tuple[bytes, str, bool]:
        """(body, content type, may be cached) of a path. Raises Unknown."""
        if path in STATIC:
            name, kind = STATIC[path]
            return files("mhim.pipeline.viewer").joinpath("static", name).read_bytes(), kind, False
        if path == "/api/index":
            return _json({**self.gallery.index(), "writable": bool(self.token)}), "application/json", False
        if found := re.fullmatch(r"/api/(slide|regions)/(\d{1,7})", path):
            ask = self.gallery.about if found[1] == "slide" else self.gallery.regions
            return _json(ask(int(found[2]))), "application/json", False
        if found := re.fullmatch(r"/tile/(\d{1,7})/(\d{1,2})/(\d{1,6})_(\d{1,6})\.jpg", path):
            number, level, column, row = (int(v) for v in found.groups())
            return self.gallery.tile(number, level, column, row), "image/jpeg", True
        if found := re.fullmatch(r"/thumb/(\d{1,7})\.jpg", path):
            return self.gallery.thumbnail(int(found[1])), "image/jpeg", True
        if found := re.fullmatch(r"/crop/(\d{1,7})/(\d{1,7})\.jpg", path):
            return self.gallery.crop(int(found[1]), int(found[2])), "image/jpeg", True
        if found := re.fullmatch(r"/tissue/(\d{1,7})\.png", path):
            return self.gallery.tissue_png(int(found[1])), "image/png", True
        if found := re.fullmatch(r"/places/(\d{1,7})\.bin", path):
            return self.gallery.places(int(found[1])), _NUMBERS, True
        if found := re.fullmatch(r"/api/map/(\d{1,4})", path):
            return _json(self.gallery.map(int(found[1]))), "application/json", False
        if found := re.fullmatch(r"/points/(\d{1,4})\.bin", path):
            return self.gallery.points(int(found[1])), _NUMBERS, False
        if found := re.fullmatch(r"/(clusters|truth)/(\d{1,4})/(\d{1,7})", path):
            of_run = self.gallery.clusters if found[1] == "clusters" else self.gallery.truth
            return _json(of_run(int(found[2]), int(found[3]))), "application/json", False
        if found := re.fullmatch(r"/(layer|values|scale)/(\d{1,4})/(\d{1,4})/(\d{1,7})(\.png|\.bin|)", path):
            run, layer, number = (int(v) for v in found.groups()[1:4])
            return self._layer(found[1] + found[5], run, layer, number, query)
        raise Unknown("there is nothing here")

    def _layer(self, what: str, run: int, layer: int, number: int, query: dict[str, str]) -> tuple[bytes, str, bool]:
        """A layer's picture, its numbers, or what stands at its colour bar. Raises Unknown."""
        how: Scale = "raw" if query.get("scale") == "raw" else "percentile"
        if what == "layer.png":
            palette = palette_of(query.get("palette", ""))
            return self.gallery.layer_png(run, layer, number, how, palette), "image/png", False
        if what == "values.bin":
            return self.gallery.values(run, layer, number), _NUMBERS, False
        if what == "scale":
            return _json(self.gallery.scale(run, layer, number, how)), "application/json", False
        raise Unknown("there is nothing here")

    def _host_is_ours(self) -> bool:
        host = self.headers.get("Host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        return loopback(name.strip("[]"))

    def _may(self, given: str | None) -> bool:
        """Whether the address (`given`), a header or the cookie holds the secret, compared in constant time."""
        if given is not None:
            return _same(given, self.token)
        kind, _, header = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return _same(header.strip(), self.token)
        cookies = dict(part.strip().partition("=")[::2] for part in self.headers.get("Cookie", "").split(";"))
        return _same(cookies.get(self.cookie, ""), self.pass_)

    def _without_token(self, query: dict[str, str]) -> None:
        """Answer an address that holds the token: the pass goes into a cookie, the browser to the page without it."""
        where = "/" + (f"?{urlencode(query)}" if query else "")  # never to a place that the address names
        more = {"Location": where}
        if self.token:
            # Lax: a link in another page opens the viewer, but no other page can ask it for anything
            more["Set-Cookie"] = f"{self.cookie}={self.pass_}; HttpOnly; SameSite=Lax; Path=/"
        self._send(HTTPStatus.SEE_OTHER, b"", "text/plain; charset=utf-8", False, more)

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self._send(status, message.encode(errors="replace"), "text/plain; charset=utf-8", False)

    def _send(
        self, status: HTTPStatus, body: bytes, kind: str, cache: bool, more: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        more = dict(more or {})
        if kind in (_NUMBERS, "application/json") and len(body) >= PACKED_FROM and self._takes_gzip():
            body = gzip.compress(body, 1, mtime=0)
            more["Content-Encoding"] = "gzip"
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "private, max-age=3600" if cache else "no-store",
            "Vary": "Accept-Encoding",
        }
        for name, value in {**headers, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _takes_gzip(self) -> bool:
        taken = [part.strip().lower() for part in self.headers.get("Accept-Encoding", "").split(",")]
        return "gzip" in taken

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing per request: a deep zoom asks for hundreds."""


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
