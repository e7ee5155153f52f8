"""The embedding behind a library: images, and in many also words, -> unit vectors of one space."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from foveal.backbones.adapter import DEFAULT, Backbone, load_backbone, rebuild_backbone
from foveal.backbones.causal_text import describe_text, rebuild_text
from foveal.backbones.class_rows import rows_for
from foveal.backbones.clip_weights import load_clip
from foveal.backbones.pair import state_hash
from foveal.backbones.towers import Towers
from foveal.backbones.weights import read_tensors
from foveal.core.bundle import sha256
from foveal.core.errors import BackboneError, BundleError, UsageError
from foveal.core.folders import atomic_file
from foveal.core.schema import StoredBackbone
from foveal.evaluate.embedding import unit
from foveal.features.towers import encode_texts
from foveal.ship.bundle import load
from foveal.ship.hub import on_hub
from foveal.ship.library import WEIGHTS, Library

BY_NAME = ("package ", "hub:")
"""How the origin of weights begins that can be had again by the backbone's name."""
READERS = (
    f"--backbone {DEFAULT} (the default: words near ImageNet's classes), a Bundle of images and texts "
    "(`foveal fit pairs.csv --method clip`), or zero-shot:OWNER/NAME (published CLIP weights)"
)


@dataclass(frozen=True)
class Embedder:
    """Features of a backbone -> unit vectors: as they are, or through a head; and words, where it reads them.

    Attributes:
        head: what features go through, or None.
        towers: the image tower (`backbone` and `head`) with the language tower that shares its space, or None.
    """

    backbone: Backbone
    head: nn.Linear | None = None
    towers: Towers | None = None

    @property
    def width(self) -> int:
        return self.backbone.width if self.head is None else self.head.out_features

    @property
    def reads(self) -> str | None:
        """What reads words: 'towers', 'class rows' (an ImageNet classifier that the package has), or None."""
        if self.towers is not None:
            return "towers"
        return "class rows" if self.head is None and self.backbone.origin.startswith("package ") else None

    def vectors(self, features: np.ndarray) -> np.ndarray:
        """Features [n, backbone width] -> unit vectors [n, width]."""
        if self.head is not None:
            with torch.inference_mode():
                features = self.head(torch.from_numpy(np.array(features, np.float32))).numpy()
        return unit(features)

    def words(
        self, text: str, *, offline: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """The unit vector [1, width] of a text.

        Of towers it is the text's own; else the direction in which an ImageNet network's features speak for it, see
        `foveal.backbones.class_rows`.

        Raises:
            UsageError: no text, or none can be read.
            DataError: a text that is too long.
            MissingExtra: the sentence encoder is not installed.
        """
        if not text.strip():
            raise UsageError("no words to search for: give some, such as --text 'a cat'")
        if self.towers is not None:
            return unit(encode_texts(self.towers, [text], device="cpu").numpy())
        refusal = f"{self.backbone.name} reads images and no text: search with --image, or index with {READERS}"
        if self.head is not None or not self.backbone.origin.startswith(BY_NAME):
            raise UsageError(refusal)
        try:
            return unit(rows_for([text], backbone=self.backbone.name, offline=offline, progress=progress).numpy())
        except BackboneError as error:
            raise UsageError(f"{refusal} ({error})") from None

    def describe(self) -> dict[str, Any]:
        """What a library remembers of it."""
        return {
            "backbone": self.backbone.describe(),
            "fingerprint": self.backbone.fingerprint(),
            "width": self.width,
            "text": None if self.towers is None else describe_text(self.towers.text),
        }

    def fingerprint(self) -> str:
        """Changes with any weight that a vector depends on."""
        rest = self.head if self.towers is None else self.towers
        own = self.backbone.fingerprint()
        return own if rest is None else hashlib.sha256(f"{own} {state_hash(rest)}".encode()).hexdigest()[:32]

    def travels(self) -> bool:
        """Whether its weights cannot be had by name, and so must lie in the library."""
        return self.head is not None or not self.backbone.origin.startswith(BY_NAME)

    def save(self, path: Path) -> None:
        """Write the weights, with the tokenizer of towers among their metadata."""
        from safetensors.torch import save_file

        if self.towers is not None:
            tensors, about = self.towers.state_dict(), {"tokenizer": self.towers.text.tokenizer}
        else:
            tensors = {f"backbone.{name}": tensor for name, tensor in self.backbone.model.state_dict().items()}
            tensors |= {
                f"head.{name}": tensor for name, tensor in (self.head.state_dict() if self.head else {}).items()
            }
            about = None
        with atomic_file(path) as staging:
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, staging, about)


def load_embedder(name: str, *, offline: bool = False) -> Embedder:
    """The embedding that --backbone names.

    Args:
        name: as `load_backbone` takes it; or a Bundle of images and texts, or zero-shot:NAME of published CLIP weights
            (OWNER/NAME of the Hub, or a folder).

    Raises:
        UsageError: a Bundle of another task.
        BackboneError, BundleError, HubError: it cannot be had.
    """
    word, _, clip = name.partition(":")
    if word == "zero-shot" and clip:
        towers = load_clip(clip, offline=offline)
    elif on_hub(name) or (Path(name) / "bundle.json").is_file():
        bundle = load(name, offline=offline)
        if bundle.manifest["task"] != "image-text":
            raise UsageError(
                f"--backbone {name} is a Bundle for {bundle.manifest['task']}, whose vectors mean its classes alone: "
                f"give the name of its backbone, {bundle.manifest['backbone']['name']}, or to search by words {READERS}"
            )
        towers = bundle.model
    else:
        return Embedder(load_backbone(DEFAULT if word == "zero-shot" else name, offline=offline))
    return Embedder(towers.image, towers.image_proj, towers)


def embedder_of(library: Library, *, offline: bool) -> Embedder:
    """The embedding that a library was made by.

    Raises:
        BundleError: its weights are damaged, or the backbone of that name has other ones now.
    """
    about = library.about
    again = "restore the library or index again"
    try:
        StoredBackbone.model_validate(about["backbone"])
    except (ValidationError, KeyError):
        raise BundleError(f"{library.path} does not say what backbone made it: {again}") from None
    if not about.get("weights"):
        backbone = load_backbone(about["backbone"]["name"], offline=offline)
        if backbone.fingerprint() != about["fingerprint"]:
            raise BundleError(f"{backbone.name} has other weights than those {library.path} was made with: index again")
        return Embedder(backbone)
    file = library.path / WEIGHTS
    if not file.is_file() or sha256(file) != about["weights"]:
        raise BundleError(f"{file} is missing, was edited or is damaged: {again}")
    if about.get("text"):
        return with_towers(file, about)
    tensors = read_tensors(file)
    own = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    backbone = rebuild_backbone(about["backbone"], own)
    head = None
    if "head.weight" in tensors:
        width, wide = tensors["head.weight"].shape
        head = nn.Linear(wide, width).requires_grad_(False)
        head.load_state_dict({"weight": tensors["head.weight"], "bias": tensors["head.bias"]})
    return Embedder(backbone, head)


def with_towers(file: Path, about: dict[str, Any]) -> Embedder:
    """
    Raises:
        BundleError: the weights are not those that library.json tells of.
    """
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as opened:
            tokenizer = opened.metadata()["tokenizer"]
        tensors = read_tensors(file)
        held = sum(tensor.numel() for tensor in tensors.values())
        towers = Towers(
            rebuild_backbone(about["backbone"], most=held),
            rebuild_text(about["text"], tokenizer, most=held),
            len(tensors["image_proj.weight"]),
            bias="image_proj.bias" in tensors,
        )
        towers.load_state_dict(tensors)
    except Exception as error:  # modules meet tensors of other shapes, types and numbers with errors of any type
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise BundleError(f"{file} does not fit library.json ({reason}): restore the library or index again") from None
    towers.requires_grad_(False).eval()
    return Embedder(towers.image, towers.image_proj, towers)
