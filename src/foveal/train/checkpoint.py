"""A checkpoint is one safetensors file: tensors of model and optimiser, and JSON in its header. No pickle.

It holds what training changes (trainable parameters, all buffers, optimiser state) and the step number. Order,
augmentation and dropout follow from seed and step, so nothing else is needed to go on bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.core.errors import FovealError
from foveal.core.folders import atomic_file

NAME = "checkpoint.safetensors"


def moving(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model that training may change: parameters with gradients, and every buffer."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {**parameters, **dict(model.named_buffers())}


def starting_digest(model: nn.Module) -> str:
    """Hash of a model before its first step; a checkpoint only fits one that started from the same weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.requires_grad}".encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder`, whole or not at all.

    Raises:
        FovealError: the folder cannot be written or the device is full.
    """
    tensors = {f"model.{name}": tensor for name, tensor in moving(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    content = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with atomic_file(folder / NAME) as staging:
            save_file(content, staging, metadata={"progress": json.dumps(progress)})
    except (SafetensorError, OSError) as error:
        raise FovealError(
            f"cannot write the checkpoint {folder / NAME} ({error}): free some space and run the same command again"
        ) from error


def load(folder: Path, signature: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | str:
    """Put model and optimiser where the checkpoint left them.

    Returns:
        The saved progress, or one line that says why there is nothing to go on from ('' when there is no file).
    """
    file = folder / NAME
    for leftover in folder.glob(f".{NAME}.*.tmp"):
        leftover.unlink(missing_ok=True)
    if not file.is_file():
        return ""
    try:
        with safe_open(file, framework="pt") as content:
            progress = json.loads(content.metadata()["progress"])
            if progress["signature"] != signature:
                return f"{file} belongs to other data, options or weights: training starts anew"
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        return f"{file} is damaged ({error}): training starts anew"
    with torch.no_grad():
        for name, tensor in moving(model).items():
            tensor.copy_(tensors[f"model.{name}"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = laid_out_like(parameters[int(index)], tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The same numbers in the parameter's memory format: fused optimisers walk both by address."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
