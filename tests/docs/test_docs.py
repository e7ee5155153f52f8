"""Every code block of the README and the guides runs; generated pages are as their sources say."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests import warm

from foveal.data.open import open_dataset

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_block_runs(page: Path, cache: Path, tmp_path: Path):
    (tmp_path / "digit.png").write_bytes(open_dataset("sample:digits").read(0))
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        commands = (
            [[sys.executable, "-c", code]]
            if language == "python"
            else [shlex.split(line, comments=True) for line in code.splitlines()]
        )
        for command in filter(None, commands):
            if command[0] in ("foveal", sys.executable):
                status, said = warm.run(command, tmp_path)
            else:
                done = made(command, tmp_path)
                status, said = done.returncode, done.stdout + done.stderr
            assert status == 0, f"{command}\n{said}"


def made(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Another command than foveal's; `make` only says what it would do."""
    if command[0] == "make":
        command, folder = ["make", "--dry-run", *command[1:]], ROOT
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=here, capture_output=True, text=True, check=False)


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
