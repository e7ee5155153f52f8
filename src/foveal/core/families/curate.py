"""The curate family: a pool of images -> those worth keeping, with a reason for every image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from foveal.core.errors import UsageError
from foveal.core.method import Method


@dataclass(frozen=True)
class Selection:
    """What a method kept of n images.

    Attributes:
        exemplar: int64 [n], the image that stands for each: its own number where it is kept.
        distance: float32 [n], from each image to its exemplar, in the method's own unit.
        score: float32 [n], the method's own measure of an image.
        reasons: one line per image: why it was kept or dropped.
        chosen: the settings that were decided on the way, such as the radius that `keep` led to.
        curve: rows of a setting and how many images it keeps; the first key is the setting's name.
        audit: figures of the pool before and after.
        notes: what a person should know before trusting it.
    """

    exemplar: np.ndarray
    distance: np.ndarray
    score: np.ndarray
    reasons: Sequence[str]
    chosen: Mapping[str, Any] = field(default_factory=dict[str, Any])
    curve: Sequence[Mapping[str, float]] = ()
    audit: Mapping[str, float] = field(default_factory=dict[str, float])
    notes: Sequence[str] = ()

    @property
    def kept(self) -> np.ndarray:
        """bool [n]."""
        return self.exemplar == np.arange(len(self.exemplar))


class Curate(Method):
    """A pool of images -> a `Selection`. Labels are not read; images of different groups never stand for another."""

    def reads(self) -> Literal["pixels", "features"]:
        """Whether `select` is given what `look` says of each image, or features of a frozen backbone."""
        return "pixels"

    def look(self, image: Image.Image) -> np.ndarray:
        """What has to be known of one image: an array, of one shape and type for all. Called from several threads.

        Args:
            image: upright RGB; grey of more than 8 bits as it is in its file (modes that begin with I or F).

        Raises:
            DataError: this image cannot be used; it is set aside.
            UsageError: no image can be used until an option is set.
        """
        raise UsageError(f"{self.name} does not look at pixels")

    def select(self, seen: np.ndarray, groups: np.ndarray, keep: float | None) -> Selection:
        """
        Args:
            seen: [n, ...], of `look`, or features [n, D]; in the order of the images' names. Never changed.
            groups: int64 [n], numbered from 0.
            keep: share of the images to keep at most, in 0..1; None leaves it to the options.

        Raises:
            UsageError: the share cannot be met, or contradicts an option.
        """
        raise UsageError(f"{self.name} makes no selection")
