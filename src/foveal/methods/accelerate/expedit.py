"""Expedit (Liang et al., NeurIPS 2022, arXiv 2210.01035): neighbouring tokens become clusters midway, and tokens again.

After `after` blocks the H x W patch tokens z_p are gathered into h x w clusters by a few rounds of soft k-means that
starts from average pooling and looks at `window` x `window` clusters around each token,

    a_pi = softmax_i(-tau |z_p - s_i|^2),    s_i = sum_p a_pi z_p / sum_p a_pi,

the next blocks run on the clusters, and from what became of them, s', the full grid is rebuilt:

    z'_p = sum_i w_pi s'_i,    w_pi = exp(-tau |z_p - s_i|^2) over the k nearest clusters, normalised to sum 1.

No parameters and no training. A block costs 12 M d^2 + 2 M^2 d instead of 12 N d^2 + 2 N^2 d. It needs a plain ViT.

Departures: the repository normalises w to length 1 (`norm=l2`), which scales equal tokens by up to sqrt(k). Where
a classifier reads the class token alone and clusters stay to the end, nothing is rebuilt unless `dense=true`. Swin,
which the paper treats too, is refused, as are positions fixed inside attention: their tables do not fit the clusters.

When not to use it: on CNNs; on few tokens (14 x 14 leave little to gain, and clustering costs some of it); with
clusters from the first blocks on, which loses accuracy quickly. Measure: `foveal shrink` times before and after.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from foveal.backbones.tokens import TokenHook
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.shrink import Accelerate, Shrunk, Target, TaskData
from foveal.core.method import Classifier, Spec, method
from foveal.core.options import option, options

Grid = tuple[int, int]
SIDE = 0.7
"""Side of the cluster grid in tokens, by default: 40 become 28, as in the paper."""


def pooling(full: Grid, small: Grid) -> Float[Tensor, "M N"]:
    """Adaptive average pooling of a grid of H x W tokens to h x w, as a matrix."""

    def along(length: int, cells: int) -> Tensor:
        weight = torch.zeros(cells, length)
        for cell in range(cells):
            start, stop = cell * length // cells, -(-(cell + 1) * length // cells)
            weight[cell, start:stop] = 1 / (stop - start)
        return weight

    return torch.kron(along(full[0], small[0]), along(full[1], small[1]))


def allowed(full: Grid, small: Grid, window: int) -> Bool[Tensor, "N M"]:
    """Which clusters a token may join: those at most (window - 1) / 2 rows and columns from its own."""

    def along(length: int, cells: int) -> Tensor:
        own = torch.arange(length) * cells // length
        return (own[:, None] - torch.arange(cells)).abs() <= (window - 1) // 2

    rows, columns = along(full[0], small[0]), along(full[1], small[1])
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def distances(z: Float[Tensor, "B N C"], s: Float[Tensor, "B M C"]) -> Float[Tensor, "B N M"]:
    """|z_p - s_i|^2, by one matrix product."""
    return (z.square().sum(2, keepdim=True) + s.square().sum(2)[:, None] - 2 * z @ s.transpose(1, 2)).clamp_min(0)


def cluster(
    z: Float[Tensor, "B N C"],
    pool: Float[Tensor, "M N"],
    barrier: Float[Tensor, "N M"],
    iterations: int,
    tau: float,
) -> Float[Tensor, "B M C"]:
    """Tokens -> clusters. `barrier` is 0 where a token may join a cluster and -inf where not."""
    s = pool @ z
    for _ in range(iterations):
        a = torch.softmax(barrier - tau * distances(z, s), 2)
        s = (a.transpose(1, 2) @ z) / a.sum(1)[..., None].clamp_min(1e-16)
    return s


def reconstruct(
    z: Float[Tensor, "B N C"],
    s: Float[Tensor, "B M C"],
    refined: Float[Tensor, "B M C"],
    nearest: int,
    tau: float,
    norm: str = "sum",
) -> Float[Tensor, "B N C"]:
    """Refined clusters -> tokens. `z` and `s` are tokens and clusters before the refinement."""
    logits = -tau * distances(z, s)
    closeness, index = logits.topk(nearest, 2)
    w = torch.exp(closeness - closeness[..., :1])  # the nearest first: none is lost to underflow
    w = w / (w.sum(2, keepdim=True) if norm == "sum" else w.norm(dim=2, keepdim=True))
    return torch.zeros_like(logits).scatter(2, index, w) @ refined


class Clusters(TokenHook):
    """Clusters from `start` blocks on, until `stop` blocks are done; `rebuilds` the grid there."""

    pool: Tensor
    barrier: Tensor

    def __init__(
        self, prefix: int, full: Grid, small: Grid, start: int, stop: int, rebuilds: bool, chosen: Any
    ) -> None:
        super().__init__()
        self.prefix, self.start, self.stop, self.rebuilds = prefix, start, stop, rebuilds
        self.iterations, self.tau, self.norm = chosen.iterations, chosen.tau, chosen.norm
        self.nearest = min(chosen.nearest, math.prod(small))
        barrier = torch.zeros(math.prod(full), math.prod(small))
        barrier.masked_fill_(~allowed(full, small, chosen.window), -torch.inf)
        self.register_buffer("pool", pooling(full, small), persistent=False)
        self.register_buffer("barrier", barrier, persistent=False)

    def forward(self, done: int, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        first, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        if done == self.start:
            state["tokens"] = patches
            state["clusters"] = cluster(patches, self.pool, self.barrier, self.iterations, self.tau)
            return torch.cat([first, state["clusters"]], 1)
        if done == self.stop and self.rebuilds:
            rebuilt = reconstruct(state["tokens"], state["clusters"], patches, self.nearest, self.tau, self.norm)
            return torch.cat([first, rebuilt], 1)
        return tokens


@options
class Options:
    """What `expedit` can be told."""

    after: int | None = option(None, "blocks that run on all tokens first; default: 0.4 of them", ge=0, le=1000)
    blocks: int | None = option(None, "blocks that run on clusters then; default: all that are left", ge=1, le=1000)
    height: int | None = option(None, "rows of clusters; default: 0.7 of the rows of tokens", ge=1, le=1000)
    width: int | None = option(None, "columns of clusters; default: 0.7 of the columns of tokens", ge=1, le=1000)
    window: int = option(5, "side of the square of clusters a token may join; odd", ge=1, le=99)
    iterations: int = option(5, "rounds of clustering; 0 is average pooling", ge=0, le=100)
    tau: float = option(0.02, "how sharply the nearest clusters are preferred", gt=0, le=1e6)
    nearest: int = option(20, "k: clusters that a token is rebuilt from", ge=1, le=10_000)
    norm: Literal["sum", "l2"] = option("sum", "what the weights of a rebuilt token come to: a sum or a length of 1")
    dense: bool = option(False, "rebuild all tokens at the end even where only the class token is read")


@method(
    Spec(
        family="accelerate",
        title="Expedit",
        year=2022,
        arxiv="2210.01035",
        needs=frozenset({"tokens"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Expedit(Accelerate):
    targets = ("macs", "latency")

    def shrink(self, model: Classifier, data: TaskData | None, target: Target | None) -> Shrunk:
        """
        Raises:
            BackboneError: not a plain ViT, or its tokens form no grid.
            UsageError: options that do not fit its blocks and tokens, or a target out of reach.
        """
        full, depth = layout(model)
        start, stop = self.span(depth)
        small = self.grid(full) if target is None else self.reach(model, full, start, stop, target)
        plan = {"tokens": list(full), "clusters": list(small), "start": start, "stop": stop}
        made = self.rebuild(copy.deepcopy(model), plan)
        if self.options.nearest > math.prod(small) and cast(Any, made.backbone).token_hook.rebuilds:
            warnings.warn(
                f"nearest={self.options.nearest}: there are {math.prod(small)} clusters, all serve", stacklevel=2
            )
        return Shrunk(made, plan, notes(plan))

    def rebuild(self, model: Classifier, plan: Mapping[str, Any]) -> Classifier:
        """
        Raises:
            BackboneError: not a plain ViT.
            UsageError: a plan for other tokens or blocks.
        """
        full, depth = layout(model)
        small, start, stop = tuple(plan["clusters"]), plan["start"], plan["stop"]
        fits = list(full) == plan["tokens"] and 0 <= start < stop <= depth
        if not fits or not smaller(small, full):
            raise UsageError(f"the plan of {self.name} is for other tokens or blocks than {full} and {depth}")
        backbone: Any = model.backbone
        rebuilds = stop < depth or self.options.dense or not backbone.reads_class_token
        backbone.token_hook = Clusters(backbone.prefix, full, small, start, stop, rebuilds, self.options)
        return model.eval()

    def frontier(self, model: Classifier) -> dict[str, Classifier]:
        """Cluster grids of 0.9, 0.7, 0.5 and 0.35 of the side, all else as chosen."""
        full, depth = layout(model)
        start, stop = self.span(depth)
        made: dict[str, Classifier] = {}
        for share in (0.9, 0.7, 0.5, 0.35):
            small = scaled(full, share)
            plan = {"tokens": list(full), "clusters": list(small), "start": start, "stop": stop}
            if smaller(small, full):
                made[f"{small[0]} x {small[1]}"] = self.rebuild(copy.deepcopy(model), plan)
        return made

    def span(self, depth: int) -> tuple[int, int]:
        """How many blocks are done when clusters come, and when they go."""
        chosen: Options = self.options
        start = round(0.4 * depth) if chosen.after is None else chosen.after
        stop = depth if chosen.blocks is None else start + chosen.blocks
        if start >= depth:
            raise UsageError(f"after={start}: the model has {depth} blocks, expected 0 to {depth - 1}")
        if stop > depth:
            raise UsageError(f"blocks={chosen.blocks}: {depth - start} blocks are left after {start}")
        if chosen.window % 2 == 0:
            raise UsageError(f"window={chosen.window}: expected an odd number, such as {chosen.window + 1}")
        return start, stop

    def grid(self, full: Grid) -> Grid:
        chosen: Options = self.options
        rows, columns = scaled(full, SIDE)
        small = (chosen.height or rows, chosen.width or columns)
        if not smaller(small, full):
            raise UsageError(
                f"{small[0]} x {small[1]} clusters for {full[0]} x {full[1]} tokens: expected fewer, and no more rows "
                "or columns than there are"
            )
        return small

    def reach(self, model: Classifier, full: Grid, start: int, stop: int, target: Target) -> Grid:
        """The largest grid of clusters that meets the target, all else as chosen; found by bisection."""
        if self.options.height or self.options.width:
            raise UsageError(f"a target of {target.quantity} chooses the clusters: leave out height and width")
        grids = sorted({scaled(full, side / max(full)) for side in range(1, max(full))}, key=math.prod)
        grids = [grid for grid in grids if smaller(grid, full)]

        def share(small: Grid) -> float:
            plan = {"tokens": list(full), "clusters": list(small), "start": start, "stop": stop}
            return target.measure(self.rebuild(copy.deepcopy(model), plan))

        least = share(grids[0])
        if least > target.share:
            raise UsageError(
                f"{target.quantity}={target.share:g} is out of reach: {grids[0][0]} x {grids[0][1]} clusters after "
                f"{start} of the blocks leave {least:.2f}; use a smaller after="
            )
        return last_that(lambda small: share(small) <= target.share, grids)


def last_that(holds: Callable[[Grid], bool], grids: list[Grid]) -> Grid:
    """The last of `grids` for which it holds, when it holds for the first and then no more from some place on."""
    low, high = 0, len(grids)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(grids[middle]) else (low, middle)
    return grids[low]


def smaller(small: Any, full: Grid) -> bool:
    return (
        len(small) == 2
        and all(isinstance(side, int) and 1 <= side <= most for side, most in zip(small, full, strict=True))
        and math.prod(small) < math.prod(full)
    )


def scaled(full: Grid, share: float) -> Grid:
    return max(1, int(share * full[0] + 1e-9)), max(1, int(share * full[1] + 1e-9))


def layout(model: Classifier) -> tuple[Grid, int]:
    """Rows and columns of patch tokens, and the number of blocks.

    Raises:
        BackboneError: not a plain ViT as it comes, or its tokens form no grid.
    """
    backbone: Any = model.backbone
    if not getattr(backbone, "has_tokens", False):
        raise BackboneError(
            f"expedit needs one sequence of tokens whose number may change; {backbone.arch} ({backbone.family}) has "
            "windows, positions fixed inside attention, or none: use a plain ViT such as vit, which comes with foveal"
        )
    if type(model).features is not Classifier.features or backbone.token_hook is not None:
        raise BackboneError(f"the tokens of this {backbone.arch} are already changed on their way: expedit comes first")
    size = backbone.preprocessing.size
    like = next(backbone.parameters())
    with torch.no_grad():
        count = backbone.embed(like.new_zeros(1, 3, size, size)).shape[1] - backbone.prefix
    full = backbone.grid((size, size)) or (math.isqrt(count), math.isqrt(count))
    if math.prod(full) != count:
        raise BackboneError(f"the {count} patch tokens of {backbone.arch} form no grid of {full[0]} x {full[1]}")
    return full, len(backbone.blocks)


def notes(plan: Mapping[str, Any]) -> dict[str, Any]:
    tokens, clusters = ("{} x {}".format(*plan[key]) for key in ("tokens", "clusters"))
    return {"tokens": tokens, "clusters": clusters, "blocks": f"{plan['start'] + 1} to {plan['stop']}"}
