"""One way from a torch module to an ONNX file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

OPSET = 18


def to_onnx(
    module: nn.Module,
    example: Sequence[Tensor],
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
) -> None:
    """Write `module` as one ONNX file of opset 18.

    Uses torch's tracing exporter, which takes seconds where the newer one takes tens of seconds and needs another
    package. The traced code may hold no branch that depends on the image.

    Args:
        example: inputs to trace with.
        dynamic: for each input or output, the axes that may vary and their names.
    """
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(example),
                str(path),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: dict(axes) for name, axes in dynamic.items()},
                opset_version=OPSET,
                dynamo=False,
            )
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
