"""The only training loop, for any module and any data. Accelerate underneath; resumes bit by bit from any kill.

Whatever is random in step n follows from (seed, n): order and augmentation through NumPy generators, dropout and
drop-path through torch's, seeded anew before each step. A checkpoint is tensors and step numbers.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from foveal.core.errors import FovealError, UsageError
from foveal.core.method import Recipe, Trained
from foveal.core.options import options_to_dict
from foveal.core.seeds import derive, generator
from foveal.train import checkpoint
from foveal.train.batches import ahead
from foveal.train.events import Event, Listener, TrainResult, silent
from foveal.train.feed import Feed, stacked
from foveal.train.optim import make_optimizer, rate, set_rate
from foveal.train.processes import accelerator_for, shared_statistics, told_when_lost

SAVE_EVERY_S = 20.0
WORKERS = min(8, os.cpu_count() or 1)
OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError)


@dataclass
class Position:
    """Where training stands; the JSON part of a checkpoint."""

    signature: str
    step: int = 0
    elapsed: float = 0.0
    micro: int = 0
    """Examples per forward pass; smaller than the recipe's batch when that did not fit into memory."""
    loss_sum: float = 0.0
    """Of the running epoch, weighted by examples."""
    seen: int = 0
    history: list[Event] = field(default_factory=list)


def train(
    method: Trained,
    model: nn.Module,
    feed: Feed,
    seed: int,
    *,
    recipe: Recipe,
    device: str = "auto",
    work: Path,
    budget_s: float | None = None,
    validate: Callable[[Any], dict[str, float]] | None = None,
    on_event: Listener = silent,
) -> TrainResult:
    """Train a module by a method's loss, from where `work` left off.

    The weights after the last step are kept: neither validation nor test data choose among epochs. With a budget,
    training ends after the step in which it ran out; seconds spent before a kill count.

    Args:
        method: gives parameter groups, loss, and what to do after a step and at the end.
        model: belongs to the loop from here on; trained in place. What must not change in it has no gradients, and
            stays in eval mode by itself.
        feed: the examples, their order and what a batch of them holds.
        seed: rules order, augmentation and dropout. Equal calls give equal weights on one machine.
        device: 'auto', 'cpu' or 'cuda'.
        work: folder of the checkpoint. The same call with the same folder goes on after a kill and ends with the
            same bits; a checkpoint of another call is told by an event and replaced.
        budget_s: seconds, or None for all epochs.
        validate: called with the model in eval mode after each epoch; its figures join the epoch's record.

    Raises:
        FovealError: the loss is not finite, one example alone does not fit into memory, or `work` cannot be written.
        UsageError: nothing to train on, nothing to train, no such device, or more processes than examples in a batch.
    """
    if len(feed) == 0:
        raise UsageError(f"{method.name} got nothing to train on: expected at least one example")
    accelerator = accelerator_for(device)
    target = choose_device(device, accelerator)
    place(model, target)
    optimizer = make_optimizer(checked_groups(method, model, recipe), recipe)
    position = Position(signature_of(method, model, feed, seed, recipe))
    found = checkpoint.load(work, position.signature, model, optimizer)
    if isinstance(found, dict):
        position = Position(**found)
    elif found:
        on_event({"event": "message", "message": found})
    check_same_start(position.step, work, accelerator)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    state = Run(
        method, model, wrapped, prepared, accelerator, target, feed, seed, recipe, work, budget_s, validate, on_event,
        position,
    )  # fmt: skip
    devices = [target.index or 0] if target.type == "cuda" else []
    patches = grouped_in_float32(model), shared_statistics(model, accelerator)
    with torch.random.fork_rng(devices), patches[0], patches[1], told_when_lost():
        stopped = state.go()
        accelerator.wait_for_everyone()
    finished = method.finish(model).eval()
    unplace(finished, torch.device("cpu"))
    steps = state.steps_per_epoch
    return TrainResult(finished, state.history, position.step / steps, stopped)


@dataclass
class Run:
    """One call of `train`, taken apart into steps."""

    method: Trained
    model: nn.Module
    wrapped: Any
    """The model as Accelerate prepared it: itself, or wrapped for several processes."""
    optimizer: Any
    accelerator: Accelerator
    device: torch.device
    feed: Feed
    seed: int
    recipe: Recipe
    work: Path
    budget_s: float | None
    validate: Callable[[Any], dict[str, float]] | None
    on_event: Listener
    position: Position

    def __post_init__(self) -> None:
        self.history = list(self.position.history)
        batches = self.feed.batches(self.recipe.batch_size, self.seed, 0)
        self.position.micro = self.position.micro or max(self.recipe.batch_size, *map(len, batches))
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        smallest = min(map(len, batches))
        if smallest < self.world:
            raise UsageError(
                f"{self.world} processes share batches of {smallest} examples: start fewer processes, or choose a "
                f"larger batch_size than {self.recipe.batch_size}"
            )
        self.steps_per_epoch = len(batches)
        self.steps = self.recipe.epochs * self.steps_per_epoch
        self.precision = autocast_dtype(self.device, self.model)
        self.begun = time.monotonic() - self.position.elapsed
        self.saved_at = self.stepped_at = time.monotonic()

    def go(self) -> bool:
        """All remaining steps. Returns whether the budget ended them early."""
        while self.position.step < self.steps:
            for batch, size in self.epoch():
                if self.position.step and self.out_of_time():
                    self.save()
                    if self.position.seen:
                        self.measure(self.position.step / self.steps_per_epoch)
                    return True
                self.train_step(batch, size)
                if self.position.step % self.steps_per_epoch == 0:
                    self.end_epoch()
                elif time.monotonic() - self.saved_at > SAVE_EVERY_S:
                    self.save()
        return False

    def epoch(self) -> Iterator[tuple[dict[str, Tensor], int]]:
        """(stacked examples [b, ...], batch size) of each step left in the running epoch; b is this process's share
        of the batch."""
        number, done = divmod(self.position.step, self.steps_per_epoch)
        batches = self.feed.batches(self.recipe.batch_size, self.seed, number)
        if len(batches) != self.steps_per_epoch:
            raise ValueError(
                f"the feed gives {len(batches)} batches in one epoch and {self.steps_per_epoch} in another"
            )
        mine = [batch[self.rank :: self.world] for batch in batches[done:]]

        def example(index: int) -> dict[str, np.ndarray]:
            return self.feed.example(index, generator(self.seed, "augment", number, index))

        with ThreadPoolExecutor(WORKERS) as pool:
            depth = 2 * self.recipe.batch_size
            examples = ahead(example, (int(index) for batch in mine for index in batch), pool, depth)
            for batch, share in zip(batches[done:], mine, strict=True):
                yield stacked([next(examples) for _ in share]), len(batch)

    def train_step(self, batch: dict[str, Tensor], size: int) -> None:
        share = rate(self.position.step, self.steps, self.recipe.warmup)
        lr = set_rate(self.optimizer, share)
        self.wrapped.train()
        while True:
            try:
                loss = self.accumulate(batch, size)
                break
            except OUT_OF_MEMORY as error:
                self.back_off(error)
        if not math.isfinite(loss):
            raise FovealError(
                f"the loss of {self.method.name} became {loss} at step {self.position.step + 1} of {self.steps}, "
                f"expected a finite number: try a lower lr than {self.recipe.lr:g}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.method.after_step(self.model, self.position.step)
        self.position.loss_sum += loss * size
        self.position.seen += size
        now = time.monotonic()
        speed = size / (now - self.stepped_at)
        self.stepped_at = now
        self.on_event(
            {
                "event": "step",
                "step": self.position.step,
                "steps": self.steps,
                "epoch": (self.position.step - 1) // self.steps_per_epoch + 1,
                "loss": loss,
                "lr": lr,
                "examples_per_second": speed,
            }
        )

    def accumulate(self, batch: dict[str, Tensor], size: int) -> float:
        """Gradients of one batch of `size` examples, in as many passes as memory asks for. Returns its mean loss.

        `batch` is this process's share. Gradients are averaged over processes, hence each example's weight.
        """
        torch.manual_seed(derive(self.seed, "step", self.position.step, self.rank))
        parts = min(math.ceil(math.ceil(size / self.world) / self.position.micro), size // self.world)
        split = {name: value.tensor_split(parts) for name, value in batch.items()}
        total = 0.0
        for number in range(parts):
            some = {name: pieces[number] for name, pieces in split.items()}
            share = len(next(iter(some.values()))) / size
            some = {name: value.to(self.device, non_blocking=True) for name, value in some.items()}
            with self.accelerator.no_sync(self.wrapped) if number < parts - 1 else nullcontext():
                with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                    loss = self.method.loss(self.wrapped, self.feed.ready(some))["loss"]
                self.accelerator.backward(loss * (share * self.world))
            total += float(loss.detach()) * share
        if self.world == 1:
            return total
        shares = torch.tensor([total], dtype=torch.float32, device=self.device)
        return float(torch.as_tensor(self.accelerator.reduce(shares, "sum")).item())

    def back_off(self, error: BaseException) -> None:
        """Halve the examples per pass; the batch of an optimiser step stays the recipe's."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.world > 1:
            raise FovealError(
                f"out of memory on {self.device} with {self.recipe.batch_size} examples shared by {self.world} "
                "processes: choose a smaller batch_size or backbone, or start more processes"
            ) from error
        if self.position.micro == 1:
            raise FovealError(
                f"one example alone does not fit into the memory of {self.device}: choose a smaller backbone or "
                "--device cpu"
            ) from error
        self.position.micro = math.ceil(self.position.micro / 2)
        told = f"out of memory: going on with {self.position.micro} examples at a time, same batch per step"
        self.on_event({"event": "message", "message": told})

    def end_epoch(self) -> None:
        record = self.measure(self.position.step // self.steps_per_epoch)
        self.position.history.append(record)
        self.position.loss_sum, self.position.seen = 0.0, 0
        self.save()

    def measure(self, epoch: float) -> Event:
        """Validate, and tell what an epoch (or the part of one that a budget left) came to."""
        self.model.eval()
        record: Event = {
            "event": "epoch",
            "epoch": epoch,
            "step": self.position.step,
            "train_loss": self.position.loss_sum / max(1, self.position.seen),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.monotonic() - self.begun,
        }
        if self.validate:
            record |= self.validate(self.model)
        self.history.append(record)
        self.on_event(record)
        return record

    def save(self) -> None:
        self.position.elapsed = time.monotonic() - self.begun
        if self.accelerator.is_main_process:
            checkpoint.save(self.work, self.model, self.optimizer, asdict(self.position))
        self.saved_at = time.monotonic()

    def out_of_time(self) -> bool:
        """Whether the budget is spent, agreed on by all processes."""
        if self.budget_s is None:
            return False
        spent = time.monotonic() - self.begun >= self.budget_s
        if self.world == 1:
            return spent
        votes = self.accelerator.reduce(torch.tensor([float(spent)], device=self.device), "sum")
        return bool(torch.as_tensor(votes).item() > 0)


def check_same_start(step: int, work: Path, accelerator: Accelerator) -> None:
    """Refuse to train when the processes found different checkpoints, as they do in folders of their own."""
    if accelerator.num_processes == 1:
        return
    steps = torch.as_tensor(accelerator.gather(torch.tensor([step], device=accelerator.device))).tolist()
    if len(set(steps)) > 1:
        raise UsageError(
            f"the processes found checkpoints of different steps ({', '.join(map(str, steps))}) in {work}: "
            "choose an --out that all machines share"
        )


def checked_groups(method: Trained, model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    groups = method.parameter_groups(model, recipe)
    if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
        raise UsageError(f"{method.name} left no parameter to train")
    return groups


def signature_of(method: Trained, model: nn.Module, feed: Feed, seed: int, recipe: Recipe) -> str:
    """Hash of all that decides the trained weights. Budget, validation and device are left out."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((method.name, options_to_dict(method.options), seed, asdict(recipe))).encode())
    digest.update(feed.fingerprint().encode())
    digest.update(checkpoint.starting_digest(model).encode())
    return digest.hexdigest()


def choose_device(device: str, accelerator: Accelerator) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> the device of this process.

    Raises:
        UsageError: there is no such device here.
    """
    if device == "cpu":
        return torch.device("cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch finds no CUDA device: use --device cpu or auto")
    if device != "auto" and not device.startswith("cuda"):
        raise UsageError(f"device {device}: expected auto, cpu or cuda")
    return accelerator.device


def is_convnet(model: nn.Module) -> bool:
    """Whether convolutions do a good part of the work, rather than one that cuts patches for a transformer."""
    kinds = [type(module) for module in model.modules()]
    return 4 * sum(issubclass(kind, nn.Conv2d) for kind in kinds) > sum(issubclass(kind, nn.Linear) for kind in kinds)


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model, in the memory format that is fastest for it: channels last for convolutions.

    Models with convolutions over time as well stay as they are: torch has no one format for both kinds.
    """
    model.to(device)
    if is_convnet(model) and all(weight.ndim < 5 for weight in model.parameters()):
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def unplace(model: nn.Module, device: torch.device) -> None:
    """Move a model, in the plain memory format."""
    model.to(device)
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def autocast_dtype(device: torch.device, model: nn.Module) -> torch.dtype | None:
    """bfloat16 where it is faster than float32, else None.

    On CPUs that multiply bfloat16 natively, layers of a few hundred channels gain: 1.3 times on EfficientNets, 1.4 to
    2 on ViTs and ResNets. Narrow ones lose it again to conversions.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    abilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    if not (abilities.get("amx_bf16") or abilities.get("avx512_bf16")):
        return None
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    narrow = sum(layer.weight.numel() for layer in layers if min(layer.weight.shape[:2]) < 128)
    return torch.bfloat16 if 2 * narrow < sum(layer.weight.numel() for layer in layers) else None


@contextmanager
def grouped_in_float32(model: nn.Module) -> Generator[None]:
    """Within it, grouped convolutions compute in float32 even where CPU autocast would have them in bfloat16, whose
    backward pass is several times slower for them. They still give bfloat16."""

    def wrapped(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def compute(images: Tensor) -> Tensor:
            if images.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
                return forward(images)
            with torch.autocast("cpu", enabled=False):
                return forward(images.float()).to(torch.bfloat16)

        return compute

    grouped = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    try:
        for module in grouped:
            module.forward = wrapped(module.forward)  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for module in grouped:
            module.__dict__.pop("forward", None)
