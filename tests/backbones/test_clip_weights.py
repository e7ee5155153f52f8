"""Weights in transformers' layout answer in foveal's towers as they do there."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from foveal.backbones.adapter import Plan
from foveal.backbones.clip_weights import ARCHS, arch_of, from_transformers, load_clip
from foveal.core.errors import BackboneError
from foveal.core.preprocessing import Preprocessing
from foveal.ship.zero_shot import of_towers

SIDE = 32
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": SIDE, "patch_size": 16}
CONFIG = {
    "model_type": "clip",
    "projection_dim": 12,
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": 16, "hidden_act": "quick_gelu",
    },
    "text_config": {
        "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
        "vocab_size": 259, "max_position_embeddings": 20, "hidden_act": "quick_gelu", "eos_token_id": 258,
        "bos_token_id": 257, "pad_token_id": 0,
    },
}  # fmt: skip


def plan(arch: str = "vit_base_patch32_clip_quickgelu_224") -> Plan:
    return Plan("small", arch, SMALL, Preprocessing(SIDE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 32, "folder small")


def test_it_answers_as_transformers_clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"})).eval()
    towers = from_transformers(CONFIG, theirs.state_dict(), "bytes", plan())
    images = torch.randn(3, 3, SIDE, SIDE)
    ids, mask = towers.text.tokens(["a cat", "a longer text"])
    with torch.inference_mode():
        found = theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long())
        assert torch.allclose(towers.encode_images(images), F.normalize(found.image_embeds, dim=1), atol=1e-5)
        assert torch.allclose(towers.encode_texts(ids, mask), F.normalize(found.text_embeds, dim=1), atol=1e-5)
        assert torch.allclose(
            towers.classifier(towers.encode_texts(ids, mask))(images), found.logits_per_image, atol=1e-3
        )
    assert not any(p.requires_grad for p in towers.parameters())
    rows = of_towers(towers, "a cat,a dog").predict(
        [images.numpy().astype("uint8")[0].transpose(1, 2, 0)], device="cpu"
    )
    assert rows[0]["label"] in ("a cat", "a dog")
    with pytest.raises(BackboneError, match=r"trained with quick_gelu .* vit_base_patch32_clip_224 computes gelu"):
        from_transformers(CONFIG, theirs.state_dict(), "bytes", plan("vit_base_patch32_clip_224"))
    lacking = {name: value for name, value in theirs.state_dict().items() if "post_layernorm" not in name}
    with pytest.raises(BackboneError, match=r"do not fit its config\.json"):
        from_transformers(CONFIG, lacking, "bytes", plan())


def test_the_image_tower_is_found_by_its_shape():
    vision = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "image_size": 224,
        "hidden_act": "quick_gelu",
    }
    assert arch_of(vision) == "vit_base_patch32_clip_quickgelu_224"
    assert arch_of({**vision, "hidden_act": "gelu"}) == "vit_base_patch32_clip_224"
    with pytest.raises(BackboneError, match=r"\(768, 12, 32, 225\) is known: expected vit_base"):
        arch_of({**vision, "image_size": 225})
    import timm

    assert all(timm.is_model(arch.format(act)) for arch in ARCHS.values() for act in ("", "_quickgelu"))


def test_folders_that_hold_no_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BackboneError, match="no CLIP model in"):
        load_clip(str(tmp_path))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}), "utf-8")
    with pytest.raises(BackboneError, match="holds a model of type siglip: expected clip"):
        load_clip(str(tmp_path))
    with pytest.raises(BackboneError, match="no CLIP model 'nowhere': expected a folder, or OWNER/NAME"):
        load_clip("nowhere")
    with pytest.raises(BackboneError, match="not on this machine, and foveal is offline"):
        load_clip("openai/clip-vit-base-patch32", offline=True)
