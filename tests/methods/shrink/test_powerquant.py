import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from tests.methods.adapt.small_backbones import images, small_cnn, small_vit
from torch import nn

from foveal.backbones.folding import fold, foldable, folded
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.shrink import Target
from foveal.core.method import Classifier
from foveal.evaluate.beside import share_of
from foveal.methods.shrink.powerquant import (
    Options,
    Powerquant,
    coded_layers,
    codes_of,
    pack,
    power_codes,
    power_decode,
    power_error,
    search_exponent,
    unpack,
)
from foveal.ship.beside import Exporter
from foveal.ship.quantize import quantize
from foveal.ship.runtime import VARIANTS, Runtime

torch.manual_seed(0)
WEIGHT = torch.randn(6, 4, 3, 3) * torch.tensor([1.0, 0.1, 3.0, 1e-3, 0.5, 2.0]).reshape(-1, 1, 1, 1)


def classifier() -> Classifier:
    torch.manual_seed(1)
    backbone = small_cnn()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return Classifier(backbone, nn.Linear(backbone.width, 5)).eval()


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0, 1.4])
def test_codes_and_decoding_agree_with_one_weight_at_a_time(bits: int, exponent: float):
    codes, unit = power_codes(WEIGHT, exponent, bits)
    decoded = power_decode(codes, unit, exponent)
    levels = 2 ** (bits - 1) - 1
    for c, channel in enumerate(WEIGHT.numpy()):
        scale = float(np.abs(channel).max()) ** exponent / levels
        for w, q, back in zip(channel.ravel(), codes[c].flatten().tolist(), decoded[c].flatten().tolist(), strict=True):
            assert abs(np.sign(w) * abs(float(w)) ** exponent / scale - q) < 0.5 + 1e-4
            assert back == pytest.approx(np.sign(q) * (abs(q) * scale) ** (1 / exponent), rel=1e-4, abs=1e-12)
    assert int(codes.abs().max()) == levels


def test_exponent_one_is_uniform_rounding_bit_for_bit():
    codes, unit = power_codes(WEIGHT, 1.0, 8)
    scale = WEIGHT.abs().flatten(1).amax(1) / 127
    by_hand = (WEIGHT / scale.reshape(-1, 1, 1, 1)).round().clamp(-127, 127)
    assert torch.equal(codes.float(), by_hand)
    assert torch.equal(power_decode(codes, unit, 1.0), by_hand * scale.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("exponent", [0.5, 0.7, 1.0])
def test_coding_twice_keeps_sign_order_zero_and_scale(exponent: float):
    weight = WEIGHT.clone()
    weight[0, 0, 0, 0] = 0
    codes, unit = power_codes(weight, exponent, 4)
    decoded = power_decode(codes, unit, exponent)
    assert torch.equal(power_codes(decoded, exponent, 4)[0], codes)
    assert bool((decoded * weight >= 0).all())
    assert decoded[0, 0, 0, 0] == 0
    for channel, back in zip(weight.flatten(1), decoded.flatten(1), strict=True):
        order = channel.abs().argsort()
        assert bool((back.abs()[order].diff() >= 0).all())
    larger, units = power_codes(8 * weight, exponent, 4)
    assert torch.equal(larger, codes)
    assert torch.allclose(units, 8 * unit)
    assert torch.equal(power_codes(-weight, exponent, 4)[0], -codes)


def test_half_and_four_bits_are_integers_up_to_49():
    codes, unit = power_codes(WEIGHT, 0.5, 4)
    squares = codes.sign() * codes.int() ** 2
    assert int(squares.abs().max()) == 49
    assert torch.equal(power_decode(codes, unit, 0.5), squares * unit.reshape(-1, 1, 1, 1))


def test_a_channel_of_zeros_and_bad_input():
    weight = WEIGHT.clone()
    weight[2] = 0
    codes, unit = power_codes(weight, 0.6, 4)
    assert float(codes[2].abs().max()) == 0
    assert unit[2] == 1
    with pytest.raises(UsageError, match=r"exponent 0.0: expected at least 0.1"):
        power_codes(weight, 0.0, 4)
    with pytest.raises(UsageError, match="9 bits: expected 2 to 8"):
        power_codes(weight, 0.5, 9)
    weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UsageError, match="NaN or infinite"):
        power_codes(weight, 0.5, 4)


def test_the_search_finds_the_best_of_a_fine_grid():
    weights = [WEIGHT, torch.randn(20, 30) ** 3]
    found = search_exponent(weights, 4)
    fine = min(power_error(weights, exponent, 4) for exponent in np.arange(0.1, 1.5, 0.02))
    assert power_error(weights, found, 4) <= 1.01 * fine
    assert power_error(weights, found, 4) <= power_error(weights, 1.0, 4)


@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_packing_loses_nothing(count: int):
    codes = torch.arange(count).remainder(15).to(torch.int8) - 7
    assert len(pack(codes)) == (count + 1) // 2
    assert torch.equal(unpack(pack(codes), codes.shape), codes)


def test_folding_keeps_the_answers_and_the_activations():
    model, x = classifier(), images()
    before, norms = model(x), [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    pairs = foldable(model, x)
    fold(model, pairs)
    assert len(pairs) == len(norms) > 10
    assert not [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    assert torch.allclose(model(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    with pytest.raises(UsageError, match="expected a layer and a batch norm"):
        fold(model, pairs[:1])


def test_a_layer_that_somebody_else_reads_is_not_folded():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm, self.own, self.last = (
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
            )  # fmt: skip
            for norm in (self.norm, self.last):
                nn.init.normal_(norm.running_mean)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x + self.last(self.own(self.norm(x)))

    model, x = Shared().eval(), images()
    before = model(x)
    assert folded(model, x) == [("own", "last")]
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.35), (4, 0.25)])
def test_the_model_computes_with_what_is_stored(bits: int, share: float):
    model, x = classifier(), images()
    before = copy.deepcopy(model.state_dict())
    step = Powerquant(Options(bits=bits)).shrink(model, None, None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert share_of("size", step.module, model, 32) < share
    for _, layer in coded_layers(step.module):
        assert torch.equal(layer.weight, power_decode(codes_of(layer), layer.unit, layer.exponent))
    again = Powerquant().rebuild(classifier(), json.loads(json.dumps(step.plan)))
    again.load_state_dict(step.module.state_dict())
    assert torch.equal(again(x), step.module(x))
    assert step.notes["error"] <= step.notes["error_of_uniform_rounding"]
    with pytest.raises(BackboneError, match="coded already"):
        Powerquant().shrink(step.module, None, None)


def test_a_size_chooses_the_bits_and_one_out_of_reach_is_told():
    model = classifier()

    def target(share: float) -> Target:
        return Target("size", share, lambda candidate: share_of("size", candidate, model, 32))

    assert Powerquant().shrink(model, None, target(0.4)).notes["bits"] == 8
    assert Powerquant().shrink(model, None, target(0.25)).notes["bits"] == 4
    with pytest.raises(UsageError, match=r"size=0.05 is out of reach \(8 bits come to"):
        Powerquant().shrink(model, None, target(0.05))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"folded": [["head", "head"]], "bits": {}}, "expected a layer and a batch norm"),
        ({"folded": [], "bits": {"nowhere": 4}}, "the plan codes nowhere"),
        ({"folded": [], "bits": {"head": 64}}, "the plan codes head with 64 bits"),
    ],
)
def test_a_plan_that_fits_no_model(plan: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        Powerquant().rebuild(classifier(), plan)


def test_a_channel_whose_weights_vanish_beside_its_bias_is_exported_as_its_constant(tmp_path):
    model = classifier()
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.bias.fill_(0.3)
            norm.weight[0] = 1e-8
    small = Powerquant(Options(bits=4, exponent=0.5)).shrink(model, None, None).module.eval()
    coded = [layer for name, layer in coded_layers(small) if name != "head"]
    dead = [layer for layer in coded if not bool(codes_of(layer)[0].any())]
    assert len(dead) == len(norms)
    assert all(layer.unit[0] == 1 and layer.bias[0] != 0 for layer in dead)
    assert all(bool(codes_of(layer)[1:].flatten(1).any(1).all()) for layer in dead)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    exporter = Exporter(model.backbone.preprocessing, list("abcde"), "single-label", [photo], 1)
    source, target = exporter.file(small, tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    quantize(source, target, [np.asarray(photo)], codes=Powerquant().codes(small))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(target).graph.initializer}
    found = {
        (stored[name].astype(np.float32) * stored[name[:-5] + "scale"].reshape(-1, 1, 1, 1)).tobytes()
        for name in stored
        if name.endswith("/weight/codes") and stored[name].ndim == 4
    }
    assert all(layer.weight.numpy().tobytes() in found for layer in coded)


def test_the_integer_export_holds_the_very_weights_and_answers_as_the_simulation(tmp_path):
    backbone = small_vit(depth=1)
    torch.manual_seed(2)
    model = Powerquant(Options(bits=4, exponent=0.5)).shrink(
        Classifier(backbone, nn.Linear(backbone.width, 5)).eval(), None, None
    ).module  # fmt: skip
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    exporter = Exporter(backbone.preprocessing, list("abcde"), "single-label", [photo], 1)
    source, target = exporter.file(model, tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    quantize(source, target, [np.asarray(photo)], codes=Powerquant().codes(model))
    graph = onnx.load(target).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = set()
    for name, integers in stored.items():
        if name.endswith("/weight/codes") and integers.ndim == 2:
            decoded = integers.astype(np.float32) * stored[name.removesuffix("codes") + "scale"]
            found.add(np.ascontiguousarray(decoded.T).tobytes())
            assert np.abs(integers).max() <= 127
    wanted = [layer for name, layer in coded_layers(model) if name != "head" and layer.weight.ndim == 2]
    assert len(wanted) == 4
    assert all(layer.weight.numpy().tobytes() in found for layer in wanted)
    square = np.asarray(photo)[None]
    simulated, _ = Runtime(source, 1)(square)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    unfused = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    expected = unfused.run(["probabilities"], {"image": square})[0]
    fused, _ = Runtime(target, 1, VARIANTS["int8"])(square)
    assert np.abs(fused - expected).max() < 0.01
    assert np.abs(fused - simulated).max() < 0.1
