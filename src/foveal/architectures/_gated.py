"""Gated positional self-attention of ConViT (d'Ascoli et al., ICML 2021, arXiv 2103.10697), and how local it is."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.convit import GPSA, MHSA
from torch import Tensor, nn

from foveal.core.errors import BackboneError


def local_start(heads: int, strength: float) -> Tensor:
    """v_h of every head at the start, [H, 3] for (dx, dy, dx^2 + dy^2); `strength` is alpha (section 3.2).

    Head h of a K x K grid looks at offset (h // K, h % K) - (K - 1) / 2; heads beyond K^2 look at offset 0.
    """
    side = math.isqrt(heads)
    cells = [(head // side - (side - 1) / 2, head % side - (side - 1) / 2) for head in range(side**2)]
    cells += [(0.0, 0.0)] * (heads - side**2)
    return strength * torch.tensor([[2 * dx, 2 * dy, -1.0] for dx, dy in cells])


def position_softmax(weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The softmax of w_h . (dx, dy, dx^2 + dy^2) + b_h over the grid as two factors, [H, h, h] and [H, w, w].

    Args:
        weight: [H, 3].
        bias: [H]; the softmax does not depend on it.
    """
    factors: list[Tensor] = []
    for length, linear in zip(grid, (weight[:, 1], weight[:, 0]), strict=True):
        at = torch.arange(length, dtype=weight.dtype, device=weight.device)
        offset = at[None, :] - at[:, None]
        scores = linear[:, None, None] * offset + weight[:, 2, None, None] * offset.square() + bias[:, None, None]
        factors.append(scores.softmax(-1))
    return factors[0], factors[1]


def outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Factors [H, h, h] and [H, w, w] -> the attention they stand for, [H, N, N]."""
    return torch.einsum("aik,ajl->aijkl", rows, columns).flatten(3).flatten(1, 2)


class GatedAttention(nn.Module):
    """Content and position mixed by a gate a head, on the patches of one grid: [B, h w, C] -> the same.

    A_h = (1 - sigma(lambda_h)) softmax(q k^T / sqrt(d)) + sigma(lambda_h) softmax_j(v_h . (dx, dy, dx^2 + dy^2)).

    Parameters have the names of timm's `GPSA`.

    Args:
        num_heads: H, a square, or the heads left over start on the centre.
        grid: (h, w); may be set anew, nothing is stored that depends on it.
        locality_strength: alpha, above 0.
        gate: lambda at the start.

    Raises:
        BackboneError: heads that do not divide the channels, an alpha of 0 or less; another number of tokens than the
            grid has, or a mask.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        gate: float = 1.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise BackboneError(f"convit: {num_heads} heads do not divide {dim} channels")
        if locality_strength <= 0:
            raise BackboneError(f"convit: locality strength {locality_strength}: expected a number above 0")
        self.num_heads, self.grid = num_heads, grid
        self.locality_strength, self.start_gate = locality_strength, gate
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.full((num_heads,), float(gate)))
        self.local_init()

    @torch.no_grad()
    def local_init(self) -> None:
        """The start of a net from nothing: the identity as values, and every head on its offset."""
        nn.init.eye_(self.v.weight)
        nn.init.zeros_(self.pos_proj.bias)
        self.pos_proj.weight.copy_(local_start(self.num_heads, self.locality_strength))
        side = math.isqrt(self.num_heads)
        if side**2 != self.num_heads:
            warnings.warn(
                f"convit: {self.num_heads} heads are no square: {side**2} start on a {side} x {side} grid of offsets, "
                f"the other {self.num_heads - side**2} on its centre",
                stacklevel=2,
            )

    def content(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patches -> queries and keys [B, H, N, d]."""
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k)

    def positions(self) -> tuple[Tensor, Tensor]:
        """The position attention as factors [H, h, h] and [H, w, w]."""
        return position_softmax(self.pos_proj.weight, self.pos_proj.bias, self.grid)

    def get_attention(self, x: Tensor) -> Tensor:
        """Patches [B, N, C] -> A, [B, H, N, N], before dropout."""
        q, k = self.content(x)
        gate = self.gating_param.sigmoid()[:, None, None]
        return (1 - gate) * (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) + gate * outer(
            *self.positions()
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        height, width = self.grid
        if x.shape[1] != height * width:
            raise BackboneError(
                f"{x.shape[1]} tokens on a grid of {height}x{width} = {height * width} patches: gated attention takes "
                "all patches of its grid and nothing else; after a change of resolution set `grid`"
            )
        if attn_mask is not None or is_causal:
            raise BackboneError("a mask was given: gated attention looks at every patch")
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.training and self.attn_drop.p > 0:
            out = self.attn_drop(self.get_attention(x)) @ v
        else:
            gate = self.gating_param.sigmoid()[:, None, None]
            rows, columns = self.positions()
            local = rows @ (columns[:, None] @ v.unflatten(2, self.grid)).flatten(3)
            local = local.unflatten(3, (width, -1)).flatten(2, 3)
            out = (1 - gate) * F.scaled_dot_product_attention(*self.content(x), v) + gate * local
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


@dataclass(frozen=True)
class HeadLocality:
    """How one head of one layer looks around; both count from 0."""

    layer: int
    head: int
    gate: float | None
    """sigma(lambda), the share of position attention in [0, 1]; None in a plain layer."""
    distance: float
    """Mean over images and patches i of sum_j A_ij |j - i|, in patches."""
    start: float | None
    """The same before training; None in a plain layer unless the model at its start was given."""
    entropy: float
    """Mean over images and patches of the entropy of A_i, in nats; log N if it looks everywhere alike."""


@dataclass(frozen=True)
class Locality:
    """What `locality` found; printed, a table with a row for every head."""

    grid: tuple[int, int]
    images: int
    heads: tuple[HeadLocality, ...]

    def gates(self) -> list[float]:
        """Mean sigma(lambda) over the heads of every gated layer, from early to late."""
        layers: dict[int, list[float]] = {}
        for each in self.heads:
            if each.gate is not None:
                layers.setdefault(each.layer, []).append(each.gate)
        return [sum(found) / len(found) for found in layers.values()]

    def __str__(self) -> str:
        height, width = self.grid
        most = math.log(height * width)
        lines = [
            f"{self.images} images, {height}x{width} patches; distances in patches, entropy in nats up to {most:.2f}",
            "layer  head   gate  distance  at start  entropy",
        ]
        for each in self.heads:
            gate, start = ("-" if value is None else f"{value:.2f}" for value in (each.gate, each.start))
            lines.append(
                f"{each.layer:5d}  {each.head:4d}  {gate:>5}  {each.distance:8.2f}  {start:>8}  {each.entropy:7.2f}"
            )
        return "\n".join(lines)


def attention_distance(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention [..., N, N] over a grid of N patches -> sum_j A_ij |j - i| of every patch i, [..., N], in patches."""
    at = torch.cartesian_prod(*(torch.arange(side, dtype=attention.dtype, device=attention.device) for side in grid))
    return (attention * torch.cdist(at, at)).sum(-1)


def locality(model: nn.Module, images: Tensor, start: nn.Module | None = None) -> Locality:
    """How far every head of a ConViT, or of a model of `localize`, looks on these images, now and at its start.

    Plain layers are measured on their attention between patches, each row scaled to sum 1.

    Args:
        model: anything that holds gated layers, timm's own among them; runs as a copy in eval mode.
        images: [B, C, H, W], normalised as the model expects.
        start: the model before training, measured on the same images. Without it a gated layer's start is the one that
            it was made with, and content attention that looks everywhere alike.

    Raises:
        BackboneError: no gated layer, or a `start` of another shape.
    """
    grid, now = observe(model, images)
    before = None if start is None else observe(start, images)
    if before is not None and (before[0] != grid or [len(a[1]) for a in before[1]] != [len(a[1]) for a in now]):
        raise BackboneError("the model at its start has other layers, heads or patches: give the same model untrained")
    heads: list[HeadLocality] = []
    for layer, (gates, distance, entropy, made) in enumerate(now):
        first = made if before is None else before[1][layer][1]
        for head in range(len(distance)):
            heads.append(
                HeadLocality(
                    layer, head, None if gates is None else float(gates[head]), float(distance[head]),
                    None if first is None else float(first[head]), float(entropy[head]),
                )
            )  # fmt: skip
    return Locality(grid, len(images), tuple(heads))


Seen = tuple[Tensor | None, Tensor, Tensor, Tensor | None]
"""Of a layer: gates, distances, entropies and distances at its start, [H] each."""


def observe(model: nn.Module, images: Tensor) -> tuple[tuple[int, int], list[Seen]]:
    """The grid of patches, and what every attention layer of a model does on it, in the order of their calls."""
    grid: list[tuple[int, int]] = []
    seen: list[Seen] = []

    def look(layer: Any, given: tuple[Tensor, ...], _: Any) -> None:
        x, gates, made = given[0], None, None
        if hasattr(layer, "gating_param"):
            side = math.isqrt(x.shape[1])
            grid[:] = [getattr(layer, "grid", (side, side))]
            attention = layer.get_attention(x)
            gates, made = layer.gating_param.sigmoid(), made_with(layer, grid[0]).to(x)
        elif not grid:
            return
        else:
            count = math.prod(grid[0])
            attention = plain_attention(layer, x)[..., -count:, -count:]
            attention = attention / attention.sum(-1, keepdim=True)
        attention = attention.float()
        distance, entropy = attention_distance(attention, grid[0]), torch.special.entr(attention).sum(-1)
        seen.append((gates, distance.mean((0, 2)), entropy.mean((0, 2)), made))

    probe = copy.deepcopy(model).eval()
    for module in probe.modules():
        if isinstance(module, GatedAttention | GPSA | MHSA | Attention):
            module.register_forward_hook(look)
    with torch.no_grad():
        probe(images)
    if not grid:
        raise BackboneError(f"{type(model).__name__} has no gated attention: take a convit_*, or localize(vit)")
    return grid[0], seen


def plain_attention(layer: Any, x: Tensor) -> Tensor:
    """Tokens [B, N, C] -> the attention [B, H, N, N] of timm's plain layers."""
    q, k, _ = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if hasattr(layer, "q_norm"):
        q, k = layer.q_norm(q), layer.k_norm(k)
    return (q @ k.transpose(-2, -1) * layer.scale).softmax(-1)


def made_with(layer: Any, grid: tuple[int, int]) -> Tensor:
    """Mean distances [H] of a gated layer at its start, its content attention uniform."""
    share = torch.tensor(getattr(layer, "start_gate", 1.0)).sigmoid()
    weight = local_start(layer.num_heads, layer.locality_strength)
    position = outer(*position_softmax(weight, torch.zeros(layer.num_heads), grid))
    mixed = (1 - share) / math.prod(grid) + share * position
    return attention_distance(mixed, grid).mean(-1)
