"""SIGKILL at any moment: the same command goes on and ends with the same bits; no half Bundle is ever seen."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from foveal.core.bundle import open_bundle

FIT = "import sys, foveal; foveal.fit(sys.argv[1], method=sys.argv[2], backbone=sys.argv[3], out=sys.argv[4])"


def fit(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FIT, *map(str, arguments)], stderr=subprocess.PIPE)


def test_killed_fits_go_on_to_the_same_bits(photos: Path, cache: Path, tiny: str, tmp_path: Path):
    method = "full:epochs=3,batch_size=8"
    whole = tmp_path / "whole"
    start = time.monotonic()
    assert fit(photos, method, tiny, whole).wait() == 0
    length = time.monotonic() - start
    target = tmp_path / "killed"
    for share in (0.6, 0.9):
        process = fit(photos, method, tiny, target)
        time.sleep(share * length)
        process.kill()
        process.wait()
        if target.exists():
            open_bundle(target)
    assert fit(photos, method, tiny, target).wait() == 0
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole", "killed"}


def test_a_killed_comparison_keeps_its_rows(photos: Path, cache: Path, tiny: str, tmp_path: Path):
    code = (
        "import sys, foveal; "
        "foveal.compare(sys.argv[1], methods='linear,gda-clip', seeds=3, out=sys.argv[2], backbone=sys.argv[3])"
    )

    def compare(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, str(photos), str(out), tiny], stderr=subprocess.DEVNULL)

    process = compare(tmp_path / "killed")
    kept = tmp_path / "killed.work" / "rows.jsonl"
    while process.poll() is None and not (kept.exists() and kept.read_text().count("\n") >= 2):
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = [json.loads(line) for line in kept.read_text().rpartition("\n")[0].splitlines()]
    assert 2 <= len(finished) < 12
    assert compare(tmp_path / "killed").wait() == 0
    assert compare(tmp_path / "whole").wait() == 0
    rows, whole = (
        json.loads((tmp_path / name / "comparison.json").read_text())["rows"] for name in ("killed", "whole")
    )
    assert all(row in rows for row in finished)
    measured = ("method", "seed", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
    assert [[row[key] for key in measured] for row in rows] == [[row[key] for key in measured] for row in whole]


def test_interrupted_by_the_keyboard_it_says_how_to_go_on(photos: Path, cache: Path, tiny: str, tmp_path: Path):
    command = [str(Path(sys.executable).parent / "foveal"), "fit", str(photos), "--backbone", tiny]
    process = subprocess.Popen(
        [*command, "--method", "full:epochs=200", "--out", str(tmp_path / "b")], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )  # fmt: skip
    while not (tmp_path / "b.work").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on where it was" in errors
    assert not (tmp_path / "b").exists()


def test_a_full_device_is_one_clear_message(photos: Path, cache: Path, tiny: str, tmp_path: Path):
    """A limit on file size stands for a full device: the kernel refuses the write in the same place."""
    command = [str(Path(sys.executable).parent / "foveal"), "fit", str(photos), "--backbone", tiny]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [*command, "--method", "linear", "--out", str(tmp_path / "b")],
        capture_output=True, text=True, preexec_fn=limited, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()
