"""Channels that only go together, their physical removal, and the sizes from which the result is rebuilt.

Which channels depend on which is found once, by torch-pruning on convolutional networks; in networks with attention
they are the hidden units of each MLP and the heads of each attention. Removal and rebuilding are plain slicing and need
neither torch-pruning nor a run of the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from foveal.backbones.adapter import Backbone
from foveal.core.errors import BackboneError, MissingExtra, UsageError
from foveal.core.method import Classifier

Side = Literal["out", "in"]
Sizes = dict[str, dict[str, int]]
"""Module name -> 'out', 'in' and, for attention, 'heads': what is left of it."""


@dataclass(frozen=True)
class Member:
    """One side of one module: `index` [units, k] are the channels there that go with each unit."""

    module: str
    side: Side
    index: Tensor


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one: all the channels that must go with each.

    Attributes:
        name: of the module that makes them.
        attention: name of the attention whose heads they are, or ''.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    attention: str = ""

    def parameters(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parameters that make the units, channels first, and the channels of each unit [units, k]."""
        for member in self.members:
            if member.side == "out":
                for parameter in model.get_submodule(member.module).parameters(recurse=False):
                    yield parameter, member.index


def groups(model: Classifier) -> list[Group]:
    """What can be removed from a classifier, in the order in which it runs. The first convolution keeps its width, and
    so do the features when the head is not one linear layer.

    Raises:
        BackboneError: nothing can be, the weights are stored as codes, or torch-pruning cannot follow the architecture.
        MissingExtra: torch-pruning is not installed.
    """
    backbone = cast(Backbone, model.backbone)
    layers = [module for module in backbone.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if not all(isinstance(layer.weight, nn.Parameter) for layer in layers):
        raise BackboneError(
            f"the weights of this {backbone.arch} are stored as codes: remove channels first, then code"
        )
    found = dependencies(model) if backbone.family == "cnn" else [*hidden_units(model), *heads(model)]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = sorted((group for group in found if group.units > 1), key=lambda group: order[group.name])
    if not found:
        raise BackboneError(f"{backbone.arch} has no channels that can be removed: choose another backbone")
    return found


def dependencies(model: Classifier) -> list[Group]:
    """Groups of a convolutional network, by torch-pruning."""
    try:
        import torch_pruning
    except ImportError:
        raise MissingExtra(
            "torch-pruning", "shrink", "finding the channels of a network that only go together"
        ) from None
    backbone = cast(Backbone, model.backbone)
    probe = copy.deepcopy(model).eval().requires_grad_(True)
    probe.head = nn.Linear(backbone.width, 2).to(next(probe.parameters()).device)
    side = backbone.preprocessing.size
    images = next(probe.parameters()).new_zeros(1, 3, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = torch_pruning.DependencyGraph().build_dependency(probe, example_inputs=images)
            raw = list(graph.get_all_groups(ignored_layers=[probe.head], root_module_types=[nn.Conv2d, nn.Linear]))
        except Exception as error:  # its tracer meets operations it does not know with errors of any type
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BackboneError(
                f"torch-pruning cannot follow {backbone.arch} ({reason}): choose another backbone"
            ) from None
    names: dict[nn.Module, str] = {module: name for name, module in probe.named_modules()}
    stem = next((name for name, module in probe.named_modules() if isinstance(module, nn.Conv2d)), "")
    found: list[Group] = []
    for items in raw:
        members = [member for item in items if (member := as_member(item, names, len(items[0].idxs)))]
        touched = {member.module for member in members if member.side == "out"}
        whole = all(known(item.dep.target.module) for item in items)
        if (
            whole
            and stem not in touched
            and (type(model.head) is nn.Linear or all(m.module != "head" for m in members))
        ):
            found.append(Group(next(m.module for m in members if m.side == "out"), len(items[0].idxs), tuple(members)))
    return found


def known(module: nn.Module) -> bool:
    """Whether torch-pruning's node is an operation without weights, or a module that `cut` can cut."""
    if type(module).__module__.startswith("torch_pruning"):
        return True
    if isinstance(module, nn.Conv2d):
        return module.groups in (1, module.out_channels) and (module.groups == 1 or module.in_channels == module.groups)
    return isinstance(module, nn.Linear | _BatchNorm | nn.LayerNorm)


def as_member(item: Any, names: Mapping[nn.Module, str], units: int) -> Member | None:
    module, side = item.dep.target.module, item.dep.handler.__name__
    if module not in names or side not in ("prune_out_channels", "prune_in_channels"):
        return None
    owned: list[list[int]] = [[] for _ in range(units)]
    for root, channel in zip(item.root_idxs, item.idxs, strict=True):
        owned[root].append(channel)
    return Member(names[module], "out" if side == "prune_out_channels" else "in", torch.tensor(owned))


def hidden_units(model: nn.Module) -> Iterator[Group]:
    """Of every MLP of two layers with nothing but an activation between them."""
    for name, module in model.named_modules():
        first, second = getattr(module, "fc1", None), getattr(module, "fc2", None)
        between = isinstance(getattr(module, "norm", nn.Identity()), nn.Identity)
        if all(isinstance(each, nn.Linear | nn.Conv2d) for each in (first, second)) and between:
            units = len(cast(nn.Linear, first).weight)
            if cast(nn.Linear, second).weight.shape[1] == units:
                each = torch.arange(units)[:, None]
                yield Group(
                    f"{name}.fc1", units, (Member(f"{name}.fc1", "out", each), Member(f"{name}.fc2", "in", each))
                )


def heads(model: nn.Module) -> Iterator[Group]:
    """Of every self-attention of timm's plain kind."""
    from timm.layers.attention import Attention

    for name, module in model.named_modules():
        if type(module) is Attention and module.gate is None and isinstance(module.norm, nn.Identity):
            count, width = module.num_heads, module.head_dim
            own = torch.arange(count * width).reshape(count, width)
            three = torch.cat([own + place * count * width for place in range(3)], 1)
            members = (Member(f"{name}.qkv", "out", three), Member(f"{name}.proj", "in", own))
            yield Group(f"{name}.qkv", count, members, attention=name)


def remove(model: Classifier, group: Group, units: Iterable[int], rest: Iterable[Group] = ()) -> list[Group]:
    """Take units out of a model, in place. `group` no longer describes it afterwards.

    Args:
        rest: groups that still stand for the model.

    Returns:
        These, with the places of their channels behind concatenations moved up.
    """
    chosen = sorted(set(units))
    gone: dict[tuple[str, Side], Tensor] = {}
    for member in group.members:
        module = model.get_submodule(member.module)
        kept = torch.ones(width(module, member.side), dtype=torch.bool)
        kept[member.index[chosen].flatten()] = False
        cut(module, member.side, kept.nonzero().flatten())
        gone[member.module, member.side] = (~kept).nonzero().flatten()
    if group.attention:
        set_heads(model.get_submodule(group.attention), group.units - len(chosen))
    follow_width(model)

    def moved(member: Member) -> Member:
        before = gone.get((member.module, member.side))
        return (
            member if before is None else replace(member, index=member.index - torch.searchsorted(before, member.index))
        )

    return [replace(each, members=tuple(map(moved, each.members))) for each in rest]


def width(module: Any, side: Side) -> int:
    """Channels of a module on one side."""
    return (
        module.weight.shape[1]
        if side == "in"
        else len(module.weight if module.weight is not None else module.running_var)
    )


@torch.no_grad()
def cut(module: Any, side: Side, kept: Tensor) -> None:
    """Keep only some channels of a convolution, linear layer or norm."""
    count = len(kept)
    names = ["weight"] if side == "in" else ["weight", "bias", "running_mean", "running_var"]
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            smaller = tensor.index_select(1 if side == "in" else 0, kept.to(tensor.device)).contiguous()
            parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(smaller, tensor.requires_grad) if parameter else smaller)
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1
        module.out_channels = count if side == "out" else module.out_channels
        module.in_channels = count if side == "in" or depthwise else module.in_channels
        module.groups = count if depthwise else 1
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _BatchNorm):
        module.num_features = count
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (count,)


def set_heads(attention: Any, count: int) -> None:
    attention.num_heads, attention.attn_dim = count, count * attention.head_dim


def follow_width(model: Classifier) -> None:
    """The backbone's features are as wide as what the head reads."""
    backbone, head = cast(Backbone, model.backbone), model.head
    if type(head) is nn.Linear and head.in_features != backbone.width:
        backbone.plan = replace(backbone.plan, width=head.in_features)


def sizes(model: nn.Module, like: nn.Module) -> Sizes:
    """What `resize` must be told to give `like` the structure of `model`: the modules that differ."""
    before, found = dict(like.named_modules()), Sizes()
    for name, module in model.named_modules():
        said = describe(module)
        if said and said != describe(before[name]):
            found[name] = said
    return found


def describe(module: nn.Module) -> dict[str, int]:
    attention: Any = module
    if isinstance(module, nn.Conv2d | nn.Linear):
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
        return {"out": len(module.weight)} | ({} if depthwise else {"in": module.weight.shape[1]})
    if isinstance(module, _BatchNorm):
        return {"out": module.num_features}
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return {"out": module.normalized_shape[0]}
    return {"heads": attention.num_heads} if hasattr(module, "attn_dim") and hasattr(module, "num_heads") else {}


def resize(model: Classifier, plan: Mapping[str, Mapping[str, int]]) -> None:
    """Give modules the sizes of `plan`, in place, with the first of their channels; weights are to be loaded.

    Raises:
        UsageError: a module that is not there, or a size that is not smaller than what is.
    """
    modules = dict(model.named_modules())
    for name, wanted in plan.items():
        module = modules.get(name)
        present = describe(module) if module is not None else {}
        if module is None or not wanted.keys() <= present.keys():
            raise UsageError(f"the plan resizes {name}, which this model does not have or cannot resize")
        for key, size in wanted.items():
            if type(size) is not int or not 1 <= size <= present[key]:
                raise UsageError(f"the plan gives {name} {key} {size}: expected 1 to {present[key]}")
            if key == "heads":
                set_heads(module, size)
            else:
                cut(module, cast(Side, key), torch.arange(size))
    follow_width(model)
