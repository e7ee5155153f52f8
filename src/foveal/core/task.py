"""What a classifier is asked: one label per image, or any number of them."""

from __future__ import annotations

from typing import Literal

Task = Literal["single-label", "multi-label"]
