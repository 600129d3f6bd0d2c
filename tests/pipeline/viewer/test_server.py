"""The viewer's server: what it refuses, tokens, slow and many connections, odd requests."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mhim.pipeline.viewer import listen
from mhim.pipeline.viewer.data import Gallery
from mhim.pipeline.viewer.server import ViewerError, loopback, make_server
from tests.pipeline.viewer.serving import get, serving


@pytest.mark.parametrize(
    "path",
    [
        "/tile/99/3/0_0.jpg",
        "/tile/0/40/0_0.jpg",
        "/tile/0/3/9_9.jpg",
        "/static/../server.py",
        "/static/%2e%2e/data.py",
        "/etc/passwd",
        "/layer/7/0/0.png",
        "/layer/0/99/0.png",
        "/thumb/-1.jpg",
        "/api/slide/2",
        "//etc/passwd",
    ],
)
def test_nothing_else_is_served(port: int, path: str) -> None:
    status, body, headers = get(port, path)
    assert status == 404, body
    assert headers["Content-Type"].startswith("text/plain")


def test_every_answer_carries_the_policy(port: int) -> None:
    for path in ("/", "/api/index", "/static/app.js", "/nothing"):
        headers = get(port, path)[2]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_foreign_host_name_is_refused(port: int) -> None:
    assert get(port, "/api/index", Host="evil.example")[0] == 403
    assert get(port, "/api/index", Host=f"localhost:{port}")[0] == 200


def test_beyond_loopback_a_token_is_demanded(gallery: Gallery) -> None:
    with pytest.raises(ViewerError, match="--token"):
        make_server(gallery, "0.0.0.0")
    with pytest.raises(ViewerError, match="can be guessed"):
        make_server(gallery, "0.0.0.0", token="short")
    with pytest.raises(ViewerError, match="can be guessed"):
        make_server(gallery, token="short")
    with pytest.raises(ViewerError, match="letters, digits"):
        make_server(gallery, token="a-token; with=surprises")
    assert loopback("127.0.0.1")
    assert loopback("::1")
    assert not loopback("192.168.0.7")
    assert not loopback("my-host")
    for port in serving(gallery, host="0.0.0.0", token="a-long-enough-token"):
        assert get(port, "/api/index")[0] == 403
        assert get(port, "/api/index?token=wrong")[0] == 403
        status, _, headers = get(port, "/?token=a-long-enough-token")
        assert status == 303
        assert get(port, "/api/index", Cookie=headers["Set-Cookie"].split(";")[0])[0] == 200


def test_the_token_is_moved_out_of_the_address(gallery: Gallery) -> None:
    token = "a-long-enough-token"
    for port in serving(gallery, token=token):
        for path in ("/", "/api/index", "/static/app.js", "/tile/0/3/0_0.jpg", "/nothing"):
            assert get(port, path)[0] == 403
            assert get(port, path, Cookie=f"viewer_{port}={token}")[0] == 403  # the cookie is not the token
        status, _, headers = get(port, f"/?token={token}&slide=3")
        assert (status, headers["Location"]) == (303, "/?slide=3")
        cookie = headers["Set-Cookie"]
        assert token not in cookie
        assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(cookie.split("; "))
        for path in (f"//evil.example/?token={token}", f"/api/index?token={token}"):
            assert get(port, path)[2]["Location"] == "/"  # to no place that the address names
        assert get(port, f"/?token={token}x")[0] == 403
        assert get(port, "/?token=%FF%00%C3%A9")[0] == 403
        assert get(port, "/api/index", Cookie=f"other=1; {cookie.split(';')[0]}")[0] == 200
        assert get(port, "/api/index", Authorization=f"Bearer {token}")[0] == 200
        assert get(port, "/api/index", Authorization="Bearer wrong")[0] == 403
        assert get(port, f"/?token={token}", Host="evil.example")[0] == 403
    for port in serving(gallery, token=token):  # another viewer on this machine: another cookie
        assert get(port, "/api/index", Cookie=cookie.split(";")[0])[0] == 403


def test_the_program_prints_a_link_that_opens(work: Path) -> None:
    def started(*more: str) -> tuple[subprocess.Popen[str], str]:
        line = [sys.executable, "-m", "mhim.pipeline", "view", str(work), "--port", "0", *more]
        program = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert program.stdout is not None
        told = program.stdout.readline()
        return program, told.split(" at ")[1].split()[0]

    for more in ([], ["--host", "::1"]):
        if more and not has_ipv6():
            continue
        program, link = started(*more)
        try:
            url = urlsplit(link)
            assert re.fullmatch(r"token=[A-Za-z0-9_-]{32}", url.query)
            assert url.hostname == ("::1" if more else "127.0.0.1")
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=30)
            connection.request("GET", "/api/index")
            assert connection.getresponse().status == 403
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            answer = opener.open(link, timeout=30)
            assert "token" not in answer.url
            assert b"<html" in answer.read()
            assert json.load(opener.open(f"http://{url.netloc}/api/index"))["slides"]
        finally:
            program.send_signal(signal.SIGINT)
            program.wait(30)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "99999"], "99999: a port is"),
        (["--port", "-1"], "-1: a port is"),
        (["--host", "no such"], "listen"),
        (["--host", "0.0.0.0", "--no-token"], "--no-token"),
        (["--token", "x" * 20, "--no-token"], "exclude"),
        (["--token", "short"], "can be guessed"),
        (["--host", "256.1.1.1"], "256.1.1.1"),
    ],
)
def test_odd_ports_hosts_and_tokens_are_one_message(
    work: Path, args: list[str], words: str, cli: Callable[..., tuple[int, str]]
) -> None:
    code, text = cli("view", work, *args)
    assert code == 2
    assert words in text
    assert len(text.splitlines()) == 1, text


def test_slow_and_many_connections_do_not_hold_the_viewer(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HEAD_S", 0.5)
    monkeypatch.setattr("mhim.pipeline.viewer.server.HEAD_S", 0.5)
    monkeypatch.setattr(listen.Server.__init__, "__defaults__", (6,))
    before = threading.active_count()
    for port in serving(gallery):
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]
        until = time.monotonic() + 10
        while threading.active_count() < before + 7 and time.monotonic() < until:
            time.sleep(0.01)
        extra = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for s in extra:
            s.settimeout(10)
            assert s.recv(100).startswith(b"HTTP/1.1 503")
        assert threading.active_count() <= before + 7  # six connections and the server
        trickling = silent[0]
        assert closed_within(10, trickling)  # although a byte comes again and again
        assert get(port, "/api/index")[0] == 200
        for s in (*silent, *extra):
            s.close()


def closed_within(seconds: float, trickling: socket.socket) -> bool:
    ended = time.monotonic() + seconds
    try:
        while time.monotonic() < ended:
            trickling.sendall(b"G")
            time.sleep(0.05)
    except OSError:
        return True
    return False


def test_a_client_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "ANSWER_S", 0.3)
    one, two = socket.socketpair()
    with one, two:
        out = listen.Outgoing(one)
        out.write(b"x" * (64 << 20))
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            out.flush()
        assert time.monotonic() - began < 5


def test_a_body_is_not_read_as_the_next_request(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as s:
        s.settimeout(10)
        inner = b"GET /api/index HTTP/1.1\r\nHost: localhost\r\n\r\n"
        s.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(inner) + inner)
        received = b""
        while part := s.recv(1 << 16):
            received += part
    assert received.count(b"HTTP/1.1 200") == 1


def test_a_taken_port_is_told(gallery: Gallery, port: int) -> None:
    with pytest.raises(ViewerError, match="choose another --port"):
        make_server(gallery, port=port)
