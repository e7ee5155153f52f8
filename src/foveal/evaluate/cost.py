"""What a model costs: parameters, multiply-accumulates, bytes on disk, and time measured on this machine."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, normalise
from foveal.core.errors import FovealError
from foveal.core.folders import atomic_file, cache_root
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing

BATCH = 8
SECONDS = 0.06
"""How long each measurement goes on, once it has run twice."""


class FeatureSession(Protocol):
    """Pixels uint8 [B, S, S, 3] -> features float32 [B, D]; see `foveal.features.session`."""

    engine: str
    threads: int

    def __call__(self, pixels: np.ndarray) -> np.ndarray: ...


def cost(
    classifier: Classifier,
    preprocessing: Preprocessing,
    trained_params: int,
    folder: Path | None = None,
    *,
    device: str = "auto",
    session: FeatureSession | None = None,
) -> dict[str, Any]:
    """The content of cost.json.

    Args:
        classifier: in eval mode.
        trained_params: how many numbers training has set.
        folder: of the Bundle, for the size of its weights.
        device: where torch runs when there is no session: 'auto', 'cpu' or 'cuda'.
        session: what computes this classifier's features, when its backbone is as the session knows it; without one
            torch is timed.

    Returns:
        parameters {total, trained} (numbers in the weights file, and how many of them were set by training), macs
        (multiply-accumulates of one image), bytes, latency and throughput: rows with batch, threads, engine and
        milliseconds (median) or images_per_second, from decoded pixels to logits.
    """
    total = sum(value.numel() for value in classifier.state_dict().values())
    run, engine, threads = runner(classifier, preprocessing, device, session)
    size = preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8)
    one = timed(lambda: run(pixels[:1]))
    many = timed(lambda: run(pixels))
    where = {"threads": threads, "engine": engine}
    return {
        "parameters": {"total": total, "trained": trained_params},
        "macs": macs(classifier, size),
        "bytes": sum(file.stat().st_size for file in sorted(folder.glob("*.safetensors"))) if folder else None,
        "latency": [{"batch": 1, **where, "milliseconds": round(1000 * one, 3)}],
        "throughput": [{"batch": BATCH, **where, "images_per_second": round(BATCH / many, 1)}],
    }


def runner(
    classifier: Classifier, preprocessing: Preprocessing, device: str, session: FeatureSession | None
) -> tuple[Callable[[np.ndarray], object], str, int]:
    """A function of pixels to run, the engine it runs in, and its threads."""
    if session is not None:
        head = next(iter(classifier.head.state_dict().values()), torch.zeros(0))

        @torch.inference_mode()
        def with_session(pixels: np.ndarray) -> object:
            return classifier.head(torch.from_numpy(session(pixels)).to(head.device))

        return with_session, session.engine, session.threads
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    target = torch.device("cuda" if cuda else "cpu")
    model = classifier.to(target)

    @torch.inference_mode()
    def with_torch(pixels: np.ndarray) -> object:
        return model(normalise(torch.from_numpy(pixels).to(target), preprocessing)).cpu()

    return with_torch, f"torch {target.type}", torch.get_num_threads()


def module_cost(
    module: nn.Module, preprocessing: Preprocessing, trained_params: int, folder: Path, *, device: str = "auto"
) -> dict[str, Any]:
    """The content of cost.json of a network of images that is no classifier; see `cost`."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    target, size = torch.device("cuda" if cuda else "cpu"), preprocessing.size
    module = module.to(target)
    pixels = torch.zeros(BATCH, size, size, 3, dtype=torch.uint8)

    @torch.inference_mode()
    def run(count: int) -> object:
        return module(normalise(pixels[:count].to(target), preprocessing)).cpu()

    where = {"threads": torch.get_num_threads(), "engine": f"torch {target.type}"}
    one, many = timed(lambda: run(1)), timed(lambda: run(BATCH))
    return {
        "parameters": {
            "total": sum(value.numel() for value in module.state_dict().values()),
            "trained": trained_params,
        },
        "macs": counted(module, (1, 3, size, size)),
        "bytes": sum(file.stat().st_size for file in sorted(folder.glob("*.safetensors"))),
        "latency": [{"batch": 1, **where, "milliseconds": round(1000 * one, 3)}],
        "throughput": [{"batch": BATCH, **where, "images_per_second": round(BATCH / many, 1)}],
    }


def clip_cost(classifier: Any, size: int, trained_params: int, folder: Path, *, device: str = "auto") -> dict[str, Any]:
    """The content of cost.json of a `foveal.core.families.video.ClipClassifier`; see `cost`. macs are of one clip."""
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    target, shape = torch.device("cuda" if cuda else "cpu"), (1, classifier.frames, 3, size, size)
    classifier = classifier.to(target)
    clip = torch.zeros(shape, device=target)

    @torch.inference_mode()
    def run() -> object:
        return classifier(clip).cpu()

    where = {"threads": torch.get_num_threads(), "engine": f"torch {target.type}"}
    return {
        "parameters": {
            "total": sum(value.numel() for value in classifier.state_dict().values()),
            "trained": trained_params,
        },
        "frames": classifier.frames,
        "macs": counted(classifier, shape),
        "bytes": sum(file.stat().st_size for file in sorted(folder.glob("*.safetensors"))),
        "latency": [{"batch": 1, **where, "milliseconds": round(1000 * timed(run), 3)}],
    }


def timed(run: Callable[[], object]) -> float:
    """Median seconds of a call, the first one left out."""
    run()
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def macs(classifier: Classifier, size: int) -> int:
    """Multiply-accumulates of one image [3, size, size] in convolutions, matrix products and attention.

    Counting runs the model once; the numbers of backbones that nothing has looked into yet and of heads on them
    depend on shapes alone and are kept in the cache.
    """
    backbone, head = classifier.backbone, classifier.head
    if type(classifier) is not Classifier or not isinstance(backbone, Backbone) or backbone.built:
        return counted(classifier, (1, 3, size, size))
    own = kept(f"{backbone.arch} {backbone.plan.args} {size}", lambda: counted(backbone, (1, 3, size, size)))
    if isinstance(head, nn.Linear):
        return own + head.weight.numel()
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    key = f"{type(head).__module__}.{type(head).__qualname__} {shapes} {backbone.width}"
    return own + kept(key, lambda: counted(head, (1, backbone.width)))


def kept(key: str, count: Callable[[], int]) -> int:
    """A number from the cache, or counted now and kept."""
    file = cache_root() / "macs" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["macs"])
    except (OSError, ValueError, KeyError, TypeError):
        number = count()
    with suppress(FovealError), atomic_file(file) as staging:
        staging.write_text(json.dumps({"of": key, "macs": number}), encoding="utf-8")
    return number


def counted(module: nn.Module, shape: tuple[int, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    like = next(iter(module.parameters()), next(iter(module.buffers()), torch.zeros(0)))
    example: Tensor = torch.zeros(shape, device=like.device)
    training, learning = module.training, [p for p in module.parameters() if p.requires_grad]
    counter = FlopCounterMode(display=False)
    try:
        for parameter in learning:  # the counter looks for the gradient of whatever asks for one
            parameter.requires_grad_(False)
        with counter, torch.no_grad():
            module.eval()(example)
    finally:
        module.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2
