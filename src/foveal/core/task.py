"""What a model is asked."""

from __future__ import annotations

from typing import Literal, get_args

Task = Literal["single-label", "multi-label"]
"""Of a classifier of images: one label per image, or any number of them."""

OtherTask = Literal["landmarks", "video", "forecast", "image-text"]
"""Points in an image, a label for a clip, where agents go, images and texts in one space."""

OTHER_TASKS: tuple[OtherTask, ...] = get_args(OtherTask)
