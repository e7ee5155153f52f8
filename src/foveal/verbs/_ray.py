"""Ray: how a cluster is reached, the trials of a comparison as its tasks, and a feature table through Ray Data.

Frozen features, labels and splits go to the nodes through Ray's object store, once. A trial that trains through the
backbone opens the data by their name, on its node.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import socket
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from foveal.backbones.adapter import Backbone, rebuild_backbone
from foveal.core.errors import BackboneError, DataError, FovealError, MissingExtra, UsageError
from foveal.core.method import Task
from foveal.core.progress import Progress
from foveal.data.dataset import Dataset, Files, Memory
from foveal.data.open import open_dataset
from foveal.data.pieces import Listed, Piece, Pieces
from foveal.data.scan import SCAN
from foveal.features.extract import Extraction
from foveal.features.session import Session, cpu_threads, feature_session
from foveal.features.table import About, Shard, read_shard, shard_path, write_shard
from foveal.verbs._adapt import FrozenRows, choose
from foveal.verbs._prepare import Prepared
from foveal.verbs._trials import Outcome, Terms, measured
from foveal.verbs.reproduce import versions

RETRIES = 5
"""How often a trial starts again after its node or process died."""
REACH_S = 5.0
SETTINGS = b"\x04"
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00" + SETTINGS + b"\x00\x00\x00\x00\x00"
EQUAL = ("python", "foveal", "torch", "timm")
"""Versions that must be those of this machine on every node, for the table to be a local run's."""


@contextmanager
def cluster(address: str) -> Generator[Any]:
    """The `ray` module, connected; a connection that the caller made before is used and kept.

    Args:
        address: 'local' (a cluster of this machine's processors, gone afterwards), 'auto' (the cluster this machine
            belongs to, or $RAY_ADDRESS), or HOST:PORT of a cluster this machine belongs to.

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: no cluster answers there, or it runs other versions.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray", "ray", "--ray") from None
    if ray.is_initialized():
        yield ray
        return
    knock(address)
    here: dict[str, Any] = {"num_cpus": cpu_threads(), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except Exception as error:  # ConnectionError, RuntimeError, TimeoutError and others, by what failed
        raise unreachable(address, error) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """Whether a server like Ray's listens there: Ray itself would wait for minutes.

    Ray speaks gRPC, hence HTTP/2, in which both sides begin with their settings (RFC 9113, section 3.4).

    Raises:
        UsageError: nobody answers like that, or it is no address.
    """
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[\w.:\[\]-]+", host) or not port.isdigit():
        raise UsageError(f"--ray {address}: expected local, auto or HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S) as connection:
            connection.sendall(GREETING)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise unreachable(address, error) from None
    if answer[3:4] != SETTINGS and not os.environ.get("RAY_USE_TLS"):
        raise unreachable(address, ConnectionError("something else listens there"))


def unreachable(address: str, error: Exception) -> UsageError:
    told = " ".join(str(error).split())
    if "ersion mismatch" in told:
        return UsageError(f"--ray {address}: the cluster runs other versions than this machine ({told[:300]})")
    return UsageError(
        f"--ray {address}: no Ray cluster answers there ({told[:160] or type(error).__name__}): start one with "
        "`ray start --head`, or use --ray local"
    )


def everywhere(data: str | Path | Dataset) -> str | Dataset:
    """DATA by a name that means the same in any folder: a path is made absolute."""
    if isinstance(data, Dataset):
        return data
    text = os.fspath(data)
    return text if text.startswith(("sample:", "hub:")) else os.path.abspath(os.path.expanduser(text))


@dataclass(frozen=True)
class Shipped:
    """What a node needs of the prepared data."""

    name: str
    ids: list[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    task: Task
    groups: np.ndarray
    X: np.ndarray | None
    """Features, where a trial reads them."""
    backbone: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str | Dataset
    offline: bool
    versions: dict[str, str]

    @staticmethod
    def of(prepared: Prepared, data: str | Path | Dataset, *, features: bool, offline: bool) -> Shipped:
        dataset, backbone = prepared.dataset, prepared.backbone
        return Shipped(
            dataset.name,
            list(dataset.ids),
            dataset.labels,
            dataset.classes,
            dataset.task,
            prepared.groups,
            np.asarray(prepared.extraction.X) if features else None,
            backbone.describe(),
            tensors_of(backbone),
            everywhere(data),
            offline,
            versions(),
        )

    def prepared(self, images: bool) -> Prepared:
        """As it was where the trials come from; with `images`, opened here.

        Raises:
            DataError: the data are not on this node, or other ones are.
        """
        dataset = Dataset(self.name, self.ids, self.labels, self.classes, self.task, None, Memory([]))
        if images:
            found = opened(self.source, self.offline) if isinstance(self.source, str) else self.source
            row_of = {name: row for row, name in enumerate(found.ids)}
            missing = [name for name in self.ids if name not in row_of]
            if missing:
                raise DataError(
                    f"{self.source} on node {platform.node()} lacks {len(missing)} of the {len(self.ids)} images "
                    f"(first: {missing[0]}): share the folder with every node"
                )
            there = found.subset([row_of[name] for name in self.ids])
            dataset = Dataset(self.name, self.ids, self.labels, self.classes, self.task, None, there.source)
        extraction = Extraction(cast(Any, self.X), np.zeros(0, SCAN), [], {}, "ray", 1, 0)
        backbone = rebuild_backbone(self.backbone, dict(self.tensors))
        return Prepared(dataset, backbone, extraction, self.groups, str(self.source))


@lru_cache(maxsize=1)
def opened(source: str, offline: bool) -> Dataset:
    try:
        return open_dataset(source, offline=offline)
    except DataError as error:
        raise DataError(f"on node {platform.node()}: {error} (share the data with every node)") from None


def check_versions(wanted: dict[str, str]) -> None:
    """Refuse to compute on a node what would not be comparable.

    Raises:
        UsageError: naming what differs.
    """
    here = versions()
    other = [f"{name} {here[name]} (expected {wanted[name]})" for name in EQUAL if here[name] != wanted[name]]
    if other:
        raise UsageError(
            f"node {platform.node()} has {', '.join(other)}: install the versions of the machine that starts the run"
        )


def trial(
    shipped: Shipped, name: str, seed: int, splits: np.ndarray, terms: Terms, threads: int
) -> tuple[str, dict[str, Any] | str]:
    """One trial, on a node: ('row', the row), ('refused', why) or ('failed', why)."""
    torch.set_num_threads(threads)
    shared = terms.folder.is_dir()
    try:
        check_versions(shipped.versions)
        frozen = choose(name).reads_features()
        prepared = shipped.prepared(images=not frozen)
        rows = FrozenRows(prepared, splits, seed, terms.class_weights) if frozen else None
        with nullcontext(terms.folder) if shared else tempfile.TemporaryDirectory(prefix="foveal-") as folder:
            there = Terms(terms.class_weights, terms.device, terms.budget, Path(folder))
            return "row", measured(name, seed, prepared, splits, rows, there, Progress())
    except BackboneError as refusal:
        return "refused", str(refusal)
    except FovealError as error:
        return "failed", str(error)


def on_ray(
    ray: Any, shipped: Shipped, splits: dict[int, np.ndarray], trials: list[tuple[str, int]], terms: Terms,
    progress: Progress,
) -> Iterator[Outcome]:  # fmt: skip
    """Outcomes as they come, from any node. Trials of a node or process that died start again elsewhere.

    Raises:
        FovealError: a trial failed, or died more than RETRIES times.
    """
    nodes = alive(ray)
    threads, gpu = share(nodes, len(trials), terms.device)
    task = ray.remote(max_retries=RETRIES, num_cpus=threads)(trial)
    data = ray.put(shipped)
    splits_of = {seed: ray.put(each) for seed, each in splits.items()}
    waiting: dict[Any, tuple[str, int]] = {}
    for name, seed in trials:
        wants = task if choose(name).reads_features() else task.options(num_gpus=gpu)
        waiting[wants.remote(data, name, seed, splits_of[seed], terms, threads)] = (name, seed)
    progress.say(f"{len(trials)} trials on {len(nodes)} nodes, {threads} threads each")
    count = len(nodes)
    try:
        while waiting:
            progress.update("trials", len(trials) - len(waiting), len(trials))
            ready, _ = ray.wait(list(waiting), timeout=1.0)
            left = len(alive(ray))
            if left < count:
                progress.say(f"{count - left} of {count} nodes lost: their trials start again on the other {left}")
            count = left
            for reference in ready:
                name, seed = waiting.pop(reference)
                kind, found = fetched(ray, reference, name, seed)
                if kind == "failed":
                    raise FovealError(f"{name}, seed {seed}: {found}")
                yield name, seed, BackboneError(found) if isinstance(found, str) else found
        progress.update("trials", len(trials), len(trials))
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def fetched(ray: Any, reference: Any, name: str, seed: int) -> tuple[str, dict[str, Any] | str]:
    """What a trial gave.

    Raises:
        FovealError: its process died too often, or foveal is not installed where it ran.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if "No module named" in str(error):
            lacking = str(error).splitlines()[-1].strip()
            raise UsageError(f"a node cannot import foveal ({lacking}): install foveal there") from None
        raise
    except ray.exceptions.RayError as error:
        why = " ".join(str(error).split())[:200]
        raise FovealError(
            f"{name}, seed {seed}: its process died {RETRIES + 1} times on the cluster ({why}); finished rows are "
            "kept, and the same command goes on"
        ) from None


def alive(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def share(nodes: list[dict[str, Any]], trials: int, device: str) -> tuple[int, int]:
    """Processors for a trial, so that all find something to do; and GPUs for one that trains."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    threads = max(1, min(max(cpus, default=1), sum(cpus) // max(trials, 1)))
    return threads, int(device != "cpu" and gpus > 0)


class Embedder:
    """A process that makes shards of a feature table, for as long as Ray Data has pieces for it."""

    def __init__(
        self, out: str, about: About, described: dict[str, Any], tensors: dict[str, Tensor], device: str,
        wanted: dict[str, str],
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)
        self.out, self.about, self.device = Path(out), about, device
        self.wanted = wanted
        self.backbone = rebuild_backbone(described, dict(tensors))
        self.session: Session | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """{'piece': pieces} -> {'made': number and shard, or what went wrong, as JSON}."""
        return {"made": [json.dumps(self.make(piece)) for piece in batch["piece"]]}

    def make(self, piece: Piece) -> dict[str, Any]:
        try:
            check_versions(self.wanted)
            if not (self.out / "table.json").is_file():
                raise UsageError(f"node {platform.node()} does not see {self.out}: choose an --out that nodes share")
            self.session = self.session or feature_session(self.backbone, device=self.device)
            shard = write_shard(self.out, piece, self.about, self.session)
            return {"number": piece.number, "shard": vars(shard)}
        except FovealError as error:
            return {"failed": str(error)}


def shards_on_ray(
    ray: Any, out: Path, pieces: Pieces, about: About, backbone: Backbone, device: str, progress: Progress
) -> Iterator[tuple[int, Shard]]:
    """Shards made by one process per processor (or GPU) of the cluster; those that are there already are kept.

    Raises:
        FovealError: a node cannot read the data or write the table.
    """
    wanted: list[dict[str, Piece]] = []
    for piece in pieces.cut:
        kept = read_shard(shard_path(out, piece.number), piece.stamp, about)
        if kept is None:
            wanted.append({"piece": sendable(piece)})
        else:
            yield piece.number, kept
    if not wanted:
        return
    nodes = alive(ray)
    gpus = int(sum(node["Resources"].get("GPU", 0) for node in nodes)) if device != "cpu" else 0
    places = gpus or int(sum(node["Resources"].get("CPU", 0) for node in nodes))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    made = ray.data.from_items(wanted, override_num_blocks=len(wanted)).map_batches(
        Embedder,
        fn_constructor_args=(
            str(out), about, backbone.describe(), tensors_of(backbone), device, versions(),
        ),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(places, len(wanted)))),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )  # fmt: skip
    progress.say(f"{len(wanted)} shards on {len(nodes)} nodes, up to {min(places, len(wanted))} at a time")
    try:
        for done, row in enumerate(made.iter_rows(), start=1):
            found = json.loads(row["made"])
            if "failed" in found:
                raise FovealError(found["failed"])
            progress.update("shards", done, len(wanted))
            yield found["number"], Shard(**found["shard"])
    except ray.exceptions.RayError as error:
        why = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
        raise FovealError(
            f"the cluster gave up ({why}); finished shards are kept, and the same command goes on"
        ) from error


def sendable(piece: Piece) -> Piece:
    """A piece without anything that only this process can read, such as a temporary file."""
    if not isinstance(piece, Listed) or isinstance(piece.images.source, Files | Memory):
        return piece
    images = piece.images
    return Listed(piece.number, replace(images, source=Memory([images.source.read(row) for row in range(len(images))])))


def tensors_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor.cpu() for name, tensor in backbone.state_dict().items()}
