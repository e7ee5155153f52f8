"""What every Bundle shows of itself, whatever its task."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from foveal.core import catalogue
from foveal.core.bundle import BundleFiles
from foveal.core.errors import BundleError
from foveal.core.method import Method
from foveal.core.options import parse_options
from foveal.core.preprocessing import Preprocessing

F = TypeVar("F", bound=Method)


@dataclass(frozen=True)
class Opened:
    """A Bundle's verified files, and what they say. Subclasses have `predict` and `to_text`."""

    files: BundleFiles

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def manifest(self) -> dict[str, Any]:
        return self.files.manifest

    @property
    def metrics(self) -> dict[str, Any]:
        return self.files.metrics

    @property
    def calibration(self) -> dict[str, Any]:
        return self.files.calibration

    @property
    def cost(self) -> dict[str, Any]:
        return self.files.cost

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.from_dict(self.manifest["backbone"]["preprocessing"])

    def made_by(self, family: type[F], otherwise: str) -> F:
        """The method that made this Bundle, with its options.

        Args:
            otherwise: what a method of another family does not do.

        Raises:
            BundleError: it is of another family.
        """
        chosen = self.manifest["method"]
        cls = catalogue.get(chosen["name"])
        method = cls(parse_options(cls.Options, chosen["options"], chosen["name"]))
        if not isinstance(method, family):
            raise BundleError(f"Bundle {self.path} was made by {method.name}, which {otherwise}")
        return method

    def to_dict(self) -> dict[str, Any]:
        return {"bundle": str(self.path), "metrics": self.metrics, "cost": self.cost}


@contextmanager
def must_fit(path: Path) -> Generator[None]:
    """Around what makes a Bundle's network of its weights.

    Raises:
        BundleError: they do not fit what bundle.json says.
    """
    try:
        yield
    except Exception as error:  # modules meet tensors of other shapes, types and numbers with errors of any type
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise BundleError(
            f"the weights of Bundle {path} do not fit its bundle.json ({reason}): restore the folder or fit again"
        ) from None


def must_hold(files: BundleFiles, name: str, content: Any, schema: type[BaseModel]) -> None:
    """
    Raises:
        BundleError: a JSON file of the Bundle lacks what its task needs.
    """
    try:
        schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{name} in Bundle {files.path} is not as foveal writes it ({where}: {first['msg']}): "
            "restore it or fit again"
        ) from None
