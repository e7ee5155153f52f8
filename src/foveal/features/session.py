"""The fastest way to run a frozen backbone that agrees with torch: ONNX Runtime on a CPU, torch on a GPU.

The graph is exported once per backbone and kept in the cache. Only float32 is used: features agree with torch's
within 1e-3 of the largest value, or torch itself does the work.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foveal.backbones.adapter import Backbone, normalise
from foveal.core.errors import FovealError, UsageError
from foveal.core.folders import atomic_file, cache_root
from foveal.core.threads import cpu_threads
from foveal.features.graph import to_onnx

GRAPH = 1
"""Version of the cached graphs."""
TOLERANCE = 1e-3


class Session(ABC):
    """Pixels uint8 [B, S, S, 3] -> features float32 [B, D]. May be called from several threads at once.

    A session of `fractions` takes float32 pixels of 0 to 255 instead, for images that are made rather than decoded.

    Attributes:
        engine: what computes, for reports: 'onnxruntime cpu', 'torch cpu', 'torch cuda'.
        threads: how many threads it computes with.
        batch: how many images to give one call, when several threads call.
        note: why it is not the faster engine, or ''.
    """

    engine: str
    threads: int
    batch: int
    note: str = ""

    @abstractmethod
    def __call__(self, pixels: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]: ...


class OnnxSession(Session):
    """Small batches side by side, one thread each: they stay in a core's own cache, and no thread waits for another.

    A call with more than `MICRO` images spreads them over `threads` threads.
    """

    MICRO = 4

    def __init__(self, graph: Path, threads: int, fractions: bool = False) -> None:
        import onnxruntime

        self.engine, self.threads, self.batch = "onnxruntime cpu", threads, self.MICRO
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        model: str | bytes = str(graph)
        if fractions:  # the graph begins with a cast to float, which then does nothing
            import onnx

            loaded = onnx.load(model)
            loaded.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            model = loaded.SerializeToString()
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="foveal-session")

    def __call__(self, pixels: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
        if len(pixels) <= self.MICRO:
            return self._run(pixels)
        parts = [pixels[at : at + self.MICRO] for at in range(0, len(pixels), self.MICRO)]
        return np.concatenate(list(self._pool.map(self._run, parts)))

    def _run(self, pixels: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", self._session.run(None, {"pixels": pixels})[0])


class TorchSession(Session):
    """One call at a time, with all threads or the whole GPU."""

    def __init__(self, backbone: Backbone, device: torch.device, threads: int, note: str = "") -> None:
        self.engine, self.threads, self.note = f"torch {device.type}", threads, note
        self.batch = 16 if device.type == "cpu" else 64
        self._device = device
        self._featurizer = Featurizer(copy.deepcopy(backbone)).eval().requires_grad_(False).to(device)
        self._lock = Lock()

    def __call__(self, pixels: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
        with self._lock, torch.inference_mode():
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                return self._featurizer(torch.from_numpy(pixels).to(self._device)).float().cpu().numpy()
            finally:
                torch.set_num_threads(before)


class Featurizer(nn.Module):
    """A backbone with its normalisation: pixels uint8 [B, S, S, 3] -> features [B, D]."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(normalise(pixels, self.backbone.preprocessing))


def feature_session(
    backbone: Backbone, *, device: str = "auto", threads: int | None = None, fractions: bool = False
) -> Session:
    """The fastest exact session for a backbone on this machine.

    Args:
        device: 'auto' (a GPU if there is one), 'cpu' or 'cuda'.
        threads: for one call on a CPU; all processors by default.
        fractions: take float32 pixels of 0 to 255, rather than uint8.

    Raises:
        UsageError: 'cuda' without a GPU that torch can use, or an unknown device.
    """
    threads = threads or cpu_threads()
    chosen = pick_device(device)
    if chosen.type != "cpu":
        return TorchSession(backbone, chosen, threads)
    fingerprint = backbone.fingerprint()
    graph = cache_root() / "graphs" / f"{fingerprint}-{GRAPH}.onnx"
    refusal = graph.with_suffix(".json")
    if refusal.is_file():
        try:
            stored = json.loads(refusal.read_text(encoding="utf-8"))
            if stored["versions"] == versions():
                return TorchSession(backbone, chosen, threads, stored["reason"])
        except (ValueError, KeyError, OSError):
            pass
    if graph.is_file():
        try:
            return OnnxSession(graph, threads, fractions)
        except Exception:  # a damaged graph, of which ONNX Runtime raises many kinds: export it again
            graph.unlink(missing_ok=True)
    reason = export_features(backbone, graph)
    if not reason:
        return OnnxSession(graph, threads, fractions)
    try:
        with atomic_file(refusal) as staging:
            staging.write_text(json.dumps({"reason": reason, "versions": versions()}), encoding="utf-8")
    except FovealError:
        pass
    return TorchSession(backbone, chosen, threads, reason)


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device '{device}': expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda': torch sees no GPU on this machine: use --device cpu")
    return torch.device(device)


def versions() -> list[str]:
    from importlib.metadata import version

    return [version("torch"), version("onnxruntime"), version("timm")]


def export_features(backbone: Backbone, graph: Path) -> str:
    """Write the graph if ONNX Runtime agrees with torch on it; otherwise say why not.

    Raises:
        FovealError: the cache folder cannot be written.
    """
    featurizer = Featurizer(copy.deepcopy(backbone)).cpu().eval()
    size = backbone.preprocessing.size
    coarse = np.random.default_rng(0).integers(0, 256, (3, 3, 12, 12)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=(size, size), mode="bilinear")
    pixels = smooth.byte().permute(0, 2, 3, 1).contiguous()
    try:
        with atomic_file(graph) as staging:
            to_onnx(featurizer, (pixels[:2],), staging, ["pixels"], ["features"], {"pixels": {0: "n"}})
            got = OnnxSession(staging, cpu_threads())(pixels.numpy())
            with torch.inference_mode():
                expected = featurizer(pixels).numpy()
            difference = float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-12))
            if not difference <= TOLERANCE:
                raise ArithmeticError(f"ONNX Runtime differs from torch by {difference:.1e}")
    except FovealError:
        raise
    except Exception as error:  # exporter and runtime raise many kinds; torch can always do the work
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no reason given'}"
    return ""
