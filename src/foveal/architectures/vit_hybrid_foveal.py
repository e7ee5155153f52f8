"""A small hybrid ViT that EfficientNet-Lite0 can teach on one machine, for methods that need tokens.

`vit_hybrid_foveal` is timm's hybrid ViT (Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1): the convolutions of
EfficientNet-Lite0 up to stride 32 make a 7 x 7 map of 320 channels at 224 pixels, a 1 x 1 convolution makes it 49
tokens, and a class token reads them through six transformer blocks of width 192.

Its weights come with foveal (`--backbone vit`) and need no network. `scripts/make_vit.py` made them: the convolutions
are EfficientNet-Lite0's own, frozen; the tokens begin as the principal axes of what these see, the class token as their
mean; and the blocks learnt to say what Lite0 says of the same view, its pooled features, their neighbours and its
logits, on crops of a few photos and of procedural pictures (Asano and Saeed 2023, arXiv 2112.00725, show how far views
of one large picture carry). Blocks that began at random, taught in the same way on three times the views, had been no
better than untaught ones and poor on digits; what replaced them was chosen on drawn letters and crops of photos. Digits
had been looked at before, so they are not quite unseen data for it. Its features are as good as Lite0's on them, on
solar cells and on textiles, and better than those of untaught blocks; prompts (`vpt`) stayed behind a linear head on
them, with few images and with all (see the card).

When not to use it: as a frozen feature extractor, for EfficientNet-Lite0 itself is faster and at least as good; with a
network at hand, for a ViT pretrained on real pictures.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from timm.layers.hybrid_embed import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer

from foveal.architectures._registry import register_model

default_cfgs = generate_default_cfgs(
    {
        "vit_hybrid_foveal": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.backbone.conv_stem",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_hybrid_foveal(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """EfficientNet-Lite0 to stride 32, then six blocks of width 192: 5.9 million parameters."""
    channels = kwargs.get("in_chans", 3)
    trunk = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=[4], in_chans=channels)
    shape: dict[str, Any] = {"embed_dim": 192, "depth": 6, "num_heads": 3, "patch_size": 1}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_hybrid_foveal",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, "embed_layer": partial(HybridEmbed, backbone=trunk), **kwargs},
    )
