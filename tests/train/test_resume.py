"""A training process killed by SIGKILL at any moment goes on and ends with the bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from tests.train.helpers import run, same_bits, state
from tests.train.victim import RECIPE

from foveal.train import checkpoint

VICTIM = Path(__file__).with_name("victim.py")
STEPS = 3 * RECIPE.epochs


def start(work: Path, result: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(VICTIM), str(work), str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    work, result = tmp_path / "work", tmp_path / "result.safetensors"
    reached, kills = 0, 0
    while not result.exists():
        process = start(work, result)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first <= reached + 1
        assert first > 1 or reached < 10  # it went on from a checkpoint
        if kills < 3:
            for _ in range(rng.randint(12, STEPS // 4)):
                reached = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
            kills += 1
        rest, _ = process.communicate()
        reached = max([reached, *map(int, rest.split())])  # steps told of and not read before the kill
    assert kills == 3
    assert same_bits(load_file(result), state(run(tmp_path / "whole", RECIPE, seed=3)))
    assert [file.name for file in work.iterdir()] == [checkpoint.NAME]


def test_killed_before_a_written_checkpoint_took_its_place(tmp_path: Path) -> None:
    """The new file never half takes the old one's place, and the next run cleans it up."""
    work, result = tmp_path / "work", tmp_path / "result.safetensors"
    code = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(VICTIM.parents[2])!r})
real, count = pathlib.Path.replace, [0]
def deadly(*args):
    count[0] += 1
    if count[0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
pathlib.Path.replace = deadly
from tests.train.victim import main
main(pathlib.Path({str(work)!r}), pathlib.Path({str(result)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(work.iterdir())) == 2
    start(work, result).communicate()
    assert [file.name for file in work.iterdir()] == [checkpoint.NAME]
    assert same_bits(load_file(result), state(run(tmp_path / "whole", RECIPE, seed=3)))
