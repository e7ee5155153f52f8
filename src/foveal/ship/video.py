"""Opening a Bundle that classifies clips, and answering for video files and folders of frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from safetensors.torch import load_file

from foveal.backbones.adapter import rebuild_backbone
from foveal.core.bundle import BundleFiles
from foveal.core.errors import DataError
from foveal.core.families.video import Video
from foveal.core.schema import Calibration, OtherManifest, StoredBackbone
from foveal.data.clips import unlabelled_clips
from foveal.evaluate.calibration import Calibrated
from foveal.evaluate.ood import empty_score
from foveal.features.clips import judge_clips
from foveal.ship.answer import answer, unreadable
from foveal.ship.bundle import filled, headline, part, shapes
from foveal.ship.opened import Opened, must_fit, must_hold


class VideoManifest(OtherManifest):
    """bundle.json of a classifier of clips."""

    classes: Annotated[list[str], Field(min_length=2)]
    backbone: StoredBackbone


def open_video(files: BundleFiles) -> VideoBundle:
    """
    Raises:
        BundleError: bundle.json or calibration.json lacks what a classifier of clips needs.
    """
    must_hold(files, "bundle.json", files.manifest, VideoManifest)
    must_hold(files, "calibration.json", files.calibration, Calibration)
    return VideoBundle(files)


@dataclass(frozen=True)
class VideoBundle(Opened):
    """A classifier of clips with its classes, calibration, metrics and cost. `predict` answers for clips."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @cached_property
    def method(self) -> Video:
        return self.made_by(Video, "does not classify clips")

    @cached_property
    @torch.inference_mode(False)
    def model(self) -> Calibrated:
        """The torch model: normalised clips [B, T, 3, H, W] -> (probabilities [B, C], unknown score [B])."""
        with must_fit(self.path):
            weights = load_file(self.path / "model.safetensors")
            held = sum(tensor.numel() for tensor in weights.values())
            backbone = rebuild_backbone(self.manifest["backbone"], most=held)
            classifier: Any = filled(
                self.method.finish(self.method.attach(backbone, self.classes)), part(weights, "classifier.")
            )
            score = part(weights, "ood.")
            unknown = filled(empty_score(self.calibration["unknown"]["name"], shapes(score)), score)
            return Calibrated(classifier, float(weights["temperature"]), unknown).eval()

    def predict(
        self,
        clips: str | Path | Sequence[str | Path],
        *,
        device: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer for clips: video files, folders of frames, and folders that hold such.

        Returns:
            One row per clip: clip, label, probability, unknown, top (up to five [label, probability]). A clip that
            cannot be decoded has label None and says why under `error`.

        Raises:
            DataError: no clip, or none that can be decoded.
        """
        found = unlabelled_clips([clips] if isinstance(clips, str | Path) else clips)
        model, classifier = self.model, cast(Any, self.model.classifier)
        judged = judge_clips(
            self.method, classifier, [clip for _, clip in found], self.preprocessing, device=device,
            progress=progress,
        )  # fmt: skip
        if len(judged.errors) == len(found):
            raise DataError(f"none of the {len(found)} clips can be decoded ({found[0][0]}: {judged.errors[0]})")
        with torch.inference_mode():
            probabilities, unknown = model.judge(judged.features, judged.logits)
        rows: list[dict[str, Any]] = []
        for row, (name, _) in enumerate(found):
            if row in judged.errors:
                said = unreadable(name, judged.errors[row])
            else:
                said = answer(
                    name,
                    probabilities[row].numpy(),
                    float(unknown[row]),
                    classes=self.classes,
                    task="single-label",
                    threshold=self.calibration["unknown"]["threshold"],
                )
            rows.append({"clip": said.pop("image"), **said})
        return rows

    def say(self, rows: list[dict[str, Any]]) -> str:
        """Rows of `predict`, a line per clip for people."""
        lines: list[str] = []
        for row in rows:
            if "error" in row:
                lines.append(f"{row['clip']}  cannot be read: {row['error']}")
            else:
                said = f"{row['label']}  {row['probability']:.3f}"
                lines.append(f"{row['clip']}  {f'unknown (nearest: {said})' if row['unknown'] else said}")
        return "\n".join(lines)

    def to_text(self) -> str:
        method = self.manifest["method"]
        shuffled = self.metrics["references"]["shuffled"]["balanced_accuracy"]["value"]
        return (
            f"{method['name']} on {self.manifest['backbone']['name']}: {method['options']['frames']} frames a clip\n"
            f"{self.metrics['split']}, {self.metrics['n']} clips: {headline(self.metrics)} "
            f"(frames in any order: balanced accuracy {shuffled:.3f})\n{self.path}/report.html"
        )
