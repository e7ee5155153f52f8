"""--offline opens no connection, and nothing ever reports home."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WATCH = """
import json, socket, sys
seen = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and arguments[0].family != socket.AF_UNIX:
        seen.append([event, str(arguments[1:])])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "http.client.connect"):
        seen.append([event, str(arguments[:2])])
sys.addaudithook(watch)
"""
VERBS = """
import foveal
from pathlib import Path
from foveal.core.errors import FovealError
photos, out, weights = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
foveal.samples(); foveal.methods(); foveal.backbones("resnet*")
foveal.check(photos, offline=True)
foveal.fit(photos, method="linear", out=out / "b", offline=True)
foveal.fit(photos, method="full:epochs=1", backbone=weights, out=out / "t", offline=True)
foveal.predict(out / "b", [Path(photos)])
foveal.evaluate(out / "b", photos, offline=True)
foveal.export(out / "b")
foveal.compare(photos, methods="linear", backbone=weights, out=out / "c", offline=True)
foveal.curate(photos, out=out / "s.parquet", offline=True)
foveal.index(photos, out=out / "l", backbone=weights, offline=True)
foveal.search(out / "l", image=next(Path(photos).rglob("*.jpg")), offline=True)
for refused in (
    lambda: foveal.fit(photos, backbone="resnet18", out=out / "x", offline=True),
    lambda: foveal.fit("hub:owner/name", out=out / "x", offline=True),
):
    try:
        refused()
    except FovealError as error:
        assert "offline" in str(error), error
    else:
        raise AssertionError("not refused")
print(json.dumps(seen))
"""


def test_the_watch_sees_connections():
    ask = "import urllib.request as u\ntry: u.urlopen('http://127.0.0.1:9')\nexcept OSError: print(json.dumps(seen))"
    done = subprocess.run([sys.executable, "-c", WATCH + ask], capture_output=True, text=True, check=True)
    assert {"urllib.Request", "socket.getaddrinfo", "socket.connect"} <= {event for event, _ in json.loads(done.stdout)}


def test_offline_opens_no_connection(photos: Path, cache: Path, tiny: str, tmp_path: Path):
    here = {key: value for key, value in os.environ.items() if not re.search("TELEMETRY|ANALYTICS|OFFLINE", key)}
    done = subprocess.run(
        [sys.executable, "-c", WATCH + VERBS, str(photos), str(tmp_path), tiny],
        capture_output=True, text=True, check=False, env={**here, "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize(
    ("library", "switch"),
    [("gradio", "GRADIO_ANALYTICS_ENABLED|analytics_enabled"), ("ray", "RAY_USAGE_STATS_ENABLED")],
)
def test_libraries_that_report_home_are_told_not_to(library: str, switch: str):
    """Wherever foveal imports one of them, the file, or one beside it, turns its reports off."""
    users = [
        file
        for file in (ROOT / "src").rglob("*.py")
        if re.search(rf"^\s*(import {library}\b|from {library}\b)", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    for file in users:
        beside = "".join(each.read_text(encoding="utf-8") for each in file.parent.glob("*.py"))
        assert re.search(switch, beside), f"{file} imports {library} and leaves its reports on"
