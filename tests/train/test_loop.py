import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests.train.helpers import ROWS, ROWS_VAL, SMALL, Body, Plain, run, same_bits, state, tiny_dataset

from foveal.core.errors import FovealError, UsageError
from foveal.core.method import Classifier, Recipe, Trained, classification_loss
from foveal.core.seeds import derive, seed_everything
from foveal.train import checkpoint, classify, loop
from foveal.train.classify import predict_logits, train_classifier
from foveal.train.events import TrainResult
from foveal.train.feed import Feed

RECIPE = Recipe(epochs=3, batch_size=8, lr=0.01, augment="light")


def test_it_learns_and_tells_each_epoch(tmp_path: Path) -> None:
    events: list[dict] = []
    result = run(tmp_path, Recipe(epochs=8, batch_size=8, lr=0.02), on_event=events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 25))
    assert steps[0]["steps"] == 24
    assert [event["epoch"] for event in result.history] == list(range(1, 9))
    assert result.history[-1]["val_balanced_accuracy"] == 1.0
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"]
    assert result.epochs_done == 8
    assert not result.stopped_by_budget
    assert not result.model.training
    json.dumps(events)


def test_same_seed_same_bits_and_another_seed_other_bits(tmp_path: Path) -> None:
    one, two, other = (state(run(tmp_path / str(n), RECIPE, seed=s)) for n, s in enumerate((1, 1, 2)))
    assert same_bits(one, two)
    assert not same_bits(one, other)


def test_the_caller_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Plain(RECIPE).attach(Body(), 2)
    before = torch.get_rng_state()
    data = tiny_dataset()
    train_classifier(
        Plain(RECIPE), model, data, SMALL, data.labels, ROWS, ROWS_VAL, torch.ones(2), 0,
        recipe=RECIPE, work=tmp_path, device="cpu",
    )  # fmt: skip
    assert torch.equal(before, torch.get_rng_state())


def test_multi_label(tmp_path: Path) -> None:
    data = tiny_dataset(multi=True)
    result = run(tmp_path, Recipe(epochs=10, batch_size=8, lr=0.02, augment="none"), dataset=data)
    logits, features = predict_logits(result.model, data, ROWS_VAL, SMALL, device="cpu")
    assert logits.shape == (12, 3)
    assert features.shape == (12, 8)
    assert ((logits[:, :2] > 0).numpy() == data.labels[ROWS_VAL, :2]).mean() > 0.9
    assert 0.5 < result.history[-1]["val_balanced_accuracy"] <= 1


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path, RECIPE)
    events: list[dict] = []
    again = run(tmp_path, RECIPE, on_event=events.append)
    assert events == []
    assert again.history == first.history
    assert same_bits(state(first), state(again))


def test_one_checkpoint_of_tensors_and_json(tmp_path: Path) -> None:
    run(tmp_path, RECIPE)
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.NAME]
    with safe_open(tmp_path / checkpoint.NAME, "pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 9
        assert "optimizer.0.exp_avg" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_budget_ends_early_and_more_of_it_goes_on_to_the_same_bits(tmp_path: Path, optimizer) -> None:
    recipe = Recipe(epochs=3, batch_size=8, lr=0.01, optimizer=optimizer)
    whole = run(tmp_path / "whole", recipe)
    events: list[dict] = []
    cut = run(tmp_path / "cut", recipe, budget_s=1e-6, on_event=events.append)
    assert cut.stopped_by_budget
    assert sum(event["event"] == "step" for event in events) == 1
    assert cut.epochs_done == pytest.approx(1 / 3)
    assert cut.history[-1]["epoch"] == pytest.approx(1 / 3)
    rest = run(tmp_path / "cut", recipe)
    assert same_bits(state(whole), state(rest))
    assert [e["train_loss"] for e in rest.history] == [e["train_loss"] for e in whole.history]


def test_checkpoint_of_another_call_is_told_and_not_used(tmp_path: Path) -> None:
    run(tmp_path, RECIPE, seed=1)
    events: list[dict] = []
    fresh = run(tmp_path, RECIPE, seed=2, on_event=events.append)
    assert "belongs to other data, options or weights" in events[0]["message"]
    assert same_bits(state(fresh), state(run(tmp_path / "other", RECIPE, seed=2)))


def test_a_damaged_checkpoint_is_told_and_not_used(tmp_path: Path) -> None:
    whole = run(tmp_path, RECIPE)
    file = tmp_path / checkpoint.NAME
    file.write_bytes(file.read_bytes()[:100])
    events: list[dict] = []
    fresh = run(tmp_path, RECIPE, on_event=events.append)
    assert "is damaged" in events[0]["message"]
    assert same_bits(state(whole), state(fresh))


class Tight(Plain):
    """Memory for three images at a time."""

    def loss(self, model, batch):
        if len(batch["images"]) > 3:
            raise torch.cuda.OutOfMemoryError("too much")
        return super().loss(model, batch)


def test_out_of_memory_halves_the_pass_but_not_the_batch(tmp_path: Path) -> None:
    class Smooth(Body):  # without batch statistics, passes of two images add up to exactly the batch's gradient
        def __init__(self) -> None:
            super().__init__()
            self[1], self[4], self[8] = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()

    recipe = Recipe(epochs=2, batch_size=8, lr=0.01, augment="none", optimizer="sgd")
    whole = run(tmp_path / "a", recipe, body=Smooth, method=Plain(recipe))
    events: list[dict] = []
    tight = run(tmp_path / "b", recipe, body=Smooth, method=Tight(recipe), on_event=events.append)
    told = [event["message"] for event in events if event["event"] == "message"]
    assert [text[:39] for text in told] == [
        "out of memory: going on with 4 examples",
        "out of memory: going on with 2 examples",
    ]
    assert sum(event["event"] == "step" for event in events) == 6
    for one, other in zip(state(whole).values(), state(tight).values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_one_image_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    class Hopeless(Plain):
        def loss(self, model, batch):
            raise torch.cuda.OutOfMemoryError("too much")

    with pytest.raises(FovealError, match=r"one example alone does not fit .* choose a smaller backbone"):
        run(tmp_path, RECIPE, method=Hopeless(RECIPE))


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FovealError, match=r"loss of plain became (nan|inf) at step \d+ of \d+.*lower lr than 1e\+30"):
        run(tmp_path, Recipe(epochs=3, batch_size=8, lr=1e30))


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    class Stone(Plain):
        def attach(self, backbone, classes):
            return super().attach(backbone, classes).requires_grad_(False)

    with pytest.raises(UsageError, match="left no parameter to train"):
        run(tmp_path, RECIPE, method=Stone(RECIPE))
    with pytest.raises(UsageError, match="no training images"):
        run(tmp_path, RECIPE, rows=np.array([], dtype=int))


def test_unknown_and_missing_devices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device tpu: expected auto, cpu or cuda"):
        run(tmp_path, RECIPE, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="torch finds no CUDA device"):
            run(tmp_path, RECIPE, device="cuda")


def test_a_full_or_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FovealError, match="cannot write"):
        run(tmp_path / "file", RECIPE)


def test_frozen_tensors_stay_and_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    class HeadOnly(Plain):
        def attach(self, backbone, classes):
            model = super().attach(backbone.requires_grad_(False), classes)
            model.train = lambda mode=True: (torch.nn.Module.train(model, mode), model.backbone.eval(), model)[2]
            return model

    torch.manual_seed(0)
    body = Body()
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    result = run(tmp_path, RECIPE, body=lambda: body, method=HeadOnly(RECIPE))
    assert same_bits(before, result.model.backbone.state_dict())
    with safe_open(tmp_path / checkpoint.NAME, "pt") as file:
        names = set(file.keys())
    assert "model.head.weight" in names
    assert not any(name.endswith("0.weight") for name in names)


def test_predictions_are_the_models_own_and_leave_it_as_it_was(tmp_path: Path) -> None:
    data = tiny_dataset()
    body = Body()
    model = Classifier(body, torch.nn.Linear(8, 2)).train()
    statistics = body[1].state_dict()["running_mean"].clone()
    logits, features = predict_logits(model, data, ROWS, SMALL, device="cpu", batch=7)
    assert model.training
    assert torch.equal(statistics, body[1].state_dict()["running_mean"])
    pixels = np.stack([classify.to_pixels(data.image(int(row)), SMALL) for row in ROWS])
    expected = model.eval().features(classify.normalise(torch.from_numpy(pixels), SMALL))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, model.head(expected), atol=1e-5, rtol=1e-5)


def test_train_loss_is_the_mean_over_images(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=24, lr=1e-12, augment="none")

    class Dry(Body):
        def __init__(self) -> None:
            super().__init__()
            self[8] = torch.nn.Identity()

    result = run(tmp_path, recipe, body=Dry)
    data = tiny_dataset()
    pixels = torch.from_numpy(np.stack([classify.to_pixels(data.image(int(row)), SMALL) for row in ROWS]))
    logits = result.model.train()(classify.normalise(pixels, SMALL))
    batch = {"labels": torch.from_numpy(data.labels[ROWS]), "class_weights": torch.ones(2)}
    assert result.history[0]["train_loss"] == pytest.approx(classification_loss(logits, batch).item(), abs=1e-5)
    assert math.isfinite(result.history[0]["val_loss"])


def test_validation_does_not_change_what_is_learnt(tmp_path: Path) -> None:
    with_val = run(tmp_path / "with", RECIPE)
    without = run(tmp_path / "without", RECIPE, rows_val=np.array([], dtype=int))
    assert same_bits(state(with_val), state(without))
    assert "val_loss" not in without.history[0]


def test_agrees_with_a_loop_written_out(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=24, lr=0.01, weight_decay=0.1, warmup=0.5, augment="none")

    class Dry(Body):
        def __init__(self) -> None:
            super().__init__()
            for place in (1, 4, 8):  # before batch norm, gradients of biases are nothing but rounding
                self[place] = torch.nn.Identity()

    result = run(tmp_path, recipe, body=Dry)
    seed_everything(derive(0, "init"))
    model = Plain(recipe).attach(Dry(), 2)
    data = tiny_dataset()
    pixels = torch.from_numpy(np.stack([classify.to_pixels(data.image(int(row)), SMALL) for row in ROWS]))
    images, labels = classify.normalise(pixels, SMALL), torch.from_numpy(data.labels[ROWS])
    optimizer = torch.optim.AdamW(Plain(recipe).parameter_groups(model, recipe), lr=0.01)
    for share in (0.5, 1.0):  # half of the steps warm up; the cosine starts at its top
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * share
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state(result)[name], tensor, atol=2e-5, rtol=1e-4)


def test_bfloat16_resumes_to_the_same_bits_and_is_near_float32(tmp_path: Path, monkeypatch) -> None:
    exact = run(tmp_path / "exact", RECIPE)
    monkeypatch.setattr(loop, "autocast_dtype", lambda device, model: torch.bfloat16)
    whole = run(tmp_path / "whole", RECIPE)
    run(tmp_path / "cut", RECIPE, budget_s=1e-6)
    assert same_bits(state(whole), state(run(tmp_path / "cut", RECIPE)))
    assert not same_bits(state(whole), state(exact))
    assert whole.history[0]["train_loss"] == pytest.approx(exact.history[0]["train_loss"], abs=0.03)
    assert {tensor.dtype for tensor in state(whole).values()} == {torch.float32, torch.int64}


def test_grouped_convolutions_are_wrapped_within_training_only() -> None:
    body = Body().eval()
    images = torch.randn(2, 3, 16, 16)
    expected = body(images)
    with pytest.raises(KeyError), loop.grouped_in_float32(body):
        assert torch.equal(body(images), expected)
        with torch.autocast("cpu", torch.bfloat16):
            inner = body[3](body[0](images))
            assert inner.dtype == torch.bfloat16
            torch.testing.assert_close(body(images).float(), expected, atol=0.03, rtol=0.03)
        raise KeyError
    assert all("forward" not in vars(module) for module in body)


def test_bfloat16_only_where_it_pays(monkeypatch) -> None:
    wide, narrow = torch.nn.Linear(256, 256), torch.nn.Linear(96, 384)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    cpu = torch.device("cpu")
    assert loop.autocast_dtype(cpu, wide) == torch.bfloat16
    assert loop.autocast_dtype(cpu, narrow) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert loop.autocast_dtype(cpu, wide) is None


class Points(Feed):
    """Numbers x and 3 x + 1, with noise."""

    def __len__(self) -> int:
        return 40

    def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = np.float32(index / 40)
        return {"x": x[None], "y": np.array([3 * x + 1 + rng.normal(0, 0.01)], np.float32)}

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        whole = super().batches(size, seed, epoch)
        return whole if epoch == 0 or seed == 0 else whole[1:]

    def ready(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**batch, "scale": torch.tensor(2.0)}

    def fingerprint(self) -> str:
        return "points"


class Line(Trained):
    name = "line"

    def loss(self, model, batch):
        return {"loss": batch["scale"] * (model(batch["x"]) - batch["y"]).square().mean()}

    def finish(self, model):
        return torch.nn.Sequential(model, torch.nn.Flatten(0))


def test_any_module_learns_from_any_data(tmp_path: Path) -> None:
    recipe = Recipe(epochs=40, batch_size=10, lr=0.3, weight_decay=0.0)
    slopes: list[float] = []

    def validate(model: torch.nn.Linear) -> dict[str, float]:
        assert not model.training
        slopes.append(float(model.weight.detach()))
        return {"slope": slopes[-1]}

    def line(work: str, seed: int = 0, **extra) -> TrainResult:
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        return loop.train(
            Line(), model, Points(), seed, recipe=recipe, device="cpu", work=tmp_path / work, validate=validate, **extra
        )

    done = line("a")
    assert done.model[0].weight.item() == pytest.approx(3, abs=0.05)
    assert done.model[0].bias.item() == pytest.approx(1, abs=0.05)
    assert [record["slope"] for record in done.history] == slopes
    line("b", budget_s=1e-9)
    assert same_bits(state(done), state(line("b")))
    with pytest.raises(ValueError, match="3 batches in one epoch and 4 in another"):
        line("c", seed=1)
