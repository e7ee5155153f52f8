"""docs/add-a-method.md as its reader does it: a package of one's own, installed, named beside the others, tested."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import foveal
from foveal.core import catalogue

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_walk_through(cache: Path, tmp_path: Path):
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    for name, content in FILE.findall(PAGE):
        (package / name).write_text(content, encoding="utf-8")
    here = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(shlex.split(line), cwd=folder, env=here, capture_output=True, text=True, check=False)

    commands = [line for block in COMMANDS.findall(PAGE) for line in block.splitlines()]
    assert len(commands) == 5
    said: dict[str, str] = {}
    for line in commands:
        if line == "pip install -e .":  # beside the environment, not in it
            done = run(f"python -m pip install -q --no-deps --no-build-isolation --target {site} .", package)
        else:
            done = run(line, ROOT if "tests/contract" in line else package)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said[line] = done.stdout
    assert "how sharp the answer is" in said["foveal methods nearest-mean"]
    battery = next(text for line, text in said.items() if "tests/contract" in line)
    assert battery.count(".") >= 5, "four kinds of backbone and the options"
    made = foveal.load(package / "runs" / "nearest")
    assert made.manifest["method"] == {"name": "nearest-mean", "options": {"scale": 0.5}}
    assert made.metrics["balanced_accuracy"]["value"] > 0.6
    refused = run("foveal fit sample:digits --method nearest-mean:scale=0,speed=3", package)
    assert refused.returncode == 2
    assert "speed: unknown" in refused.stderr
    assert "nearest-mean" not in catalogue.names(), "the method got into this very environment"
