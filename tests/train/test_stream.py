"""The task stream: herding, balanced rounds, one update with its stages, and what is measured of it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from foveal.blocks.gated import GatedEncoder
from foveal.core.errors import BundleError, UsageError
from foveal.core.preprocessing import Preprocessing
from foveal.data.dataset import Dataset, Memory
from foveal.data.join import join
from foveal.data.memory import Exemplars, read_exemplars, write_exemplars
from foveal.data.samples import png
from foveal.evaluate.stream import drift, kept_and_learnt, summary
from foveal.methods.continual.dytox import Dytox, Options
from foveal.train.stream import balanced, both, herd, learn, remembered

SIZE = 8
PLAIN = Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)


def colours(name: str = "colours", per_class: int = 8, classes: int = 4, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    labels = np.arange(per_class * classes) % classes
    pixels = rng.integers(0, 80, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        picture[..., label % 3] += 120
        if label == 3:
            picture[:4] //= 2
    ids = [f"{name}-{row}" for row in range(len(labels))]
    names = tuple("abcd"[:classes])
    return Dataset(name, ids, labels, names, "single-label", None, Memory([png(each) for each in pixels]))


def naive_herd(features: np.ndarray, count: int) -> list[int]:
    X = [x / np.linalg.norm(x) for x in features]
    mean = sum(X) / len(X)
    chosen: list[int] = []
    for _ in range(count):
        best, least = -1, np.inf
        for row, x in enumerate(X):
            if row in chosen:
                continue
            away = np.linalg.norm(mean - sum([X[c] for c in chosen], x) / (len(chosen) + 1))
            if away < least - 1e-12:
                best, least = row, away
        chosen.append(best)
    return chosen


def test_herding_in_loops_and_a_shorter_choice_is_its_beginning():
    X = np.random.default_rng(0).normal(size=(30, 5)) + 1
    whole = herd(X, 12)
    assert whole.tolist() == naive_herd(X, 12)
    for count in (1, 5, 11):
        assert herd(X, count).tolist() == whole[:count].tolist()
    assert sorted(herd(X, 100).tolist()) == list(range(30))
    near = np.linalg.norm(X[whole].mean(0) - X.mean(0))
    assert near < np.median([np.linalg.norm(X[np.random.default_rng(s).permutation(30)[:12]].mean(0) - X.mean(0))
                             for s in range(40)])  # fmt: skip


def test_memory_and_balanced_rounds_stay_within_their_budget():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [3, 10, 20])
    rows = remembered(rng.normal(size=(33, 4)), labels, 5)
    assert np.bincount(labels[rows]).tolist() == [3, 5, 5]
    assert len(set(rows.tolist())) == 13
    drawn = balanced(labels, 5, seed=1)
    assert np.bincount(labels[drawn]).tolist() == [3, 5, 5]
    assert np.array_equal(drawn, balanced(labels, 5, seed=1))
    assert not np.array_equal(drawn, balanced(labels, 5, seed=2))
    with pytest.raises(UsageError, match="a memory of 0 images a class"):
        remembered(rng.normal(size=(33, 4)), labels, 0)


@pytest.mark.parametrize("shared", ["learn", "frozen"])
def test_an_update_trains_in_stages_and_moves_old_answers_only_where_it_may(shared: str, tmp_path: Path):
    data = colours()
    method = Dytox(
        Options(shared=shared, width=32, epochs=3, balance=1, batch_size=8, lr=0.01, augment="none")  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    first = method.first(GatedEncoder(SIZE, 4, 32, 1, 1), 2)
    start = Dytox(Options(shared="learn", width=32, epochs=3, batch_size=8, augment="none"))
    old_rows = np.flatnonzero(data.labels < 2)
    old, history = learn(
        start, None, first, data, data.labels, old_rows, PLAIN, 0, work=tmp_path / "first", device="cpu"
    )
    assert {row["stage"] for row in history} == {"learn"}

    def updated(place: str):
        torch.manual_seed(1)
        return learn(
            method, old, method.grow(old, 2), data, data.labels, np.arange(len(data)), PLAIN, 3,
            work=tmp_path / place, per_class=4, device="cpu",
        )  # fmt: skip

    model, history = updated("second")
    assert [row["stage"] for row in history] == ["learn"] * 3 + ["balance"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    before, after = both(old, model, data, old_rows, PLAIN, "cpu")
    told = drift(before, after)
    assert told["equal"] == (shared == "frozen")
    assert (told["moved"] == 0.0) == (shared == "frozen")
    again, _ = updated("third")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    _, seen = both(old, model, data, np.arange(len(data)), PLAIN, "cpu")
    assert float((seen.argmax(1) == torch.from_numpy(data.labels)).double().mean()) > 0.5


def test_drift_by_hand():
    before = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    after = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.0, -1.0], [2.0, 0.0, 3.0]])
    told = drift(before, after)
    assert told == {"moved": 1.0, "moved_mean": 0.25, "equal": False, "altered": 1 / 3, "taken": 1 / 3}
    assert drift(before, before)["equal"]


def test_a_streams_figures_by_hand():
    yes, no, half = np.ones(4), np.zeros(4), np.array([1.0, 0.0, 1.0, 0.0])
    found = summary([[yes], [half, yes], [no, half, yes]])
    assert found["last"] == 0.5
    assert found["average"] == pytest.approx((1 + 0.75 + 0.5) / 3)
    assert found["forgetting"] == pytest.approx((1.0 + 0.5) / 2)
    assert summary([[half]]) == {"last": 0.5, "average": 0.5, "forgetting": 0.0}


def test_kept_and_learnt_by_hand():
    labels = torch.tensor([0, 0, 1, 2])
    after = torch.eye(3)[torch.tensor([0, 2, 1, 2])]
    before = torch.eye(2)[torch.tensor([0, 0, 0])]
    found = kept_and_learnt((before, labels[:3]), after, labels, ("a", "b", "c"), 2)
    assert found["old_before"] == pytest.approx(2 / 3)
    assert found["old_after"] == pytest.approx(2 / 3)
    assert found["new_after"] == 1.0
    assert [row["before"] for row in found["per_class"]] == [1.0, 0.0, None]
    assert [row["after"] for row in found["per_class"]] == [0.5, 1.0, 1.0]
    assert found["forgetting"] == pytest.approx((0.5 - 1.0) / 2)
    alone = kept_and_learnt(None, after[3:], labels[3:], ("a", "b", "c"), 2)
    assert alone["old_after"] is None
    assert alone["forgetting"] is None


def test_a_memory_is_written_and_read_back(tmp_path: Path):
    learnt, held = colours("learn"), colours("held", per_class=2, seed=1)
    write_exemplars(tmp_path / "memory.safetensors", Exemplars(learnt, held), PLAIN)
    back = read_exemplars(tmp_path / "memory.safetensors", learnt.classes)
    assert back.counts() == dict.fromkeys("abcd", 10)
    for ours, theirs in ((back.learn, learnt), (back.held, held)):
        assert np.array_equal(ours.labels, theirs.labels)
        assert list(ours.ids) == list(theirs.ids)
        assert [ours.read(row) for row in range(len(ours))] == [theirs.read(row) for row in range(len(theirs))]
    with pytest.raises(BundleError, match="a label is not one of 3 classes"):
        read_exemplars(tmp_path / "memory.safetensors", ("a", "b", "c"))
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="cannot be read"):
        read_exemplars(tmp_path / "other.safetensors", learnt.classes)


def test_large_images_are_kept_small(tmp_path: Path):
    rng = np.random.default_rng(0)
    large = png(rng.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    data = Dataset("large", ["x"], np.zeros(1, np.int64), ("a",), "single-label", None, Memory([large]))
    write_exemplars(tmp_path / "memory.safetensors", Exemplars(data, data.subset([])), PLAIN)
    back = read_exemplars(tmp_path / "memory.safetensors", ("a",))
    assert back.learn.image(0).size == (8, 12)
    assert len(back.learn.read(0)) < len(large)


def test_joined_data_read_from_where_they_lie():
    first, second = colours("one", classes=2), colours("two", per_class=3)
    whole = join("both", [(first, "train"), (second, "test")], ("d", "b", "c", "a"))
    assert len(whole) == len(first) + len(second)
    assert whole.splits is not None
    assert whole.splits.tolist() == ["train"] * len(first) + ["test"] * len(second)
    for row in range(len(second)):
        assert whole.read(len(first) + row) == second.read(row)
        assert whole.classes[whole.labels[len(first) + row]] == second.classes[second.labels[row]]
    assert len(set(join("twice", [(first, "train"), (first, "test")], ("a", "b")).ids)) == 2 * len(first)
