"""What the routes answer, for OpenAPI."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Row(BaseModel):
    """The answer for one image."""

    image: str = Field(description="The file's name, or image-0000 and so on.")
    label: str | None = Field(description="Classes joined by `|`; null when the image cannot be decoded.")
    probability: float | None = Field(description="Of the label, calibrated.", ge=0, le=1)
    unknown: bool = Field(description="Whether the image resembles none that the model was trained on.")
    top: list[tuple[str, float]] = Field(description="Up to five classes with their probabilities.", max_length=5)
    error: str | None = Field(None, description="Why the image cannot be decoded; absent when it can.")


class HeatMap(BaseModel):
    """Which pixels mattered for one class."""

    image: str
    method: str = Field(description="The method, with its options.")
    target: str = Field(description="The class that is explained.")
    probability: float = Field(description="Of the target.", ge=0, le=1)
    unknown: bool
    map: list[list[float]] = Field(description="Rows of cells over the square that the model sees, 0 to 1.")
    square: list[float] = Field(
        description="The square in the image: left, top, right, bottom, as shares of its width and height."
    )
    overlay: str = Field(description="The square with the map over it, a PNG as a data URL.")


class Model(BaseModel):
    """What is served."""

    name: str
    foveal: str = Field(description="Version of the program.")
    task: Literal["single-label", "multi-label"]
    classes: list[str]
    backbone: str
    method: str
    preprocessing: dict[str, Any]
    engine: str
    precision: str
    threads: int
    limits: dict[str, float]
    explain: list[str] = Field(description="Methods that POST /explain takes.")
    metrics: dict[str, Any] = Field(description="Measured on the test split: value and 95% interval.")


class Health(BaseModel):
    status: Literal["live", "ready"]


class Problem(BaseModel):
    """Any answer with a status of 400 or more."""

    error: str
