"""CLIP's language tower (Radford et al., 2021, arXiv 2103.00020): a causal transformer read at the end of the text.

Its tokens are those of a tokenizer, or simply the bytes of the text in lower case, which needs no vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.text import SentenceEncoder, TextTower, check_heads, codec
from foveal.core.errors import BackboneError

Activation = Literal["quick_gelu", "gelu"]
BYTES = "bytes"
"""In place of a tokenizer: id b + 1 for byte b, and 257 and 258 around the text."""
VOCABULARY = 259
HEAD = 64
"""Numbers a head has."""


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, activation: Activation) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class CausalText(TextTower):
    """Ids [B, L] -> the state [B, width] at the end mark, which is the largest id; what comes after it is not seen.

    Args:
        tokenizer: the JSON of a `tokenizers.Tokenizer` whose end mark has the largest id, or 'bytes'.
        heads: default: one for 64 numbers.

    Raises:
        BackboneError: width not divisible by heads.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        *,
        context: int = 77,
        vocabulary: int = VOCABULARY,
        tokenizer: str = BYTES,
        activation: Activation = "quick_gelu",
        heads: int | None = None,
    ) -> None:
        super().__init__()
        heads = max(1, width // HEAD) if heads is None else heads
        check_heads(width, heads)
        self.width, self.context, self.tokenizer = width, context, tokenizer
        self.shape = {
            "width": width, "layers": layers, "context": context, "vocabulary": vocabulary, "activation": activation,
            "heads": heads,
        }  # fmt: skip
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self._codec: Any = None
        self.start()

    def start(self) -> None:
        """Random weights from torch's global generator, with the paper's deviations; biases 0."""
        width, layers = self.width, len(self.blocks)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        deep = (width * 2 * layers) ** -0.5 if layers else 0.0
        for block in self.blocks:
            assert isinstance(block, Block)
            parts = ((block.qkv, width**-0.5), (block.out, deep), (block.up, (2 * width) ** -0.5), (block.down, deep))
            for layer, deviation in parts:
                nn.init.normal_(layer.weight, std=deviation)
                nn.init.zeros_(layer.bias)

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        plain = [" ".join(text.lower().split()) for text in texts]
        if self.tokenizer == BYTES:
            return [[257, *(byte + 1 for byte in text.encode()), 258] for text in plain]
        if self._codec is None:
            self._codec = codec(self.tokenizer)
        return [list(each.ids) for each in self._codec.encode_batch(plain)]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.token(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        end = ids.argmax(1)[:, None, None].expand(-1, 1, self.width)
        return self.norm(x.gather(1, end)[:, 0])


def rebuild_text(described: Mapping[str, Any], tokenizer: str, *, most: int | None = None) -> TextTower:
    """The language tower that `describe_text` told of, with random weights.

    Args:
        most: how many numbers its weights may hold.

    Raises:
        BackboneError: no such tower, or one with too many weights.
    """

    def make() -> TextTower:
        shape = dict(described["shape"])
        if described["kind"] == "sentence":
            return SentenceEncoder(shape, tokenizer, int(described["context"]))
        if described["kind"] == "causal":
            return CausalText(shape.pop("width"), shape.pop("layers"), tokenizer=tokenizer, **shape)
        raise BackboneError(f"no language tower '{described['kind']}': expected sentence or causal")

    with torch.device("meta"):
        numbers = sum(tensor.numel() for tensor in make().state_dict().values())
    if most is not None and numbers > most:
        raise BackboneError(f"the language tower holds {numbers:,} numbers, its weights only {most:,}")
    return make()


def describe_text(tower: TextTower) -> dict[str, Any]:
    """Plain data from which `rebuild_text` makes the same tower, given its tokenizer."""
    kind = "causal" if isinstance(tower, CausalText) else "sentence"
    return {"kind": kind, "shape": dict(tower.shape), "context": tower.context}
