"""Heat maps over HTTP: one at a time, on one core, while predictions go on in the other threads of the process."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from foveal.core import catalogue
from foveal.core.errors import BundleError, FovealError
from foveal.data.images import decode, seen_box, to_pixels
from foveal.ship.answer import answer
from foveal.ship.runtime import Runtime
from foveal.ship.serve.limits import Settings
from foveal.ship.serve.refusal import Busy, Refused

if TYPE_CHECKING:
    from torch import Tensor

    from foveal.backbones.wrapper import OpenModel
    from foveal.core.method import Explain

DEFAULT = "sobol-attribution:index=effect,grid=6,points=8"
"""296 runs of the model."""
PASSES = 4096
"""Runs of the model for one map, at most."""
WAITING = 8
CELLS = 28
SIDE = 1024
"""Pixels of the longer side of the picture that is sent back, at most."""
FROM_TORCH = frozenset({"feature map", "gradients"})
"""What the exported model cannot give and the torch model of the Bundle can; it is loaded when first needed."""


def methods() -> list[str]:
    return catalogue.names("explain")


class Explainer:
    """Explains what a runtime answers."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.settings, self.runtime = settings, runtime
        self._pool: ThreadPoolExecutor | None = None
        self._asked = 0

    def start(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="foveal-explain")

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    async def explain(self, name: str, data: bytes, choice: str, target: str | None) -> dict[str, Any]:
        """The map of one image, as the schema HeatMap says.

        Raises:
            Busy: others wait already, or it takes longer than a request may.
            Refused: the image cannot be decoded, or the method or class cannot be used.
        """
        if self._asked >= WAITING:
            raise Busy(f"{WAITING} explanations are being computed already: ask again later")
        seconds = self.settings.limits.request_seconds
        deadline = time.monotonic() + seconds
        loop = asyncio.get_running_loop()
        self._asked += 1
        try:
            async with asyncio.timeout(seconds):
                return await loop.run_in_executor(self._pool, self.compute, name, data, choice, target, deadline)
        except TimeoutError:
            raise too_slow(seconds) from None
        finally:
            self._asked -= 1

    def compute(self, name: str, data: bytes, choice: str, target: str | None, deadline: float) -> dict[str, Any]:
        try:
            return self._compute(name, data, choice, target, deadline)
        except BundleError:  # names the server's folder: for its log
            raise
        except FovealError as error:
            raise Refused(422, str(error)) from None

    def _compute(self, name: str, data: bytes, choice: str, target: str | None, deadline: float) -> dict[str, Any]:
        import torch

        from foveal.evaluate.overlay import overlay
        from foveal.ship.explain import chosen, placed, squares

        torch.set_num_threads(1)
        runtime = self.runtime
        method = chosen(choice)
        self.check(method)
        photo = decode(data, self.settings.limits.pixels)
        probabilities, scores = (each[0] for each in runtime(to_pixels(photo, runtime.preprocessing)[None]))
        index = int(probabilities.argmax()) if target is None else self.class_index(target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = method.explain(
                self.model(method, deadline), squares(photo, runtime.preprocessing), torch.tensor([index])
            )
        row = answer(
            name, probabilities, float(scores), classes=runtime.classes, task=runtime.task, threshold=runtime.threshold
        )
        map = found[0].detach().float().clamp_min(0)
        map = map / map.max().clamp_min(1e-12)
        photo.thumbnail((SIDE, SIDE))
        seen = seen_box(photo.size, runtime.preprocessing)
        drawn = overlay(photo, placed(map.numpy(), photo.size, runtime.preprocessing), seen)
        cells = torch.nn.functional.adaptive_avg_pool2d(map[None], CELLS)[0]
        return {
            "image": name,
            "method": choice,
            "target": runtime.classes[index],
            "probability": float(probabilities[index]),
            "unknown": row["unknown"],
            "map": [[round(float(value), 4) for value in cells_row] for cells_row in cells],
            "square": [round(edge / photo.size[axis % 2], 4) for axis, edge in enumerate(seen)],
            "overlay": data_url(drawn),
        }

    def check(self, method: Explain) -> None:
        """
        Raises:
            Refused: the method does not suit this model, or asks too much of it.
        """
        lacking = sorted(method.spec.needs - FROM_TORCH)
        if lacking or self.runtime.task not in method.spec.tasks:
            reason = f"needs {', '.join(lacking)}" if lacking else f"explains {' and '.join(method.spec.tasks)} models"
            raise Refused(422, f"{method.name} does not suit this {self.runtime.task} model: it {reason}")
        if method.passes() > PASSES:
            raise Refused(
                422, f"{method!r} runs the model {method.passes()} times: at most {PASSES}, choose smaller options"
            )

    def class_index(self, name: str) -> int:
        if name in self.runtime.classes:
            return self.runtime.classes.index(name)
        near = get_close_matches(name, self.runtime.classes, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "GET /model lists them"
        raise Refused(422, f"no class '{name[:60]}': {hint}")

    def model(self, method: Explain, deadline: float) -> Any:
        """What the method looks at: the runtime where scores are enough, else the torch model."""
        if method.spec.needs:
            return self.open_model
        import torch

        from foveal.backbones.wrapper import Scorer

        def score(images: Tensor) -> Tensor:
            if time.monotonic() > deadline:
                raise too_slow(self.settings.limits.request_seconds)
            pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
            return torch.from_numpy(np.array(self.runtime(pixels)[0]))

        return Scorer(score, self.runtime.preprocessing.mean, self.settings.batch)

    @cached_property
    def open_model(self) -> OpenModel:
        from foveal.ship.bundle import load_classifier
        from foveal.ship.explain import open_model_of

        return open_model_of(load_classifier(self.settings.bundle), "cpu")


def too_slow(seconds: float) -> Busy:
    return Busy(f"no map within {seconds:g} seconds: ask again later, or choose a method with fewer passes")


def data_url(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
