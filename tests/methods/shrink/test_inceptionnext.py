"""`inceptionnext` on a fitted ConvNeXt: the contract of the shrink family, and the verb from end to end."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tests.contract.capabilities import hooks
from tests.contract.test_adapt import CLASSES, check_export, pixels_of
from tests.contract.test_shrink import Data
from timm.models.inception_next import InceptionDWConv2d
from torch import nn

import foveal
from foveal.backbones.adapter import load_backbone, normalise
from foveal.core.errors import BackboneError, UsageError
from foveal.core.method import Classifier
from foveal.evaluate.beside import share_of, stored_bytes
from foveal.methods.shrink.inceptionnext import Inceptionnext, Options
from foveal.methods.shrink.powerquant import Powerquant
from foveal.ship import beside
from foveal.verbs import _shrunk

SIZE = 64


def convnext() -> Classifier:
    torch.manual_seed(0)
    backbone = load_backbone("test_convnext", pretrained=False, size=SIZE)
    return Classifier(backbone, nn.Linear(backbone.width, CLASSES)).eval()


def mixers(model: nn.Module) -> int:
    return sum(isinstance(each, InceptionDWConv2d) for each in model.modules())


def test_the_contract_on_a_convnext(tmp_path: Path):
    model = convnext()
    p = model.backbone.preprocessing
    x = normalise(pixels_of(p), p)
    before = copy.deepcopy(model.state_dict())
    method = Inceptionnext(Options(after=2, lr=0.01))
    made = method.shrink(model, Data(x), None)
    assert mixers(model) == 0
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks(model) == hooks(made.module) == 0
    assert mixers(made.module) == len(made.plan["replaced"]) == made.notes["replaced"] == 9
    assert made.notes["depthwise_bytes_after"] < 0.5 * made.notes["depthwise_bytes_before"]
    assert share_of("macs", made.module, model, SIZE) < 1
    assert stored_bytes(made.module) < stored_bytes(model)
    rebuilt = Inceptionnext(Options(after=2)).rebuild(convnext(), json.loads(json.dumps(made.plan)))
    rebuilt.load_state_dict(made.module.state_dict())
    again = method.shrink(convnext(), Data(x), None).module
    untuned = Inceptionnext(Options(after=0)).shrink(model, None, None).module
    with torch.inference_mode():
        logits = made.module(x)
        assert torch.equal(rebuilt(x), logits)
        assert torch.equal(again(x), logits)
        assert not torch.equal(untuned(x), logits), "nothing was tuned"
    changed = [
        key for key, value in untuned.state_dict().items() if key in before and not torch.equal(value, before[key])
    ]
    assert changed == []
    check_export(made.module, p, tmp_path)


def test_bad_input():
    model = convnext()
    with pytest.raises(
        UsageError, match="inceptionnext tunes on labelled training images: give it some, or set after=0"
    ):
        Inceptionnext().shrink(model, None, None)
    with pytest.raises(BackboneError, match=r"test_convnext: .*band 10: expected an odd number, such as 11"):
        Inceptionnext(Options(band=10)).shrink(model, None, None)
    with pytest.raises(
        BackboneError, match=r"test_convnext: .* 24 channels at branch_ratio 0.01: a branch has no channels"
    ):
        Inceptionnext(Options(branch_ratio=0.01)).shrink(model, None, None)
    plain = load_backbone("test_vit", pretrained=False)
    with pytest.raises(BackboneError, match="inceptionnext on test_vit: nothing to replace"):
        Inceptionnext().shrink(Classifier(plain, nn.Linear(plain.width, 2)).eval(), None, None)
    made = Inceptionnext(Options(after=0)).shrink(model, None, None)
    with pytest.raises(BackboneError, match="nothing to replace"):
        Inceptionnext().shrink(made.module, None, None)
    coded = Powerquant().shrink(model, None, None).module
    with pytest.raises(BackboneError, match=r"conv_dw \(its weights are stored as codes\)"):
        Inceptionnext().shrink(coded, None, None)
    for wrong in ([], ["head"], made.plan["replaced"][1:], 3):
        with pytest.raises(UsageError, match="the plan of inceptionnext is for other convolutions than the 9"):
            Inceptionnext().rebuild(convnext(), {"replaced": wrong})


def test_the_widest_options_still_make_it_smaller():
    model = convnext()
    made = Inceptionnext(Options(branch_ratio=1 / 3, band=31, after=0)).shrink(model, None, None)
    assert share_of("params", made.module, model, SIZE) < 1


def test_shrink_a_bundle(photos: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Kernels of 7, 5 and 5 go, those of 3 stay; the new Bundle opens and answers as its ONNX form did."""
    monkeypatch.setattr(_shrunk, "timed_beside", partial(beside.timed_beside, seconds=0.05))
    torch.manual_seed(0)
    save_file(timm.create_model("test_convnext3", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    weights = f"test_convnext3@{tmp_path / 'w.safetensors'}"
    fitted = foveal.fit(str(photos), method="linear", backbone=weights, out=tmp_path / "photos", offline=True)
    out = tmp_path / "small"
    record = foveal.shrink(fitted.path, method="inceptionnext:after=2", out=out, max_drop=1.0)
    assert record["sides"]["after"]["macs"] < record["sides"]["before"]["macs"]
    assert record["sides"]["after"]["parameters"] < record["sides"]["before"]["parameters"]
    assert [row["batch"] for row in record["sides"]["after"]["latency"]] == [1, 8], record["reason"]
    assert record["steps"][0]["notes"]["replaced"] == 3
    bundle = foveal.load(out)
    assert mixers(bundle.model.classifier) == 3
    (row,) = bundle.predict(photos / "red" / "00.jpg")
    assert row["label"] in ("blue", "green", "red")
