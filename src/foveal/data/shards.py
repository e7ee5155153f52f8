"""WebDataset shards: tar files of KEY.jpg beside KEY.cls, KEY.json or KEY.txt, read in place."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from foveal.core.errors import DataError
from foveal.data.dataset import MAX_BYTES, Dataset, Ranges, printable, unique
from foveal.data.folder import is_image
from foveal.data.table import Table, assemble

LABELS = (".cls", ".json", ".txt")
MAX_LABEL_BYTES = 2**16
MAX_HEADER_BYTES = 2**20
MAX_SHARDS = 100_000
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Header(tarfile.TarInfo):
    """A tar header whose names and extensions are bounded, and whose sizes do not lead backwards."""

    def _proc_member(self, archive: Any) -> Any:
        if self.size < 0 or (self.type in EXTENDED and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


@dataclass
class Member:
    """What a shard holds under one key: the image's place, and the labels by their kind of file."""

    image: tuple[str, int, int] | None = None
    labels: dict[str, bytes] = field(default_factory=dict)


def open_shards(pattern: str) -> Dataset:
    """A .tar file, or several: shard-{000..003}.tar, {a,b}.tar. Nothing is unpacked; images are read where they lie.

    Raises:
        DataError: a shard is missing, compressed, cut short or no tar file; no labelled image in any.
    """
    paths = expand(os.path.expanduser(pattern))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{printable(missing[0])} does not exist ({len(missing)} of {len(paths)} shards missing): "
            "give a .tar file or a pattern such as shard-{000..003}.tar"
        )
    ids: list[str] = []
    places: list[tuple[int, int, int]] = []
    table = Table(printable(os.path.basename(pattern)), [], [], [], [])
    unlabelled: list[tuple[str, str]] = []
    for shard, path in enumerate(paths):
        prefix = f"{os.path.basename(path)}/" if len(paths) > 1 else ""
        for member in index(path).values():
            if member.image is None:
                continue
            name, offset, size = member.image
            identity = printable(prefix + name)
            label = label_of(member.labels)
            if label is None or size > MAX_BYTES:
                reason = f"no label beside it ({', '.join(LABELS)})" if label is None else "larger than is read"
                unlabelled.append((identity, reason))
                continue
            ids.append(identity)
            places.append((shard, offset, size))
            table.label.append(label)
            table.where.append(identity)
    if not ids:
        reason = f"{len(unlabelled)} images without a label" if unlabelled else "no images"
        raise DataError(f"{table.name} holds {reason}: expected KEY.jpg beside KEY.cls, KEY.json or KEY.txt")
    shards, offsets, sizes = np.array(places, np.int64).T
    dataset = assemble(table, unique(ids), Ranges(paths, shards.astype(np.uint32), offsets, sizes), {})
    return Dataset(
        dataset.name,
        dataset.ids,
        dataset.labels,
        dataset.classes,
        dataset.task,
        None,
        dataset.source,
        tuple(unlabelled),
    )


def expand(pattern: str) -> list[str]:
    """File names of a brace pattern, in its order: {000..003} counts (as wide as written), {a,b} lists."""
    pieces: list[Sequence[str]] = []
    for literal, braces in re.findall(r"([^{}]*)(\{[^{}]*\})?", pattern):
        pieces.append([literal])
        if not braces:
            continue
        inner = braces[1:-1]
        counted = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", inner)
        if counted:
            first, last = int(counted[1]), int(counted[2])
            if not first <= last < first + MAX_SHARDS:
                raise DataError(f"pattern {braces}: expected a range upwards of at most {MAX_SHARDS} shards")
            pieces.append([str(number).zfill(len(counted[1])) for number in range(first, last + 1)])
        elif "," in inner:
            pieces.append(inner.split(","))
        else:
            raise DataError(f"pattern {braces}: expected {{000..003}} or {{a,b}}")
    if math.prod(map(len, pieces)) > MAX_SHARDS:
        raise DataError(f"pattern {printable(pattern)}: expected at most {MAX_SHARDS} shards")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def index(path: str) -> dict[str, Member]:
    """Members of one tar file by key: the path up to the first dot of its last part."""
    found: dict[str, Member] = {}
    try:
        with tarfile.open(path, "r:", tarinfo=Header) as tar:
            for name, offset, size in files_of(tar):
                folder, base = os.path.split(name)
                stem, dot, ending = base.partition(".")
                if not stem or not dot:
                    continue
                member = found.setdefault(os.path.join(folder, stem), Member())
                suffix = "." + ending.lower()
                if suffix in LABELS and size <= MAX_LABEL_BYTES:
                    with open(path, "rb") as file:
                        member.labels[suffix] = os.pread(file.fileno(), size, offset)
                elif is_image(base) and member.image is None:
                    member.image = (name, offset, size)
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # tarfile meets damaged headers with errors of any type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{printable(path)} is not a whole, uncompressed tar file ({reason}): get it again, or gunzip it"
        ) from None
    return found


def files_of(tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its bytes, size) of every regular file; what was passed is forgotten, to keep memory flat."""
    while (member := tar.next()) is not None:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
        if member.isreg() and not member.issparse():
            yield member.name, member.offset_data, member.size
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {tar.offset}")


def label_of(labels: dict[str, bytes]) -> Sequence[str] | str | None:
    """The label text of the first label file that has one: KEY.cls, KEY.json ({"label": ...}), KEY.txt."""
    for suffix in LABELS:
        if suffix not in labels:
            continue
        text = labels[suffix].decode("utf-8", "backslashreplace").strip()
        value: Any = text
        if suffix == ".json":
            try:
                stored = json.loads(text)
            except (ValueError, RecursionError):
                continue
            value = stored.get("label", stored.get("labels")) if isinstance(stored, dict) else None
        if isinstance(value, list):
            return [str(one) for one in value]
        if value is not None and str(value).strip():
            return str(value).strip()
    return None
