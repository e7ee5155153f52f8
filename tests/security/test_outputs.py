"""Where results go: nothing of anybody else's is overwritten, two runs do not tread on each other, names stay names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import foveal
from foveal.cli.main import printable
from foveal.core.bundle import atomic_folder
from foveal.core.errors import FovealError, UsageError
from foveal.core.folders import claim
from foveal.data.dataset import unique
from foveal.data.open import open_dataset


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder


def test_a_comparison_does_not_replace_a_folder_of_something_else(photos: Path, cache: Path, mine: Path):
    with pytest.raises(UsageError, match=r"holds thesis\.txt and is not overwritten"):
        foveal.compare(str(photos), methods="linear", out=mine)
    with pytest.raises(UsageError, match="is a file and is not overwritten"):
        foveal.compare(str(photos), methods="linear", out=mine / "thesis.txt")
    with pytest.raises(UsageError, match="not overwritten"):
        foveal.fit(str(photos), method="linear", out=mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert sorted(entry.name for entry in mine.parent.iterdir()) == ["mine"]


@pytest.mark.parametrize("verb", ["fit", "compare"])
def test_a_work_folder_of_something_else_is_left_alone(verb: str, photos: Path, cache: Path, mine: Path):
    work = mine.rename(mine.with_name("out.work"))
    with pytest.raises(UsageError, match=r"out\.work holds something"):
        getattr(foveal, verb)(str(photos), out=work.with_name("out"), **{METHOD[verb]: "linear"})
    assert (work / "thesis.txt").read_text() == "years of work"


METHOD = {"fit": "method", "compare": "methods"}


def test_a_comparison_replaces_an_older_one(photos: Path, cache: Path, tmp_path: Path):
    for methods in ("linear", "gda-clip"):
        foveal.compare(str(photos), methods=methods, out=tmp_path / "c")
        assert methods in (tmp_path / "c" / "comparison.csv").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_two_runs_into_one_folder_are_told_apart(tmp_path: Path):
    held = claim(tmp_path / "b.work")
    code = "import sys; from pathlib import Path; from foveal.core.folders import claim; claim(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "b.work")]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"another foveal is at work on {tmp_path / 'b'}:" in second.stderr
    held.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_places_that_cannot_be_written(tmp_path: Path, photos: Path, cache: Path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "b", Path("/proc/nowhere/b"), tmp_path / ("x" * 300)):
        with pytest.raises(FovealError, match=r"cannot write|is not overwritten|too long"):
            foveal.fit(str(photos), method="linear", out=out)


def test_a_link_as_output_is_written_through(tmp_path: Path):
    (tmp_path / "disk" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "b")
    with atomic_folder(tmp_path / "link") as staging:
        (staging / "x").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "b" / "x").read_text() == "x"
    assert os.listdir(tmp_path / "disk") == ["b"]


def test_names_do_not_steer_the_terminal():
    assert printable("a\x1b[2Jb\x07\u202ec\nd é 猫") == "a\\x1b[2Jb\\x07\\u202ec\nd é 猫"


def test_too_few_images_are_said_before_any_is_read(
    tmp_path: Path, photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    from foveal.verbs import _prepare

    monkeypatch.setattr(_prepare, "extract", lambda *_, **__: pytest.fail("read"))
    for name, count in {"red": 3, "blue": 1}.items():
        (tmp_path / "d" / name).mkdir(parents=True)
        for file in sorted((photos / name).iterdir())[:count]:
            (tmp_path / "d" / name / file.name).write_bytes(file.read_bytes())
    for verb in ("fit", "compare"):
        with pytest.raises(FovealError, match="class blue has 1 image"):
            getattr(foveal, verb)(str(tmp_path / "d"), out=tmp_path / "b", **{METHOD[verb]: "linear"})


def test_a_name_that_comes_a_hundred_thousand_times():
    names = unique(["a", "a#2"] + ["a"] * 100_000)
    assert names[:4] == ["a", "a#2", "a#3", "a#4"]
    assert len(set(names)) == len(names)


def test_no_data_at_all():
    for text in ("", "  "):
        with pytest.raises(FovealError, match="DATA is empty"):
            open_dataset(text)
