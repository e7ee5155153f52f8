"""The site builds without a warning, needs no other host, and leaves no page out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}


class Assets(HTMLParser):
    """What a browser loads by itself when it opens a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADED and given.get(LOADED[tag]):
            self.found.append(str(given[LOADED[tag]]))
        if tag == "link" and given.get("rel") not in ("next", "prev", "canonical"):
            self.found.append(str(given.get("href")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    closed = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, env=closed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_refers_to_no_other_host(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        for asset in Assets(page).found:
            assert not re.match(r"(https?:)?//", asset), f"{page.name} loads {asset}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_every_page_can_be_reached_from_the_first(site: Path):
    start = (site / "index.html").read_text(encoding="utf-8")
    for source in (ROOT / "docs").rglob("*.md"):
        page = source.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert (site / page).exists()
        assert f'href="{page}"' in start, f"{page} is not in the navigation"


def test_the_first_page_is_the_readme(site: Path):
    start = (site / "index.html").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading in re.findall(r"^## (.+)$", readme, re.MULTILINE):
        assert heading in start
    assert 'href="docs/' not in start
