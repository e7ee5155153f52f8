"""Opening a Bundle of images and texts: vectors of both, and classifiers made of words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from foveal.backbones.adapter import rebuild_backbone
from foveal.backbones.causal_text import BYTES, rebuild_text
from foveal.backbones.text import TEMPLATES
from foveal.backbones.towers import Towers
from foveal.core.bundle import BundleFiles
from foveal.core.errors import BundleError, UsageError
from foveal.core.families.language import Language
from foveal.core.schema import MAX_JSON, OtherManifest, Stored, StoredBackbone
from foveal.data.open import open_images
from foveal.features.towers import encode_images, encode_texts
from foveal.ship.opened import Opened, must_fit, must_hold
from foveal.ship.zero_shot import ZeroShot, of_towers

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

TOKENIZER = "tokenizer.json"


class StoredText(Stored):
    """The language tower, and the SHA-256 of its tokenizer.json ('' when it reads bytes)."""

    kind: Literal["sentence", "causal"]
    shape: dict[str, Annotated[int, Field(ge=1, le=2**24)] | str]
    context: Annotated[int, Field(ge=2, le=2**20)]
    tokenizer: str


class ImageTextManifest(OtherManifest):
    """bundle.json of two towers."""

    backbone: StoredBackbone
    text: StoredText


def open_image_text(files: BundleFiles) -> ImageTextBundle:
    """
    Raises:
        BundleError: bundle.json lacks what two towers need.
    """
    must_hold(files, "bundle.json", files.manifest, ImageTextManifest)
    return ImageTextBundle(files)


@dataclass(frozen=True)
class ImageTextBundle(Opened):
    """An image tower and a language tower with one space. `with_labels` makes a classifier of words."""

    @cached_property
    def method(self) -> Language:
        return self.made_by(Language, "makes no two towers")

    @cached_property
    def tokenizer(self) -> str:
        """The JSON of the tokenizer, or 'bytes'.

        Raises:
            BundleError: tokenizer.json is missing or was edited.
        """
        wanted = self.manifest["text"]["tokenizer"]
        if not wanted:
            return BYTES
        try:
            with (self.path / TOKENIZER).open("rb") as file:
                content = file.read(MAX_JSON)
        except OSError as error:
            raise BundleError(f"{TOKENIZER} in Bundle {self.path} cannot be read ({error.strerror})") from None
        if hashlib.sha256(content).hexdigest() != wanted:
            raise BundleError(
                f"{TOKENIZER} in Bundle {self.path} was edited or is damaged: restore the folder or fit again"
            )
        return content.decode("utf-8")

    @cached_property
    @torch.inference_mode(False)
    def model(self) -> Towers:
        """The torch module; see `foveal.backbones.towers.Towers`."""
        method, tokenizer = self.method, self.tokenizer
        with must_fit(self.path):
            weights = load_file(self.path / "model.safetensors")
            held = sum(tensor.numel() for tensor in weights.values())
            text = rebuild_text(self.manifest["text"], tokenizer, most=held)
            towers: Any = method.finish(method.attach(rebuild_backbone(self.manifest["backbone"], most=held), text))
            towers.load_state_dict(weights)
            return towers.requires_grad_(False).eval()

    def embed_images(self, images: Iterable[Any], *, device: str = "auto") -> Tensor:
        """Unit vectors [n, dim] of files, folders, PIL images or uint8 arrays [H, W, 3].

        Raises:
            DataError: an image that cannot be decoded.
        """
        return encode_images(self.model, open_images(list(images)), self.preprocessing, device=device)

    def embed_texts(self, texts: Sequence[str], *, device: str = "auto") -> Tensor:
        """Unit vectors [n, dim] of texts.

        Raises:
            DataError: a text that is empty or too long.
        """
        return encode_texts(self.model, texts, device=device)

    def with_labels(self, labels: str | Sequence[str], templates: Sequence[str] = TEMPLATES) -> ZeroShot:
        """A classifier whose classes are words: each label's prompts are averaged and made unit again.

        Raises:
            UsageError: fewer than two labels, or one twice.
            DataError: no template, or one without {}.
        """
        return of_towers(self.model, labels, templates)

    def predict(
        self,
        images: str | Path | Image.Image | np.ndarray | Iterable[str | Path | Image.Image | np.ndarray],
        *,
        labels: str | Sequence[str] | None = None,
        device: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer for images with one of `labels`; see `ZeroShot.predict`.

        Raises:
            UsageError: no labels.
            DataError: no image, or none that can be decoded.
        """
        if labels is None:
            raise UsageError(f"{self.path} knows no classes of its own: say them, as in labels='a cat,a dog'")
        return self.with_labels(labels).predict(images, device=device, progress=progress)

    def to_text(self) -> str:
        image, text = self.manifest["backbone"]["name"], self.manifest["text"]["kind"]
        lines = [f"{self.manifest['method']['name']} on {image} and a {text} tower"]
        for key, title in (("image_to_text", "texts for images"), ("text_to_image", "images for texts")):
            found = self.metrics[key]
            said = ", ".join(f"R@{k} {found[f'r_at_{k}']['value']:.3f}" for k in (1, 5, 10))
            lines.append(
                f"{title}: {said}, median rank {found['median_rank']['value']:g} of {found['candidates']} "
                f"({found['n']} {self.metrics['split']} queries; chance of R@1 {found['chance']:.3f})"
            )
        return "\n".join([*lines, f"{self.path}/report.html"])
