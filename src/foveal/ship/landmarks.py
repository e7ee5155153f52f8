"""Opening a Bundle of landmarks, and finding points with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from foveal.backbones.adapter import normalise, rebuild_backbone
from foveal.core.bundle import BundleFiles
from foveal.core.errors import DataError, FovealError
from foveal.core.families.dense import Dense
from foveal.core.preprocessing import Preprocessing
from foveal.core.schema import OtherManifest, StoredBackbone
from foveal.data.open import open_images
from foveal.data.worlds import garbage
from foveal.features.graph import OPSET, to_onnx
from foveal.features.locate import locate
from foveal.ship.opened import Opened, must_fit, must_hold

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


PICTURES = 8
TOLERANCE = 1e-3
"""The largest difference of a map (whose peaks are 1) between ONNX Runtime and torch that is shipped."""


class Reading(nn.Module):
    """A network with its normalisation and its reading: squares uint8 [N, S, S, 3] -> (points, scores, maps)."""

    def __init__(self, method: Dense, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.method, self.model, self.preprocessing = method, model, preprocessing

    def forward(self, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.model(normalise(squares, self.preprocessing))
        side = self.preprocessing.size
        return *self.method.read(maps, (side, side)), maps


class LandmarkManifest(OtherManifest):
    """bundle.json of a network of landmarks."""

    classes: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    backbone: StoredBackbone


def open_landmarks(files: BundleFiles) -> LandmarkBundle:
    """
    Raises:
        BundleError: bundle.json lacks what a network of landmarks needs.
    """
    must_hold(files, "bundle.json", files.manifest, LandmarkManifest)
    return LandmarkBundle(files)


@dataclass(frozen=True)
class LandmarkBundle(Opened):
    """A network that finds named points. `predict` answers for images."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the points, in the order of the network's maps."""
        return tuple(self.manifest["classes"])

    @cached_property
    def method(self) -> Dense:
        return self.made_by(Dense, "finds no points")

    @cached_property
    @torch.inference_mode(False)
    def model(self) -> nn.Module:
        """The torch network: normalised images [B, 3, S, S] -> maps [B, K, h, w]."""
        with must_fit(self.path):
            weights = load_file(self.path / "model.safetensors")
            held = sum(tensor.numel() for tensor in weights.values())
            backbone = rebuild_backbone(self.manifest["backbone"], most=held)
            model = self.method.finish(self.method.attach(backbone, len(self.names)))
            model.load_state_dict(weights)
            return model.eval()

    def predict(
        self,
        images: str | Path | Image.Image | np.ndarray | Iterable[str | Path | Image.Image | np.ndarray],
        *,
        device: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Find the points in images: files, folders, PIL images or uint8 arrays [H, W, 3].

        Returns:
            One row per image: image, width, height, points (name, x, y, score; x and y in the upright image's own
            pixels, (0, 0) the centre of the top left one; score in 0..1, the height of the map, not calibrated). An
            image that cannot be decoded has no points and says why under `error`.

        Raises:
            DataError: no image, or none that can be decoded.
        """
        single = isinstance(images, str | Path) or hasattr(images, "getbands") or hasattr(images, "dtype")
        dataset = open_images([images] if single else list(images))  # type: ignore[arg-type]
        found = locate(
            self.method, self.model, dataset, self.preprocessing, len(self.names), device=device, progress=progress
        )
        if len(found.errors) == len(dataset):
            raise DataError(f"none of the {len(dataset)} images can be decoded ({dataset.ids[0]}: {found.errors[0]})")
        rows: list[dict[str, Any]] = []
        for row, name in enumerate(dataset.ids):
            if row in found.errors:
                rows.append({"image": name, "points": [], "error": found.errors[row]})
                continue
            width, height = (int(length) for length in found.sizes[row])
            points = [
                {"name": point, "x": round(float(x), 2), "y": round(float(y), 2), "score": round(float(sure), 4)}
                for point, (x, y), sure in zip(self.names, found.xy[row], found.sure[row], strict=True)
            ]
            rows.append({"image": name, "width": width, "height": height, "points": points})
        return rows

    def write_onnx(self, path: Path) -> dict[str, Any]:
        """Write the network, its normalisation and its reading as ONNX, and compare it with torch on pictures.

        The graph takes `squares`, uint8 RGB [N, S, S, 3] (an image whole in the middle of a black square, see
        `foveal.data.geometry.fitted`), and gives `points` [N, K, 2] in the square's pixels, `scores` [N, K] and `maps`
        [N, K, h, w]. Its metadata hold the points' names.

        Raises:
            FovealError: the network cannot be expressed in ONNX, or its maps differ by more than 1e-3.
        """
        import onnx
        import onnxruntime

        size, names = self.preprocessing.size, ["points", "scores", "maps"]
        pictures = torch.from_numpy(garbage(PICTURES, size, seed=0))
        module = Reading(self.method, self.model.cpu(), self.preprocessing).eval()
        try:
            to_onnx(module, (pictures[:2],), path, ["squares"], names, {name: {0: "N"} for name in ("squares", *names)})
        except Exception as error:  # the exporter raises many kinds, most of them from inside a model's own code
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FovealError(f"this network cannot be expressed in ONNX ({reason}): use the Bundle itself") from error
        graph = onnx.load(path)
        onnx.helper.set_model_props(graph, {"classes": json.dumps(self.names), "task": "landmarks", "size": str(size)})
        onnx.save(graph, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            expected = module(pictures)[2].numpy()
        gap = float(abs(session.run(["maps"], {"squares": pictures.numpy()})[0] - expected).max())
        if not gap <= TOLERANCE:
            raise FovealError(f"the exported network's maps differ from torch by {gap:.1e}: it was not kept")
        return {
            "opset": OPSET,
            "bytes": path.stat().st_size,
            "engine": f"onnxruntime {onnxruntime.__version__}",
            "images": PICTURES,
            "max_abs_difference": gap,
            "compared": "a map",
        }

    def say(self, rows: list[dict[str, Any]]) -> str:
        """Rows of `predict`, a line per image for people."""
        return "\n".join(
            f"{row['image']}  cannot be read: {row['error']}"
            if "error" in row
            else f"{row['image']}  "
            + "  ".join(
                f"{each['name']} {each['x']:.1f},{each['y']:.1f} ({each['score']:.2f})" for each in row["points"]
            )
            for row in rows
        )

    def to_text(self) -> str:
        found = self.metrics
        said = ", ".join(
            f"{name} {found[key]['value']:.3f} [{found[key]['low']:.3f}, {found[key]['high']:.3f}]"
            for key, name in (("nme", "NME"), ("pck_05", "PCK at 5%"), ("pck_10", "PCK at 10%"), ("pixels", "pixels"))
        )
        guess = found["references"]["mean place"]["nme"]["value"]
        return (
            f"{self.manifest['method']['name']} on {self.manifest['backbone']['name']}: {len(self.names)} points\n"
            f"{found['split']}, {found['n']} images: {said} (mean place: NME {guess:.3f})\n{self.path}/report.html"
        )
