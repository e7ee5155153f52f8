"""`foveal predict`: answers for new images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result
from foveal.verbs.fit import DeviceOption


def predict(
    bundle: Annotated[Path, "Bundle: folder made by `foveal fit`, or hub:owner/name; or the word zero-shot."],
    images: Annotated[list[Path], "Image files, or folders of images; for forecasts, tables of tracks."],
    *,
    labels: Annotated[
        str | None,
        "Classes in words, such as 'a cat,a dog': for zero-shot, which needs no Bundle, and for Bundles of image-text.",
    ] = None,
    device: DeviceOption = "auto",
    progress: Progress | None = None,
) -> Result:
    """Label images; what resembles no training image is answered `unknown`.

    With the word zero-shot in place of a Bundle, the labels' words alone make the classifier, on this machine. With
    zero-shot:OWNER/NAME, such as openai/clip-vit-base-patch32, they do so in published CLIP weights.

    Example: foveal predict runs/digits photo.png --json
    """
    progress = progress or Progress()
    answers = chosen(bundle, labels, progress)
    rows = answers.predict(
        images, device=device, progress=lambda done, total: progress.update("predicting", done, total)
    )
    return Result(rows, getattr(answers, "say", text))


def chosen(bundle: Path, labels: str | None, progress: Progress) -> Any:
    """What answers: a Bundle, or a classifier of the labels' words.

    Raises:
        UsageError: labels where they mean nothing, or none where they are needed.
    """
    from foveal.core.errors import UsageError
    from foveal.ship.bundle import load

    word, _, name = str(bundle).partition(":")
    if word == "zero-shot" and not Path(bundle).exists():
        from foveal.backbones.clip_weights import load_clip
        from foveal.ship.zero_shot import of_towers, zero_shot

        if labels is None:
            raise UsageError("zero-shot knows no classes of its own: say them, as in --labels 'a cat,a dog'")
        if name:
            return of_towers(load_clip(name), labels)
        return zero_shot(labels, progress=lambda done, total: progress.update("reading names", done, total))
    opened = load(bundle)
    asks = opened.manifest["task"] == "image-text"
    if asks and labels is None:
        raise UsageError(f"{bundle} knows no classes of its own: say them, as in --labels 'a cat,a dog'")
    if labels is not None and not asks:
        raise UsageError(f"{bundle} has its own classes: leave --labels out, or use zero-shot in place of the Bundle")
    return opened.with_labels(labels) if asks else opened


def text(rows: list[dict[str, Any]]) -> str:
    return "\n".join(line(row) for row in rows)


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['image']}  cannot be read: {row['error']}"
    answer = f"{row['label'] or '(no label)'}  {row['probability']:.3f}"
    return f"{row['image']}  {f'unknown (nearest: {answer})' if row['unknown'] else answer}"
