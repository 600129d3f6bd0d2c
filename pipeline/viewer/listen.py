"""The viewer's sockets: where it listens, for how long it hears one request, and how many connections it keeps.

In: host, port and a request handler. Out: a server whose every connection ends. Knows no request and no token.
A connection has `HEAD_S` seconds for each request's head, however it trickles, and `ANSWER_S` to take the answer; more
than `MOST` connections are told to come back. So nobody who can reach the port can hold it for good.
"""

from __future__ import annotations

import io
import ipaddress
import socket
import socketserver
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mhim.pipeline.store import layout

HEAD_S = 15.0  # for a request's head, and for an idle connection
ANSWER_S = 60.0  # for the client to take an answer
MOST = 64  # connections at once; a browser opens six
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"


class ViewerError(layout.StoreError):
    """The viewer cannot be started as asked; the message says why."""


def loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address(host: str, port: int) -> str:
    """`host:port` as it stands in a link; a host that means all interfaces is told by the machine's name."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.gethostname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server(ThreadingHTTPServer):
    """One thread per connection, at most `MOST`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler], most: int = MOST) -> None:
        """Raises ViewerError where it cannot listen."""
        if not 0 <= port <= 65535:
            raise ViewerError(f"--port {port}: a port is a number from 1 to 65535, or 0 for a free one")
        self._free = threading.BoundedSemaphore(most)
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, where = found[0]
            super().__init__(where, handler)  # type: ignore[arg-type]  # IPv6 has four parts
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ViewerError(f"cannot listen on {host}:{port}: {why}; choose another --port or --host") from error

    def server_bind(self) -> None:
        """As in `socketserver`: the HTTP server's own asks the network for its name, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            request.setblocking(False)
            with suppress(OSError):  # it may be gone: closed in any case
                request.send(BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is no news: the next request makes another."""


class Incoming(io.RawIOBase):
    """What a socket receives until the deadline; then TimeoutError, however often a byte came meanwhile."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.expect(HEAD_S)

    def expect(self, seconds: float) -> None:
        """The next request may take so long to arrive."""
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long to arrive")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class Outgoing(io.BufferedIOBase):
    """Head and body of an answer, sent together and within `ANSWER_S` altogether."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._waiting: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._waiting.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        data, self._waiting = b"".join(self._waiting), []
        if data:
            self._connection.settimeout(ANSWER_S)
            self._connection.sendall(data)
