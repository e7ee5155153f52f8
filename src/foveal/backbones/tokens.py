"""What may happen to the tokens of a plain ViT between its blocks: tokens merged, dropped, put back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class TokenHook(nn.Module, ABC):
    """Changes the token sequence between blocks; a `Backbone` calls the one it has as its `token_hook`.

    It has no parameters and no persistent buffers, so that the weights of the network stay what they are. What it must
    remember from one block to a later one it keeps in `state`, which belongs to one forward pass: passes in several
    threads do not meet, copies and exports need no care, and nothing is left behind.
    """

    @abstractmethod
    def forward(self, done: int, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Tokens [B, N, d] after `done` blocks (0: before the first) -> what the next block, or the final norm, reads.

        Tokens may leave by being left out, or stay and be marked in `state["seen"]` [B, N] (bool): blocks attend to
        marked ones alone. Both give the marked tokens the same values; the second keeps a batch rectangular when each
        image keeps another number.
        """


class Marked(TokenHook):
    """Another hook, with the tokens it leaves out kept at the end of the sequence, unseen, until its next change.

    The slow twin of the hook, which tests hold against it.
    """

    def __init__(self, hook: TokenHook) -> None:
        super().__init__()
        self.hook = hook

    def forward(self, done: int, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        own = state.setdefault("own", {})
        seen = state.get("length", tokens.shape[1])
        changed = self.hook(done, tokens[:, :seen], own)
        length, full = changed.shape[1], tokens.shape[1]
        if length >= full:
            state.pop("seen", None)
            state["length"] = length
            return changed
        state["length"] = length
        state["seen"] = (torch.arange(full, device=tokens.device) < length).expand(len(tokens), full)
        return torch.cat([changed, tokens[:, length:]], 1)


def attention_mask(seen: Tensor, like: Tensor) -> Tensor:
    """Which tokens are seen [B, N] -> what is added to attention before its softmax [B, 1, 1, N]."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, -torch.inf)[:, None, None]
