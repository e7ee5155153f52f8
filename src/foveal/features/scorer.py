"""Scores of images by the fastest session: for explanations and audits that ask a model thousands of times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveal.backbones.adapter import Backbone
from foveal.backbones.wrapper import Scorer
from foveal.features.session import feature_session


def feature_scorer(backbone: Backbone, head: Callable[[Tensor], Tensor], *, device: str = "auto") -> Scorer:
    """A `Scorer` of a frozen backbone and a head; no gradients.

    Args:
        head: features [B, D], on the images' device -> scores [B, C].
        device: where the backbone runs: 'auto', 'cpu' or 'cuda'.
    """
    session = feature_session(backbone, device=device, fractions=True)

    @torch.inference_mode()
    def score(images: Tensor) -> Tensor:
        pixels = (images * 255).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return head(torch.from_numpy(session(pixels)).to(images.device))

    return Scorer(score, backbone.preprocessing.mean, max(16, session.batch * session.threads))
