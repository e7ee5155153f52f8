"""The processes that torchrun or `accelerate launch` started for one run: which this is, and how they act as one.

Each batch is dealt out to the processes; gradients, loss and batch statistics are those of the whole batch. So a run
is the same on any number of processes, up to rounding, and a checkpoint of one goes on with another number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from foveal.core.errors import FovealError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others, one of which may be reading images. The launcher ends all when one dies."""
LOST = ("gloo", "nccl", "connection closed", "connection reset", "distbackend", "process group")


def world() -> int:
    """How many processes this run has: 1 unless a launcher started it."""
    started = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return int(os.environ["WORLD_SIZE"]) if started else 1


def accelerator_for(device: str) -> Accelerator:
    """Accelerate's view of this run, joined to its other processes; one and the same for all callers.

    Accelerate joins processes on CPUs only when told that it is to run on CPUs.

    Raises:
        UsageError: several processes were started that cannot be joined on this device.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    count = world()
    if count == 1:
        return Accelerator(device_placement=False)
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    joined = Accelerator(cpu=on_cpu, device_placement=False, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if joined.num_processes != count:
        raise UsageError(
            f"{count} processes were started, and cannot be joined on device {device}: start one, or use --device cpu"
        )
    return joined


class Team:
    """This process and its fellows, for what is done once: reading images first, writing the Bundle."""

    def __init__(self, device: str) -> None:
        self.accelerator = accelerator_for(device) if world() > 1 else None

    @property
    def main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def agree(self, ask: Callable[[], bool]) -> bool:
        """What the main process finds, for all."""
        if self.accelerator is None:
            return ask()
        answer = torch.tensor([float(self.main and ask())], device=self.accelerator.device)
        with told_when_lost():
            return bool(torch.as_tensor(self.accelerator.reduce(answer, "sum")).item())

    @contextmanager
    def main_first(self) -> Generator[None]:
        """On each machine one process goes first; the others find in the cache what it read."""
        if self.accelerator is None:
            yield
            return
        first = self.accelerator.is_local_main_process
        if not first:
            self.wait()
        yield
        if first:
            self.wait()

    def wait(self) -> None:
        if self.accelerator is not None:
            with told_when_lost():
                self.accelerator.wait_for_everyone()


@contextmanager
def told_when_lost() -> Generator[None]:
    """A failed exchange means that another process has ended: that one's message says why, this one's need not."""
    try:
        yield
    except RuntimeError as error:
        if world() > 1 and any(sign in f"{type(error).__name__} {error}".lower() for sign in LOST):
            raise FovealError(
                "another process of this run has ended (its message says why); the same command goes on where it was"
            ) from error
        raise


def dealt_back(own: Tensor, count: int, accelerator: Accelerator) -> Tensor:
    """Rows [k, ...] that each process made of its share `rank::world` of `count` -> all rows [count, ...], in order."""
    ranks = accelerator.num_processes
    longest = -(-count // ranks)
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    everything = cast(Tensor, accelerator.gather(padded.to(accelerator.device))).to(own.device)
    return everything.view(ranks, longest, *own.shape[1:]).transpose(0, 1).reshape(-1, *own.shape[1:])[:count]


class Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def batch_norm(module: Any, images: Tensor) -> Tensor:
    """What a batch norm in training computes, with the mean and variance of all processes' images [b, C, ...].

    torch's own SyncBatchNorm computes the same, on GPUs only.
    """
    axes, shape = [0, *range(2, images.ndim)], [1, -1] + [1] * (images.ndim - 2)
    x = images.float()
    count = x.new_tensor([x.numel() / x.shape[1]])
    sums = cast(Tensor, Sum.apply(torch.cat([x.sum(axes), count])))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centred = x - mean.view(shape)
    variance = cast(Tensor, Sum.apply((centred * centred).sum(axes))) / total
    if module.track_running_stats:
        module.num_batches_tracked.add_(1)
        share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        with torch.no_grad():
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), share)
            module.running_var.lerp_((variance * (total / (total - 1))).to(module.running_var.dtype), share)
    out = centred * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        out = out * module.weight.view(shape) + module.bias.view(shape)
    out = out.to(images.dtype)
    for name in ("drop", "act"):  # timm's norms carry the activation that follows them
        following = getattr(module, name, None)
        out = following(out) if isinstance(following, nn.Module) else out
    return out


@contextmanager
def shared_statistics(model: nn.Module, accelerator: Accelerator) -> Generator[None]:
    """Within it, batch norms in training normalise by the whole batch, not by this process's share of it."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if accelerator.num_processes == 1:
        norms = []

    def patched(module: Any, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda images: batch_norm(module, images) if module.training else forward(images)

    try:
        for module in norms:
            module.__dict__["forward"] = patched(module, module.forward)
        yield
    finally:
        for module in norms:
            module.__dict__.pop("forward", None)
