import json
import time
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from PIL import Image
from timm.layers import Conv2dSame
from torch import nn

from foveal.backbones.adapter import load_backbone
from foveal.blocks.codes import Codes, symmetric
from foveal.core.errors import FovealError, UsageError
from foveal.core.method import Classifier
from foveal.data.images import to_pixels
from foveal.data.worlds import garbage
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import Energy
from foveal.features.graph import to_onnx
from foveal.ship import quantize as module
from foveal.ship import variants
from foveal.ship.export import export_onnx, pad_inside
from foveal.ship.quantize import (
    mean_error,
    observe,
    plan,
    quantize,
    ranges_of,
    step_of,
    with_room,
    write_qdq,
)
from foveal.ship.runtime import FP32, VARIANTS, Runtime, without_front
from foveal.ship.variants import HeldOut, compare_variants, faults_of, time_in_turns, why_no_int8

pytestmark = pytest.mark.usefixtures("cache")
CLASSES = ["a", "b", "c"]


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 7, 9, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize((100 + place, 80)) for place, image in enumerate(coarse)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Paths of small exported models, by backbone, and squares to calibrate on."""
    folder, photos, made = tmp_path_factory.mktemp("exported"), pictures(12), {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            backbone = load_backbone(name, pretrained=False, size=64).eval()
            head = nn.Linear(backbone.width, len(CLASSES))
            nn.init.normal_(head.weight, std=3.0)
            model = Calibrated(Classifier(backbone, head), 1.3, Energy(), "single-label").eval()
            path = folder / f"{name}.onnx"
            export_onnx(model, backbone.preprocessing, path, images=photos[:2], classes=CLASSES, threshold=0.5)
            made[name] = path, [to_pixels(photo, backbone.preprocessing) for photo in photos]
        return made[name]

    return get


def tensors(model) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def weights_of(model, operator: str) -> list[np.ndarray]:
    """What the weights of all nodes of one operator are stored as: codes where they are decoded on the way."""
    known = tensors(model)
    source = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    names = [node.input[1] for node in model.graph.node if node.op_type == operator]
    return [known[source.get(name, name)] for name in names if source.get(name, name) in known]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]), st.sampled_from([127, 63]))
def test_symmetric_codes_lose_at_most_half_a_step(seed, axis, levels):
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(5, 6)) * 10.0 ** rng.integers(-6, 6, (5, 6))).astype(np.float32)
    codes = symmetric(weight, axis, levels)
    step = codes.scale[:, None] if axis == 0 else codes.scale[None]
    assert (np.abs(codes.decode() - weight) <= step * 0.5001).all()
    assert (np.abs(codes.values).max(axis=1 - axis) == levels).all()
    assert codes.fits_int8


def test_a_channel_of_zeros_stays_zero_and_nan_is_refused():
    weight = np.array([[0.0, 0.0], [1.0, -2.0]], np.float32)
    codes = symmetric(weight, 0)
    assert (codes.values[0] == 0).all()
    assert (codes.scale > 0).all()
    assert codes.decode()[0].tolist() == [0.0, 0.0]
    with pytest.raises(FovealError, match="NaN or infinite"):
        symmetric(np.array([[np.nan, 1.0]], np.float32), 0)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_zero_is_a_level_and_both_ends_are_within_a_step(low, high):
    low, high = min(low, high), max(low, high)
    scale, zero = step_of(low, high)
    assert 0 <= zero <= 255
    low, high = min(low, 0.0), max(high, 0.0)
    assert (255 - zero) * float(scale) >= high - float(scale)
    assert -zero * float(scale) <= low + float(scale)
    if low == 0 and high > 1e-30:
        assert np.float32(255) * scale <= np.float32(high)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_the_int8_file_is_int8_and_answers_in_plain_onnxruntime(exported, tmp_path, name):
    path, squares = exported(name)
    target = tmp_path / "model.int8.onnx"
    record = quantize(path, target, squares)
    before, after = onnx.load(path), onnx.load(target)
    layers = plan(before.graph).layers
    assert record["layers"] == len(layers) > 5
    assert record["images"] == 12
    known = tensors(after)
    for layer in layers.values():
        assert layer.weight not in known
    assert not any(weight.dtype == np.float32 for weight in weights_of(after, "Conv"))
    assert sum(value.nbytes for value in known.values() if value.dtype == np.int8) >= sum(
        tensors(before)[name].size for name in {layer.weight for layer in layers.values()}
    )
    assert target.stat().st_size < path.stat().st_size
    assert [(p.key, p.value) for p in before.metadata_props] == [(p.key, p.value) for p in after.metadata_props]
    for image in pictures(3):
        given = {"image": np.asarray(image)[None]}
        expected = onnxruntime.InferenceSession(str(path)).run(None, given)
        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        assert [each.name for each in session.get_outputs()] == ["probabilities", "unknown_score"]
        found = session.run(None, given)
        assert np.abs(found[0] - expected[0]).max() < 0.1
        assert not np.array_equal(found[0], expected[0])


def test_the_front_the_head_and_the_score_are_left_as_they_are(exported):
    path, squares = exported("test_efficientnet")
    before = onnx.load(path)
    observed = observe(before, squares[:2])
    after = write_qdq(before, ranges_of(observed, 0.0), observed.means)
    inner = {node.name for node in without_front(before).graph.node}
    front = [node.SerializeToString() for node in before.graph.node if node.name not in inner or not node.name]
    assert set(front) <= {node.SerializeToString() for node in after.graph.node}
    assert tensors(after)["model.classifier.head.weight"].dtype == np.float32
    kinds = [node.op_type for node in after.graph.node]
    last = max(place for place, kind in enumerate(kinds) if kind == "QuantizeLinear")
    assert "Gemm" in kinds[last:]
    assert "Softmax" in kinds[last:]


def test_residual_sums_are_integers_in_a_convnet_and_float_in_a_transformer(exported):
    for name, expected in (("test_resnet", True), ("test_vit", False)):
        graph = onnx.load(exported(name)[0]).graph
        chosen = plan(graph)
        sums = {out for node in graph.node if node.op_type == "Add" for out in node.output}
        behind = {node.output[0] for node in graph.node if node.op_type == "Relu" and node.input[0] in sums}
        assert bool((sums | behind) & chosen.closed) is expected


def test_runs_as_integers_in_onnxruntime(exported, tmp_path):
    path, squares = exported("test_resnet")
    quantize(path, tmp_path / "int8.onnx", squares[:3])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(without_front(onnx.load(tmp_path / "int8.onnx")).SerializeToString(), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == len(plan(onnx.load(path).graph).layers)
    assert "QLinearAdd" in kinds
    assert "Conv" not in kinds


def power_codes(weight, axis, exponent=0.5, bits=4):
    """Codes sign(q) q^2 with scale s^2: a non-uniform grid that int8 holds exactly."""
    levels = 2 ** (bits - 1) - 1
    largest = np.abs(weight).max(axis=tuple(each for each in range(weight.ndim) if each != axis), keepdims=True)
    step = np.where(largest > 0, largest, 1.0) ** exponent / levels
    q = np.rint(np.sign(weight) * np.abs(weight) ** exponent / step)
    return Codes((np.sign(q) * q**2).astype(np.int64), (step**2).ravel().astype(np.float32), axis)


def test_another_quantizers_codes_are_written_as_they_are(exported):
    path, squares = exported("test_resnet")
    model = onnx.load(path)
    ranges = ranges_of(observe(model, squares[:2]), 0.0)
    found = weights_of(write_qdq(model, ranges, quantizer=power_codes), "Conv")
    levels = {sign * q * q for q in range(8) for sign in (-1, 1)}
    assert found
    assert all(set(np.unique(codes)) <= levels for codes in found)
    with pytest.raises(FovealError, match=r"go to 16129, int8 holds up to 127"):
        write_qdq(model, ranges, quantizer=partial(power_codes, bits=8))
    with pytest.raises(FovealError, match="no range is given for"):
        write_qdq(model, {})


@pytest.mark.parametrize("groups", [1, 3])
def test_the_mean_error_of_rounding_is_that_of_a_constant_image(groups):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6 // groups, 3, 3, generator=generator)
    mean = torch.rand(6, generator=generator)
    image = mean[None, :, None, None].expand(1, 6, 5, 5)
    codes = symmetric(weight.numpy(), 0, 7)
    lost = weight - torch.from_numpy(codes.decode())
    expected = torch.nn.functional.conv2d(image, lost, groups=groups)[0, :, 0, 0]
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    np.testing.assert_allclose(mean_error(node, lost.numpy(), 0, mean.double().numpy()), expected, atol=1e-5)


def test_means_take_the_shift_off_coarse_weights(exported, monkeypatch):
    path, squares = exported("test_resnet")
    model = onnx.load(path)
    observed = observe(model, squares)
    ranges = ranges_of(observed, 0.0)
    coarse = partial(symmetric, levels=15)
    wanted = module.answers(model, squares, 1)
    plain = module.distance(module.answers(write_qdq(model, ranges, quantizer=coarse), squares, 1), wanted)
    corrected = write_qdq(model, ranges, observed.means, coarse)
    assert module.distance(module.answers(corrected, squares, 1), wanted) < plain


def test_a_channel_that_is_all_but_dead_makes_room_for_its_bias():
    codes = symmetric(np.array([[1e-30, 0.0], [1.0, 0.5]], np.float32), 0)
    bias = np.array([100.0, 100.0])
    roomy = with_room(codes, bias)
    assert (np.abs(bias / roomy.scale) < 2**31).all()
    assert np.array_equal(roomy.values[1], codes.values[1])
    assert (roomy.values[0] == 0).all()
    assert with_room(codes, np.zeros(2)) is codes
    empty = symmetric(np.array([[0.0, 0.0], [1.0, 0.5]], np.float32), 0)
    finer = with_room(empty, np.array([0.3, 100.0]))
    assert round(0.3 / float(finer.scale[0])) * float(finer.scale[0]) == pytest.approx(0.3, rel=1e-6)
    assert not finer.values[0].any()
    assert finer.scale[1] == empty.scale[1]


def test_quantizing_without_images_is_refused(exported, tmp_path):
    with pytest.raises(UsageError, match="at least one image"):
        quantize(exported("test_resnet")[0], tmp_path / "x.onnx", [])
    assert not (tmp_path / "x.onnx").exists()


class Padding(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Conv2dSame(3, 4, 3, stride=2)
        self.second = Conv2dSame(4, 5, 5, stride=2, groups=1, dilation=1)

    def forward(self, squares):
        return self.second(self.first(squares.float()).relu())


def test_padding_moves_into_convolutions_without_a_change(tmp_path):
    torch.manual_seed(0)
    squares = torch.randint(0, 256, (2, 3, 31, 31), dtype=torch.uint8)
    names = {"squares": {0: "N"}, "out": {0: "N"}}
    to_onnx(Padding().eval(), (squares,), tmp_path / "m.onnx", ["squares"], ["out"], names)
    before, after = onnx.load(tmp_path / "m.onnx"), onnx.load(tmp_path / "m.onnx")
    pad_inside(after, squares.numpy())
    kinds = [node.op_type for node in after.graph.node]
    assert sum(node.op_type == "Pad" for node in before.graph.node) == 2
    assert sorted(kind for kind in kinds if kind not in ("Cast", "Relu", "Constant")) == ["Conv", "Conv"]
    answers = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"squares": squares.numpy()})[0]
        for model in (before, after)
    ]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5, atol=1e-4)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(variants, "ROUNDS", (2, 2))


def held_out(squares):
    return HeldOut(np.stack(squares), np.arange(len(squares)) % 3, garbage(8, 64, 0))


def test_every_variant_has_its_row_and_the_fastest_accepted_is_chosen(exported, tmp_path, quick):
    path, squares = exported("test_resnet")
    target = tmp_path / "int8.onnx"
    quantize(path, target, squares[:4])
    rows, chosen = compare_variants(
        {"model.onnx": path, "model.int8.onnx": target}, held_out(squares), max_drop=1.0, threads=1
    )
    assert [row["name"] for row in rows] == list(VARIANTS)
    json.dumps(rows, allow_nan=False)
    assert rows[0]["accepted"]
    assert rows[0]["drop"] == 0.0
    assert rows[0]["unknown_agreement"] == rows[0]["garbage_agreement"] == 1.0
    ran = {row["name"]: row for row in rows if "milliseconds" in row}
    assert set(ran) >= {"fp32", "int8", "openvino-fp32", "openvino-int8"}
    assert ran["int8"]["bytes"] == target.stat().st_size
    assert [timing["batch"] for timing in ran["int8"]["timings"]] == [1, 8]
    best = max((row for row in rows if row["accepted"]), key=lambda row: row["speedup"])
    assert chosen == best["name"]


def test_a_variant_that_is_not_there_says_so(exported, quick):
    path, squares = exported("test_resnet")
    rows, chosen = compare_variants({"model.onnx": path}, held_out(squares), max_drop=1.0, threads=1)
    int8 = next(row for row in rows if row["name"] == "int8")
    assert (int8["accepted"], int8["reason"]) == (False, "model.int8.onnx was not made")
    assert "model.int8.onnx was not made" in why_no_int8(rows)
    assert chosen not in ("int8", "openvino-int8")


def row(milliseconds=(5.0, 40.0), drop=0.0, unknown=1.0, of_garbage=1.0):
    timings = [{"batch": b, "milliseconds": t} for b, t in zip((1, 8), milliseconds, strict=True)]
    return {"timings": timings, "drop": drop, "unknown_agreement": unknown, "garbage_agreement": of_garbage}


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (row((10.0, 40.0)), "10.00 ms against 10.00 ms at batch 1)"),
        (row((5.0, 79.0)), "79.00 ms against 80.00 ms at batch 8)"),
        (row(drop=0.02), "loses 0.0200 of balanced accuracy, more than 0.01"),
        (row(drop=None), "cannot be measured"),
        (row(unknown=0.9), "90.0% of held-out images"),
        (row(of_garbage=0.5), "50.0% of garbage images"),
    ],
)
def test_what_a_variant_fails_is_said_in_numbers(measured, said):
    reference = row((10.0, 80.0))["timings"]
    (fault,) = faults_of(measured, reference, 0.01)
    assert said in fault
    assert len(faults_of(row((11.0, 90.0), drop=0.5), reference, 0.01)) == 2
    assert faults_of(row(drop=0.01), reference, 0.01) == []


def test_runtimes_take_turns_and_the_slower_one_is_slower(quick):
    calls = []

    def waits(name, seconds):
        def run(squares):
            calls.append((name, len(squares)))
            time.sleep(seconds)

        return run

    found = time_in_turns({"a": waits("a", 0.0), "b": waits("b", 0.01)}, np.zeros((3, 4, 4, 3), np.uint8))
    assert [timing["batch"] for timing in found["a"]] == [1, 8]
    assert found["b"][0]["milliseconds"] >= 10 > found["a"][0]["milliseconds"]
    assert [name for name, size in calls if size == 1] == ["a", "b", "a", "b", "b", "a"]


def test_a_model_that_answers_nonsense_is_refused(exported, tmp_path, quick):
    path, squares = exported("test_resnet")
    model = onnx.load(path)
    observed = observe(model, squares[:2])
    broken = dict.fromkeys(ranges_of(observed, 0.0), (0.0, 0.001))
    target = tmp_path / "broken.onnx"
    onnx.save(write_qdq(model, broken), target)
    reference = Runtime(path)(np.stack(squares))[0].argmax(1)
    judged = HeldOut(np.stack(squares), reference, garbage(8, 64, 0))
    rows, chosen = compare_variants({"model.onnx": path, "model.int8.onnx": target}, judged, max_drop=0.01, threads=1)
    int8 = next(each for each in rows if each["name"] == "int8")
    assert not int8["accepted"]
    assert "of balanced accuracy, more than 0.01" in int8["reason"]
    assert chosen != "int8"
    assert FP32.name == rows[0]["name"]
    assert TensorProto.INT8 in {tensor.data_type for tensor in onnx.load(target).graph.initializer}
