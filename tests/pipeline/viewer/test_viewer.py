"""The viewer: what it serves, what it refuses, and that the page works in a real browser with the keyboard alone."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

from mhim.extract.slide.slide import open_slide
from mhim.pipeline.store import layout, writing
from mhim.pipeline.viewer import listen
from mhim.pipeline.viewer.data import Gallery
from mhim.pipeline.viewer.server import ViewerError, loopback, make_server
from tests.pipeline import scored
from tests.pipeline.browser import page


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, demo_cohort: Path) -> Path:
    return scored.make(tmp_path_factory.mktemp("viewer"), demo_cohort)


@pytest.fixture(scope="module")
def gallery(work: Path) -> Iterator[Gallery]:
    made = Gallery(layout.Work(work))
    yield made
    made.read.close()


def serving(gallery: Gallery, **options: str) -> Iterator[int]:
    server = make_server(gallery, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def port(gallery: Gallery) -> Iterator[int]:
    yield from serving(gallery)


def get(port: int, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def picture(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def numbers(gallery: Gallery) -> dict[str, int]:
    return {s.id: i for i, s in enumerate(gallery.slides)}


def test_the_list_tells_every_slide_even_the_unreadable(port: int) -> None:
    index = json.loads(get(port, "/api/index")[1])
    by_id = {s["id"]: s for s in index["slides"]}
    assert set(by_id) == {"a.svs", scored.NASTY, "truncated.svs"}
    assert by_id["a.svs"]["predictions"][0]["decision"] == "tumour"
    assert not by_id["a.svs"]["predictions"][0]["wrong"]
    assert by_id[scored.NASTY]["predictions"][1]["wrong"]
    assert not by_id["truncated.svs"]["readable"]


def test_tiles_are_the_slide_s_own_pixels(port: int, gallery: Gallery) -> None:
    """Put together, the tiles of one zoom level are the picture that the slide gives at that resolution."""
    number = numbers(gallery)["a.svs"]
    about = json.loads(get(port, f"/api/slide/{number}")[1])
    top = int(np.ceil(np.log2(max(about["width"], about["height"]))))
    level, down = top - 2, 4
    w, h = -(-about["width"] // down), -(-about["height"] // down)
    whole = np.zeros((h, w, 3), np.uint8)
    for y in range(0, h, 512):
        for x in range(0, w, 512):
            status, data, _ = get(port, f"/tile/{number}/{level}/{x // 512}_{y // 512}.jpg")
            assert status == 200
            part = picture(data)
            whole[y : y + part.shape[0], x : x + part.shape[1]] = part
    assert not gallery._ask(number, "geometry").note  # decoded directly
    with open_slide(gallery.slides[number].path) as slide:
        expected = slide.read_region(0, 0, (w, h), slide.slide_mpp[0] * down)[..., ::-1]
    assert np.abs(whole.astype(int) - expected).mean() < 4  # JPEG


def test_the_hot_tile_is_the_hot_place_of_the_layer(port: int, gallery: Gallery) -> None:
    for slide in ("a.svs", scored.NASTY):
        number = numbers(gallery)[slide]
        about = json.loads(get(port, f"/api/slide/{number}")[1])
        layer = picture(get(port, f"/layer/0/0/{number}.png?scale=raw")[1])
        down = gallery.layer_place(number).px_l0[0]
        x, y = (np.array(about["coords"][scored.HOT]) + np.array(about["tile_l0"]) / 2) / down
        from mhim.mil import heatmap

        assert layer[int(y), int(x)].tolist() == [*heatmap.palette()[255][::-1].tolist(), 255]
        assert about["runs"][0]["layers"][0]["values"][scored.HOT] == 0.9


def test_new_slides_are_shown_with_the_scores_of_their_run(tmp_path: Path, work: Path) -> None:
    """`pipeline score --model RUN slides/` leaves a work folder of its own, without metrics if nothing is labelled."""
    import shutil

    run = tmp_path / "runs" / "old"
    new = run / "new" / "slides"
    shutil.copytree(work, new)
    shutil.copytree(new / "runs" / "one" / "scores", new / "scores")
    (new / "runs" / "one" / "predictions.csv").rename(new / "predictions.csv")
    shutil.rmtree(new / "runs")
    (run / "fold_0").mkdir()
    (run / "fold_0" / "model.json").write_text(
        json.dumps({"task": {"kind": "classification", "classes": ["benign", "tumour"]}})
    )
    writing.seal(run / "fold_0", {"made": "by hand"})
    found = Gallery(layout.Work(new))
    assert [r.name for r in found.runs] == ["old"]
    told = found.index()["slides"][numbers(found)["a.svs"]]["predictions"][0]
    assert (told["of"], told["value"], told["decision"]) == ("tumour", 0.9, "tumour")
    names = [x["name"] for x in found.about(numbers(found)["a.svs"])["runs"][0]["layers"]]
    assert "contribution_tumour" in names
    found.read.close()


def test_scores_are_told_with_four_digits() -> None:
    from mhim.pipeline.viewer.data import _rounded

    values = np.array([0.0, 0.123456, -2.06e-21, 1 / 3, 99999.0, 1234.56, -0.00098765, 1.0, 5e-310, 1e-4])
    assert _rounded(values)[1:8] == [0.1235, -2.06e-21, 0.3333, 100000.0, 1235.0, -0.0009876, 1.0]
    for seed in range(3):
        drawn = np.random.default_rng(seed).normal(size=500) * 10.0 ** np.arange(-10, 10).repeat(25)
        assert _rounded(drawn) == pytest.approx([float(f"{v:.4g}") for v in drawn], rel=1e-12)


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


def test_in_the_browser_with_the_keyboard_alone(port: int, gallery: Gallery, tmp_path: Path) -> None:
    with page() as p:
        p.goto(f"http://127.0.0.1:{port}/")
        first = p.locator(".pane[data-side='0']")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready][data-tissue=ready]")
        assert p.locator("#slides li").count() == 3
        assert scored.NASTY in p.locator("#slides").inner_text()  # escaped, not turned into markup
        assert p.locator("#slides img[src=x]").count() == 0
        before = first.screenshot()
        p.keyboard.press("h")
        p.wait_for_timeout(600)
        assert not p.locator("#heat").is_checked()
        assert first.screenshot() != before
        p.keyboard.press("h")
        for key in ("t", "g", "+", "ArrowRight"):
            p.keyboard.press(key)
        assert p.locator("#tissue").is_checked()
        assert p.locator("#grid").is_checked()
        p.keyboard.press("x")  # go to the highest tile: its number and score are told
        assert f"tile {scored.HOT} at" in first.locator(".readout").inner_text()
        assert "attention: 0.9" in first.locator(".readout").inner_text()
        assert "µm" in first.locator(".scalebar").inner_text()
        p.keyboard.press("0")
        title = p.locator("#title").inner_text()
        p.keyboard.press("n")
        p.wait_for_timeout(1500)
        assert p.locator("#title").inner_text() != title
        p.keyboard.press("s")
        p.wait_for_selector(".pane[data-side='1'][data-heat=ready]")
        p.wait_for_timeout(500)
        assert p.locator("#run1").is_visible()
        p.keyboard.press("/")
        p.keyboard.type("nasty")
        assert p.locator("#slides li").count() == 1
        p.screenshot(path=str(tmp_path / "viewer.png"))
        assert p.faults == []


def test_the_link_opens_in_the_browser_and_leaves_no_token_there(gallery: Gallery) -> None:
    for port in serving(gallery, token="a-long-enough-token"):
        with page() as p:
            p.goto(f"http://127.0.0.1:{port}/?token=a-long-enough-token")
            p.wait_for_selector(".pane[data-side='0'][data-heat=ready][data-tissue=ready]")
            assert p.url == f"http://127.0.0.1:{port}/"
            assert "token" not in p.evaluate("document.cookie + document.referrer + location.href")
            p.reload()
            p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
            assert p.faults == []


def test_two_runs_tell_the_same_tile_and_what_one_of_them_lacks(port: int, gallery: Gallery) -> None:
    with page() as p:
        p.goto(f"http://127.0.0.1:{port}/")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
        p.keyboard.press("s")
        p.wait_for_selector(".pane[data-side='1'][data-heat=ready]")
        p.keyboard.press("x")
        texts = [p.locator(f".pane[data-side='{k}'] .readout").inner_text() for k in (0, 1)]
        assert all(t.startswith(f"tile {scored.HOT} at") for t in texts)
        assert "attention: 0.9" in texts[0]
        assert "attention: 0.9" not in texts[1]  # the other run's own number
        p.select_option("#layer", label="probability tumour")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
        assert p.locator(".pane[data-side='1'] .lack").inner_text() == "two has no probability tumour here"
        assert p.locator(".pane[data-side='0'] .lack").inner_text() == ""
        p.keyboard.press("Escape")
        p.keyboard.press("n")  # what was told of the last slide must not stay
        p.wait_for_selector(".pane[data-side='0'] .readout:empty", state="attached")
        assert p.faults == []


def test_hovering_a_tile_tells_its_score(port: int, gallery: Gallery) -> None:
    with page() as p:
        p.goto(f"http://127.0.0.1:{port}/")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
        p.keyboard.press("x")
        p.wait_for_timeout(1200)
        box = p.locator("#osd0").bounding_box()
        p.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # the view is centred on it
        text = p.locator(".pane[data-side='0'] .readout").inner_text()
        assert text.startswith(f"tile {scored.HOT} at")
        assert "attention: 0.9" in text
        assert "probability tumour: 0.858" in text  # 1 / (1 + exp(-2 x 0.9))
        p.mouse.move(box["x"] + 3, box["y"] + 3)
        assert p.faults == []
