"""The page, in headless Chromium."""

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from tests.ship.serve.conftest import Server, serving

from foveal.data.worlds import garbage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
SECONDS = 60_000


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Server]:
    with serving(small) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def opened(browser: Browser, url: str, asked: list[str], **given: object) -> Page:
    page = browser.new_page(**given)  # type: ignore[arg-type]
    page.set_default_timeout(SECONDS)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_selector("input[type=file]", state="attached")
    return page


def test_an_image_is_answered_and_explained_and_nothing_is_fetched_from_elsewhere(
    server: Server, browser: Browser, good: list[Path], tmp_path: Path
):
    asked: list[str] = []
    page = opened(browser, server.url, asked)
    assert "colours" in page.inner_text(".foveal-head h1")
    page.set_input_files("input[type=file]", good[2])
    page.wait_for_selector(".foveal-bars")
    expected = server.post("/predict", files=[("files", ("a.jpg", good[2].read_bytes()))]).json()[0]
    assert page.inner_text(".foveal-answer strong") == "red"
    assert f"{100 * expected['probability']:.1f}%" in page.inner_text(".foveal-answer")
    assert page.locator(".foveal-bars em").count() == 3
    map = page.wait_for_selector(".foveal-map img")
    assert map is not None
    assert map.evaluate("image => image.complete && image.naturalWidth > 0")
    foreign = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
    assert foreign == []
    page.close()


def test_what_resembles_nothing_is_unknown(server: Server, browser: Browser, tmp_path: Path):
    said: list[str] = []
    page = opened(browser, server.url, [])
    for place, image in enumerate(garbage(3, 160, 3)):
        file = tmp_path / f"{place}.png"
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file)
        row = server.post("/predict", files=[("files", (file.name, file.read_bytes()))]).json()[0]
        page.reload()
        page.wait_for_selector("input[type=file]", state="attached")
        page.set_input_files("input[type=file]", file)
        page.wait_for_selector(".foveal-bars")
        answer = page.inner_text(".foveal-answer strong")
        assert (answer == "unknown") == row["unknown"]
        said.append(answer)
    page.close()
    assert "unknown" in said


def test_what_is_no_image_is_said_and_the_page_goes_on(
    server: Server, browser: Browser, good: list[Path], tmp_path: Path
):
    content = good[0].read_bytes()
    page = opened(browser, server.url, [])
    for length, said in ((len(content) // 2, "truncated or damaged image"), (20, "no image, or a damaged one")):
        (tmp_path / "cut.jpg").write_bytes(content[:length])
        page.set_input_files("input[type=file]", tmp_path / "cut.jpg")
        page.wait_for_selector(".foveal-answer strong")
        assert page.inner_text(".foveal-answer strong") == "no answer"
        assert said in page.inner_text(".foveal-answer span")
        assert page.locator(".foveal-map img").count() == 0
        page.reload()
        page.wait_for_selector("input[type=file]", state="attached")
    page.set_input_files("input[type=file]", good[0])
    page.wait_for_selector(".foveal-bars")
    assert page.inner_text(".foveal-answer strong") == "blue"
    page.close()


def test_a_token_is_asked_for_and_an_open_page_of_several_processes_does_not_keep_them_from_stopping(
    small: Path, browser: Browser, good: list[Path]
):
    with serving(small, "--token", "secret", "--workers", 2, "--threads", 1) as server:
        refused = server.get("/")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        context = browser.new_context(http_credentials={"username": "me", "password": "secret"})
        end = 60
        while server.get("/", auth=("me", "secret")).status_code != 200 and end:
            end -= 1
        page = opened(context, server.url, [])  # type: ignore[arg-type]
        page.set_input_files("input[type=file]", good[1])
        page.wait_for_selector(".foveal-bars")
        assert page.inner_text(".foveal-answer strong") == "green"
        with event_stream(server.port):
            assert server.stop() == 0
        context.close()


def event_stream(port: int) -> socket.socket:
    """A page's event stream whose reader never hangs up; a process whose page is being built yet is asked again."""
    asked = "GET /gradio_api/heartbeat/other HTTP/1.1", "Host: foveal", "Authorization: Basic bWU6c2VjcmV0"
    for _ in range(200):
        stream = socket.create_connection(("127.0.0.1", port))
        stream.sendall("\r\n".join([*asked, "", ""]).encode())
        if stream.recv(64).startswith(b"HTTP/1.1 200"):
            return stream
        stream.close()
        time.sleep(0.2)
    raise AssertionError("no event stream")
