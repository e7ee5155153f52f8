"""What the JSON files of a Bundle must hold for any verb to work; they may come from a stranger."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foveal.core.task import OTHER_TASKS, OtherTask

MAX_JSON = 64 * 2**20
"""Bytes of a JSON file that is read. The metrics of 100,000 classes fit."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Stored(BaseModel):
    """Types as written, keys that are not named here allowed."""

    model_config = ConfigDict(strict=True)


class Picture(Stored):
    """`Preprocessing`; bounded, so that no image can be asked to grow beyond memory."""

    size: Annotated[int, Field(ge=1, le=2048)]
    mean: Annotated[list[Finite], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    interpolation: Literal["bicubic", "bilinear"]
    crop: Annotated[float, Field(ge=0.5, le=1.5)]


class StoredBackbone(Stored):
    name: str
    arch: str
    args: dict[str, Any]
    preprocessing: Picture
    width: Annotated[int, Field(ge=1, le=2**20)]
    origin: str


class StoredMethod(Stored):
    name: str
    options: dict[str, Any]


class StoredStep(Stored):
    """A method that changed the structure of a model, and what rebuilds it; the method checks its plan itself."""

    name: str
    options: dict[str, Any]
    plan: dict[str, Any]


class StoredData(Stored):
    name: str
    source: str


class Manifest(Stored):
    """bundle.json of a classifier of images."""

    format: Annotated[int, Field(ge=1)]
    task: Literal["single-label", "multi-label"]
    classes: Annotated[list[str], Field(min_length=1)]
    backbone: StoredBackbone
    method: StoredMethod
    steps: Annotated[list[StoredStep], Field(max_length=16)] = []
    head: dict[str, list[Annotated[int, Field(ge=1, le=2**24)]]] = {}
    """With steps: the shapes of the head's tensors before the first of them."""
    data: StoredData
    why: str
    request: dict[str, Any]
    sha256: dict[str, str]


class OtherManifest(Stored):
    """bundle.json of a model for another task, which checks what it adds when it is opened."""

    format: Annotated[int, Field(ge=1)]
    task: OtherTask
    method: StoredMethod
    data: StoredData
    why: str
    request: dict[str, Any]
    sha256: dict[str, str]


class StoredTemperature(Stored):
    value: Positive


class StoredUnknown(Stored):
    name: str
    threshold: Finite


class Calibration(Stored):
    """calibration.json."""

    temperature: StoredTemperature
    unknown: StoredUnknown


class Figure(Stored):
    """A metric with its interval; None where it is not defined."""

    value: Finite | None
    low: Finite | None = None
    high: Finite | None = None


class Metrics(Stored):
    """metrics.json."""

    n: int
    split: str
    accuracy: Figure | None = None
    balanced_accuracy: Figure | None = None
    macro_f1: Figure | None = None
    auroc: Figure | None = None
    ece: Figure | None = None


class AnyObject(Stored):
    """Any object."""


SCHEMAS: dict[str, type[Stored]] = {
    "bundle.json": Manifest,
    "calibration.json": Calibration,
    "metrics.json": Metrics,
    "cost.json": AnyObject,
}
OTHER_SCHEMAS: dict[str, type[Stored]] = {
    "bundle.json": OtherManifest,
    "calibration.json": AnyObject,
    "metrics.json": AnyObject,
    "cost.json": AnyObject,
}


def read_json(path: Path) -> Any:
    """A JSON file of at most MAX_JSON bytes, with finite numbers only.

    Raises:
        ValueError: too large, too deep, not JSON, NaN or infinite numbers.
    """
    with path.open("rb") as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise ValueError(f"more than {MAX_JSON >> 20} MiB")
    try:
        return json.loads(content.decode("utf-8"), parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("lists within lists, too deep to read") from None


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def faults(name: str, content: Any, task: str) -> str:
    """What is wrong with the content of the JSON file of a Bundle for a task, in one line; '' if nothing is."""
    try:
        (OTHER_SCHEMAS if task in OTHER_TASKS else SCHEMAS)[name].model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or name}: {first['msg']}"
    return ""
