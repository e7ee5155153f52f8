"""Published CLIP weights in transformers' layout -> the same towers in foveal's, without transformers.

The image tower becomes timm's, the language tower `CausalText`; the tokenizer is the checkpoint's own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from foveal.backbones.adapter import Backbone, Plan, build
from foveal.backbones.causal_text import CausalText
from foveal.backbones.towers import Towers
from foveal.backbones.weights import hub_file, read_tensors
from foveal.core.errors import BackboneError
from foveal.core.preprocessing import Preprocessing

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ARCHS: dict[tuple[int, ...], str] = {
    (768, 12, 32, 224): "vit_base_patch32_clip{}_224",
    (768, 12, 16, 224): "vit_base_patch16_clip{}_224",
    (1024, 24, 14, 224): "vit_large_patch14_clip{}_224",
    (1024, 24, 14, 336): "vit_large_patch14_clip{}_336",
    (1280, 32, 14, 224): "vit_huge_patch14_clip{}_224",
}
"""(width, layers, patch, pixels) of an image tower -> timm's name, with `_quickgelu` in the gap or nothing."""
RENAMED = (
    (r"^vision_model\.embeddings\.patch_embedding\.", "image.model.patch_embed.proj."),
    (r"^vision_model\.pre_layrnorm\.", "image.model.norm_pre."),
    (r"^vision_model\.post_layernorm\.", "image.model.norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"image.model.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"image.model.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.fc([12])\.", r"image.model.blocks.\1.mlp.fc\2."),
    (r"^visual_projection\.", "image_proj."),
    (r"^text_model\.embeddings\.token_embedding\.", "text.token."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "text.position"),
    (r"^text_model\.final_layer_norm\.", "text.norm."),
    (r"^text_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"text.blocks.\1.norm\2."),
    (r"^text_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"text.blocks.\1.out."),
    (r"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"text.blocks.\1.up."),
    (r"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"text.blocks.\1.down."),
    (r"^text_projection\.", "text_proj."),
    (r"^logit_scale$", "log_scale"),
)
JOINED = {"vision_model": "image.model.blocks.{}.attn.qkv.{}", "text_model": "text.blocks.{}.qkv.{}"}


def renamed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's state dict under the names of `Towers`; queries, keys and values become one matrix."""
    found: dict[str, Tensor] = {}
    for name, tensor in given.items():
        for pattern, to in RENAMED:
            new, count = re.subn(pattern, to, name)
            if count:
                found[new] = tensor
    for tower, to in JOINED.items():
        for name in given:
            if match := re.fullmatch(rf"{tower}\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
                parts = [given[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[to.format(*match.groups())] = torch.cat(parts)
    prefix = "vision_model.embeddings."
    found["image.model.cls_token"] = given[f"{prefix}class_embedding"].reshape(1, 1, -1)
    found["image.model.pos_embed"] = given[f"{prefix}position_embedding.weight"][None]
    found["log_scale"] = found["log_scale"].reshape(())
    return found


def arch_of(vision: Mapping[str, Any]) -> str:
    """timm's name of the image tower that a `vision_config` describes.

    Raises:
        BackboneError: timm has none of that shape.
    """
    shape = tuple(int(vision[key]) for key in ("hidden_size", "num_hidden_layers", "patch_size", "image_size"))
    if shape not in ARCHS:
        known = ", ".join(arch.format("") for arch in ARCHS.values())
        raise BackboneError(f"no image tower of (width, layers, patch, pixels) {shape} is known: expected {known}")
    return ARCHS[shape].format("_quickgelu" if vision["hidden_act"] == "quick_gelu" else "")


def activation_of(model: Any) -> str:
    """What the blocks of a timm ViT compute between their dense layers."""
    return "quick_gelu" if type(model.blocks[0].mlp.act).__name__ == "QuickGELU" else "gelu"


def from_transformers(config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: str, plan: Plan) -> Towers:
    """Towers with a CLIPModel's weights, frozen and in eval mode.

    Args:
        config: of the CLIPModel.
        tokenizer: JSON of its tokenizer, or 'bytes'.
        plan: of the timm image tower.

    Raises:
        BackboneError: weights trained with one activation for towers that compute another, or of other shapes.
    """
    vision, words = config["vision_config"], config["text_config"]
    image = Backbone(plan, build(plan))
    computes = activation_of(image.model)
    if vision["hidden_act"] != computes or words["hidden_act"] not in ("quick_gelu", "gelu"):
        raise BackboneError(
            f"these weights were trained with {vision['hidden_act']} (images) and {words['hidden_act']} (texts), "
            f"{plan.arch} computes {computes}: answers would be wrong without a sign of it; choose the architecture "
            "with the same activation"
        )
    text = CausalText(
        words["hidden_size"],
        words["num_hidden_layers"],
        context=words["max_position_embeddings"],
        vocabulary=words["vocab_size"],
        tokenizer=tokenizer,
        activation=words["hidden_act"],
        heads=words["num_attention_heads"],
    )
    text.origin = plan.origin
    towers = Towers(image, text, config["projection_dim"])
    try:
        towers.load_state_dict({name: tensor.float() for name, tensor in renamed(tensors).items()})
    except (RuntimeError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise BackboneError(f"the weights of {plan.name} do not fit its config.json ({reason})") from None
    return towers.requires_grad_(False).eval()


def load_clip(name: str, *, offline: bool = False) -> Towers:
    """CLIP's towers: from a folder with config.json, tokenizer.json and model.safetensors, or OWNER/NAME of the Hub.

    Raises:
        BackboneError: not there, no CLIP with a ViT, or see `from_transformers`.
    """
    folder = Path(os.path.expanduser(name))
    names = ("config.json", "tokenizer.json", "model.safetensors")
    if folder.is_dir():
        files = [folder / each for each in names]
    elif name.count("/") == 1:
        files = [hub_file(name, name, (each,), offline=offline) for each in names]
    else:
        raise BackboneError(
            f"no CLIP model '{name}': expected a folder, or OWNER/NAME such as openai/clip-vit-base-patch32"
        )
    try:
        config = json.loads(files[0].read_text("utf-8"))
        tokenizer = files[1].read_text("utf-8")
    except (OSError, ValueError) as error:
        raise BackboneError(f"no CLIP model in {name} ({error}): expected {', '.join(names)}") from None
    if config.get("model_type") != "clip":
        raise BackboneError(f"{name} holds a model of type {config.get('model_type')}: expected clip")
    arch = arch_of(config["vision_config"])
    size = int(config["vision_config"]["image_size"])
    origin = f"folder {folder.name}" if folder.is_dir() else f"hub:{name}"
    plan = Plan(
        name, arch, {}, Preprocessing(size, MEAN, STD, "bicubic", 1.0), int(config["vision_config"]["hidden_size"]),
        origin,
    )  # fmt: skip
    return from_transformers(cast("dict[str, Any]", config), read_tensors(files[2]), tokenizer, plan)
