"""The contract of every architecture in `foveal.architectures`, found by its file, on a small configuration of it.

The test file of an architecture names that configuration: `TINY = (variant, arguments)`.
"""

import ast
import copy
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import foveal.architectures
from foveal.backbones.adapter import Backbone, Plan, build, has_hidden_buffers
from foveal.core import cards, catalogue
from foveal.core.errors import BackboneError
from foveal.core.method import Adapt, Classifier, trainable
from foveal.core.preprocessing import Preprocessing
from foveal.features.graph import to_onnx

SIZE = 64
CAPABILITIES = Path(__file__).resolve().parents[2] / "docs" / "architectures" / "capabilities.json"
ROOM = Path(foveal.architectures.__file__).parent
MODULES = [
    file.stem
    for file in sorted(ROOM.glob("[!_]*.py"))
    if (Path(__file__).parents[2] / "reproductions" / "architectures" / file.name).exists()
]


def variants(module: str) -> list[str]:
    """What foveal registers from this file; timm may have a module of the same name."""
    names = timm.list_models(module=module)
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith("foveal.")]


VARIANTS = [(module, name) for module in MODULES for name in variants(module)]


@cache
def tiny(module: str) -> tuple[str, dict[str, Any]]:
    """The variant and the arguments that the architecture's own test names, for images of SIZE pixels."""
    tree = ast.parse(Path(__file__).with_name(f"test_{module}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TINY":
            name, args = ast.literal_eval(node.value)
            return name, args
    raise AssertionError(f"tests/architectures/test_{module}.py names no TINY = (variant, arguments)")


def make(module: str, **more: Any) -> Any:
    """The small configuration with random weights, its residual branches at a weight that can be seen."""
    name, args = tiny(module)
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 5, **args, **more})
    return loud(model)


def loud(model: Any) -> Any:
    for key, parameter in model.named_parameters():
        if parameter.numel() > 1 and parameter.unique().numel() == 1 and parameter.detach().flatten()[0] < 0.1:
            nn.init.normal_(parameter, 0.3 if "gamma" in key else 0.0, 0.1)
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("module", "name"), VARIANTS)
def test_parameters_are_those_of_the_card(module: str, name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not has_hidden_buffers(model)
    card = cards.read_card(module.replace("_", "-"))
    assert sum(p.numel() for p in model.parameters()) == card["variants"][name]["parameters"]
    assert model.default_cfg["architecture"] == name
    assert {model.default_cfg["classifier"]} <= set(dict(model.named_modules()))


@pytest.mark.parametrize("module", MODULES)
def test_card_is_complete(module: str):
    card = cards.read_card(module.replace("_", "-"))
    assert card["name"] == module.replace("_", "-")
    assert len(card["claim"]) > 40
    assert card["expectation"]["checks"]
    assert set(card["variants"]) == set(variants(module))


@pytest.mark.parametrize("module", MODULES)
def test_a_model_made_without_memory_takes_weights(module: str, tmp_path: Path):
    name, args = tiny(module)
    model = make(module).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = timm.create_model(name, **{"num_classes": 5, **args})
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    with torch.no_grad():
        expected = model(images())
        assert expected.shape == (2, 5)
        assert torch.isfinite(expected).all()
        assert not torch.allclose(expected[0], expected[1], atol=1e-6), "the image does not matter"
        assert torch.equal(empty.eval()(images()), expected)
        close(model(images()[:1]), expected[:1])


@pytest.mark.parametrize("module", MODULES)
def test_features(module: str):
    name, args = tiny(module)
    model = make(module).eval()
    with torch.no_grad():
        final, maps = model.forward_intermediates(images())
        close(final, model.forward_features(images()), 1e-5)
        net = loud(timm.create_model(name, features_only=True, **args)).eval()
        found = net(images())
    assert len(found) == len(net.feature_info.channels())
    for each, channels, stride in zip(found, net.feature_info.channels(), net.feature_info.reduction(), strict=True):
        assert tuple(each.shape) == (2, channels, SIZE // stride, SIZE // stride)
    assert [each.shape for each in maps[-len(found) :]] == [each.shape for each in found]
    first = timm.create_model(name, features_only=True, out_indices=(0,), **args)
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in net.parameters())
    assert first(images())[0].shape == found[0].shape


@pytest.mark.parametrize("module", MODULES)
def test_the_classifier_can_be_replaced(module: str):
    model = make(module).eval()
    with torch.no_grad():
        features = model.forward_features(images())
        vector = model.forward_head(features, pre_logits=True)
        assert vector.shape == (2, model.head_hidden_size)
        close(model.get_classifier()(vector), model(images()))
        model.reset_classifier(0)
        close(model(images()), vector)
        assert model.num_classes == 0
        model.reset_classifier(7)
        assert model(images()).shape == (2, 7)
        assert model.num_classes == model.get_classifier().out_features == 7
    assert make(module, num_classes=0).eval()(images()).shape == vector.shape
    assert make(module, in_chans=1)(images()[:, :1]).shape == (2, 5)


@pytest.mark.parametrize("module", MODULES)
def test_checkpointing_keeps_gradients(module: str):
    model = make(module).train()
    gradients: list[dict[str, Tensor]] = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images()).square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(trainable(model)).keys()
    for key, gradient in gradients[0].items():
        close(gradients[1][key], gradient)


@pytest.mark.parametrize("module", MODULES)
def test_timm_can_group_its_layers(module: str):
    from timm.models import group_parameters

    model = make(module)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
    everywhere = {"reg_token", "dist_token"}  # timm's own ViT names them whether it has them or not
    assert model.no_weight_decay() - everywhere <= set(dict(model.named_parameters()))


@pytest.mark.parametrize("module", MODULES if os.environ.get("FOVEAL_WRITE_CAPABILITIES") else MODULES[::5])
def test_compile(module: str):
    """One graph without breaks, traced down to ATen; the C++ of `inductor` would take half a minute a net. All of them
    are compiled by `make capabilities`."""
    model = make(module).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(images()), model(images()), 1e-5)
    as_documented(module, "compile", "works")
    torch.compiler.reset()


@pytest.mark.parametrize("module", MODULES)
def test_onnx(module: str, tmp_path: Path):
    model = make(module).eval()
    path = tmp_path / "model.onnx"
    try:
        to_onnx(model, (images(1),), path, ["x"], ["y"], {"x": {0: "N"}, "y": {0: "N"}})
    except Exception as error:
        as_documented(module, "onnx", f"unknown: {str(error).splitlines()[0]}")
        return
    (answer,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": images(3).numpy()})
    close(torch.from_numpy(answer), model(images(3)).detach())
    as_documented(module, "onnx", "works")


def backbone(module: str) -> Backbone:
    name, args = tiny(module)
    plan = Plan(name, name, args, Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3), make(module).head_hidden_size, "random")
    torch.manual_seed(0)
    model: Any = build(plan)
    return Backbone(plan, loud(model)).eval()


@pytest.mark.parametrize("module", MODULES)
def test_as_a_backbone(module: str):
    given = backbone(module)
    with torch.no_grad():
        assert given(images()).shape == (2, given.width)
        for each, stride in given.feature_map(images()):
            assert each.shape[-1] == SIZE // stride
    assert given.family in ("cnn", "vit", "windowed", "hybrid")
    as_documented(module, "family", given.family)
    as_documented(module, "strides", " ".join(str(stride) for _, stride in given.feature_map(images())))


@pytest.mark.parametrize("module", MODULES)
def test_methods(module: str):
    """Every method of the catalogue works on it, or says in one sentence why not."""
    x, y = images(6), torch.arange(6) % 2
    given = backbone(module)
    with torch.no_grad():
        X = given(x)
    refused: list[str] = []
    for name in catalogue.names("adapt"):
        method = catalogue.create(name)
        assert isinstance(method, Adapt)
        if method.reads_features():
            if name == "linear":
                head = method.fit_features(X.clone(), y, torch.ones(6), seed=0)
                assert Classifier(given, head)(x).shape == (6, 2)
            continue
        try:
            model = method.attach(copy.deepcopy(given), 2)
        except BackboneError as refusal:
            assert given.arch in str(refusal) or name in str(refusal)
            refused.append(name)
            continue
        before = {key: p.detach().clone() for key, p in trainable(model)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):  # what a zero-initialised head hides from the first step moves in the second
            optimizer.zero_grad()
            method.loss(model.train(), {"images": x, "labels": y, "class_weights": torch.ones(2)})["loss"].backward()
            optimizer.step()
        assert any(not torch.equal(value, before[key]) for key, value in trainable(model) if key[:5] != "head."), name
        assert method.finish(model).eval()(x).shape == (6, 2)
    as_documented(module, "refused by", ", ".join(refused) or "no method")


def as_documented(module: str, key: str, found: str) -> None:
    """What the battery found is what the docs say; with FOVEAL_WRITE_CAPABILITIES=1 (`make capabilities`), write it."""
    known = json.loads(CAPABILITIES.read_text(encoding="utf-8")) if CAPABILITIES.exists() else {}
    if os.environ.get("FOVEAL_WRITE_CAPABILITIES") == "1":
        known.setdefault(module, {})[key] = found
        CAPABILITIES.parent.mkdir(exist_ok=True)
        CAPABILITIES.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    assert known.get(module, {}).get(key) == found, (
        "docs/architectures/capabilities.json is out of date: make capabilities"
    )


@pytest.mark.parametrize("module", MODULES)
def test_the_tiny_reproduction_runs(module: str):
    from foveal.verbs.reproduce import reproduce

    result = reproduce(module.replace("_", "-"), tiny=True)
    assert {item["check"] for item in result["checks"]} == set(
        cards.read_card(module.replace("_", "-"))["expectation"]["checks"]
    )
