"""Whatever is sent, the answer is a 4xx in one form, within the limits, and the server is as it was."""

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.ship.serve.conftest import Server, serving

from foveal.ship.serve.protocol import HEAD_SECONDS

BODY_MB, BODY_SECONDS = 2, 1.5


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Server]:
    options = ("--no-page", "--max-body-mb", BODY_MB, "--max-megapixels", 1, "--max-images", 4)
    with serving(small, *options, "--body-seconds", BODY_SECONDS, "--request-seconds", 20) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server, good: list[Path]) -> list[dict]:
    return ask(server, good)


def ask(server: Server, files: list[Path]) -> list[dict]:
    done = server.post("/predict", files=[("files", (file.name, file.read_bytes())) for file in files])
    assert done.status_code == 200, done.text
    return done.json()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG header that announces 30,000 x 30,000 pixels, and a little data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1_000_000))
        + chunk(b"IEND", b"")
    )


JPEG = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(JPEG, "JPEG")
IMAGE = JPEG.getvalue()
HUGE = b"\0" * int(BODY_MB * 1e6 + 1)


def files(*contents: bytes, field: str = "files") -> dict:
    return {"files": [(field, (f"{i}.jpg", content)) for i, content in enumerate(contents)]}


def body(content: str | bytes, kind: str | None = "application/json") -> dict:
    return {"content": content, "headers": {} if kind is None else {"content-type": kind}}


def images(*encoded: object) -> dict:
    return body(json.dumps({"images": encoded}))


def form(content: bytes, kind: str = "multipart/form-data; boundary=x") -> dict:
    return body(content, kind)


PART = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
REQUESTS: dict[str, tuple[int, dict]] = {
    "no body": (415, {}),
    "no type": (415, body(IMAGE, None)),
    "a bare image": (415, body(IMAGE, "image/jpeg")),
    "text": (415, body("hello", "text/plain")),
    "a form of text": (415, body("files=a", "application/x-www-form-urlencoded")),
    "compressed": (
        415,
        {"content": IMAGE, "headers": {"content-type": "application/json", "content-encoding": "gzip"}},
    ),
    "no image in the form": (422, form(b"--x--\r\n")),
    "another field": (422, files(IMAGE, field="image")),
    "text in the field": (422, {"files": [("files", (None, b"hello"))]}),
    "an extra field": (422, {"data": {"scale": "2"}, **files(IMAGE)}),
    "a form without boundary": (400, form(PART + IMAGE, "multipart/form-data")),
    "another boundary": (400, form(PART + IMAGE + b"\r\n--x--\r\n", "multipart/form-data; boundary=y")),
    "a form cut off": (400, form(PART + IMAGE[:100])),
    "a part without name": (400, form(b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n")),
    "a form of noise": (400, form(bytes(range(256)) * 8)),
    "a part with endless headers": (400, form(b"--x\r\n" + b"a: b\r\n" * 5000 + b"\r\n\r\n--x--\r\n")),
    "an empty file": (422, files(b"")),
    "a text file": (422, files(b"hello")),
    "a truncated JPEG": (422, files(IMAGE[: len(IMAGE) // 2])),
    "a JPEG header alone": (422, files(b"\xff\xd8\xff\xe0" + b"\0" * 50)),
    "an SVG": (422, files(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    "a PDF": (422, files(b"%PDF-1.7\n%%EOF")),
    "a script as EPS": (422, files(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage")),
    "a ZIP": (422, files(b"PK\x03\x04" + b"\0" * 60)),
    "a bomb": (422, files(bomb())),
    "too many pixels": (422, files(png(1001, 1000))),
    "all of several undecodable": (422, files(b"a", b"b", b"c")),
    "too many images": (413, files(*[IMAGE] * 5)),
    "hundreds of images": (413, files(*[b"a"] * 500)),
    "a huge file": (413, files(HUGE)),
    "huge JSON": (413, images(base64.b64encode(HUGE).decode())),
    "empty JSON": (400, body("")),
    "broken JSON": (400, body('{"images": [')),
    "JSON of NaN": (422, body('{"images": [NaN]}')),
    "JSON that is not UTF-8": (400, body(b'{"images": ["\xff\xfe"]}')),
    "deep JSON": (400, body("[" * 100_000)),
    "a JSON list": (422, body("[]")),
    "no images in JSON": (422, images()),
    "another key": (422, body('{"image": "AAAA"}')),
    "an extra key": (422, body('{"images": ["AAAA"], "path": "/etc/passwd"}')),
    "numbers for images": (422, images(1, 2)),
    "null for an image": (422, images(None)),
    "NaN for base64": (422, images("NaN")),
    "spaces in base64": (422, images("AA AA")),
    "letters that are not base64": (422, images("é" * 8)),
    "an address": (422, images("https://example.org/cat.jpg")),
    "a path": (422, images("file:///etc/passwd")),
    "a data URL without base64": (422, images("data:image/png,AAAA")),
    "base64 of nothing": (422, images("")),
    "too many in JSON": (413, images(*[base64.b64encode(IMAGE).decode()] * 5)),
}
TEXTS = ("Traceback", "site-packages", "/tmp", "/home", "foveal/ship", '.py"')


def check(status: int, done: httpx.Response) -> None:
    assert done.status_code == status, done.text
    assert list(done.json()) == ["error"]
    assert 5 < len(done.json()["error"]) < 400
    assert not any(text in done.text for text in TEXTS)


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_predictions(server: Server, expected: list[dict], good: list[Path], name: str):
    status, given = REQUESTS[name]
    check(status, server.post("/predict", **given))
    assert ask(server, good[:1]) == expected[:1]


EXPLANATIONS = {
    "no such method": ("?method=magic", 422, files(IMAGE)),
    "a method of another family": ("?method=linear", 422, files(IMAGE)),
    "no such option": ("?method=sobol-attribution:size=3", 422, files(IMAGE)),
    "an option out of range": ("?method=sobol-attribution:grid=0", 422, files(IMAGE)),
    "an endless computation": ("?method=sobol-attribution:grid=64,points=65536", 422, files(IMAGE)),
    "no such class": ("?target=violet", 422, files(IMAGE)),
    "no such layer": ("?method=eigen-cam:layer=nowhere", 422, files(IMAGE)),
    "two images": ("", 413, files(IMAGE, IMAGE)),
    "no image": ("", 422, files(b"hello")),
}


@pytest.mark.parametrize("name", EXPLANATIONS)
def test_bad_explanations(server: Server, name: str):
    query, status, given = EXPLANATIONS[name]
    check(status, server.post("/explain" + query, **given))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("DELETE", "/predict", 405),
        ("POST", "/model", 405),
        ("GET", "/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/predict/..%2f..%2fetc%2fpasswd", 404),
        ("POST", "/predict/", 404),
        ("GET", "/docs", 404),
    ],
)
def test_bad_addresses(server: Server, method: str, path: str, status: int):
    check(status, httpx.request(method, server.url + path, timeout=30))


def talk(server: Server, *parts: bytes, pause: float = 0.0, end: float = 30.0) -> tuple[bytes, float]:
    """What comes back over a bare connection until the server closes it, and after how many seconds."""
    start = time.monotonic()
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=end) as line:
        try:
            for part in parts:
                line.sendall(part)
                time.sleep(pause)
        except OSError:
            pass
        try:
            while piece := line.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
    return answer, time.monotonic() - start


POST = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_a_client_that_trickles_its_body_is_cut_off(server: Server, expected: list[dict], good: list[Path]):
    head = POST + b"content-length: 1000\r\n\r\n"
    answer, seconds = talk(server, head, *[b"{"] * 40, pause=0.1)
    assert status_of(answer) == 408
    assert BODY_SECONDS <= seconds < BODY_SECONDS + 10
    assert ask(server, good) == expected


def test_a_body_that_never_comes(server: Server):
    answer, _ = talk(server, POST + b"content-length: 10\r\n\r\n")
    assert status_of(answer) == 408


def test_a_head_that_never_ends_is_cut_off(server: Server, expected: list[dict], good: list[Path]):
    answer, seconds = talk(server, b"POST /predict HTTP/1.1\r\nhost: x\r\n", end=HEAD_SECONDS + 10)
    assert status_of(answer) == 408
    assert b"the head took longer" in answer
    assert HEAD_SECONDS <= seconds < HEAD_SECONDS + 10
    assert ask(server, good) == expected


def test_a_body_longer_than_announced_is_not_read(server: Server, expected: list[dict], good: list[Path]):
    talk(server, POST + b"content-length: 2\r\nconnection: close\r\n\r\n{}" + b"x" * 100_000)
    assert ask(server, good) == expected


def test_an_endless_body_without_a_length(server: Server, expected: list[dict], good: list[Path]):
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    answer, seconds = talk(server, POST + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 200)
    assert status_of(answer) == 413
    assert seconds < 20
    assert ask(server, good) == expected


WIRE: dict[str, tuple[int, bytes]] = {
    "zeros": (400, b"\0" * 100),
    "no target": (400, b"GET\r\n\r\n"),
    "a negative length": (400, POST + b"content-length: -5\r\n\r\n"),
    "two lengths": (400, POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n"),
    "a length that is no number": (400, POST + b"content-length: ten\r\n\r\n"),
    "a length beyond 64 bits": (400, POST + b"content-length: 99999999999999999999\r\n\r\n"),
    "a huge length": (413, POST + b"content-length: 9999999999\r\nconnection: close\r\n\r\n"),
    "broken chunks": (400, POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n"),
    "a long header": (431, b"GET /model HTTP/1.1\r\nhost: x\r\na: " + b"b" * 40_000 + b"\r\nconnection: close\r\n\r\n"),
    "a long path": (431, b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
    "endless headers": (431, b"GET /model HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 60_000),
}


@pytest.mark.parametrize("name", WIRE)
def test_what_is_hardly_http(server: Server, expected: list[dict], good: list[Path], name: str):
    status, content = WIRE[name]
    answer, _ = talk(server, content)
    assert status_of(answer) == status
    assert b"Traceback" not in answer
    assert ask(server, good) == expected


def test_a_client_that_hangs_up_half_way(server: Server, expected: list[dict], good: list[Path]):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(POST + b"content-length: 1000\r\n\r\n{")
    assert ask(server, good) == expected
    until = time.monotonic() + 30
    while server.metric("foveal_requests_in_progress") and time.monotonic() < until:
        time.sleep(0.05)
    assert server.metric("foveal_requests_in_progress") == 0


def test_after_all_that_nothing_was_a_fault_of_the_server(server: Server):
    counted = server.get("/metrics").text
    assert 'status="500"' not in counted
    assert server.metric("foveal_queue_depth") == 0
    assert server.process.poll() is None
