"""CSV and Parquet tables of tracks: agent, time, x, y, and if you like map and split.

A row is where an agent was at a time, in seconds. `map`, relative to the table's folder, is an image of what is around
the agent at that row: the agent in its middle, the way it moves up. With a column map, forecasts start at the rows that
have one; without, at every row with enough steps before it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveal.core.errors import DataError
from foveal.core.families.motion import MAP_SIDE
from foveal.data.dataset import Dataset, Files, Memory, Source, printable
from foveal.data.folder import SPLIT_NAMES
from foveal.data.points import csv_columns, numbers
from foveal.data.split import Stock
from foveal.data.table import check_columns, reading

EXPECTED = "expected columns agent, time, x and y, and if you like map and split"
COLUMNS = ("agent", "time", "x", "y")
LARGEST = 1e12
"""Of the numbers that are read; networks count in float32."""
UNEVEN = 0.01
"""Share of a step by which a time may be off."""


@dataclass(frozen=True, eq=False)
class Tracks:
    """Rows of a table, sorted by agent and then by time; an agent's rows are one step apart.

    Attributes:
        agents: names, in sorted order.
        agent: int64 [n], index into `agents`.
        time: float64 [n], seconds.
        xy: float64 [n, 2], in the data's unit.
        maps: the images of the column map; None when there is no such column.
        map_of: int64 [n], which image is the row's map; -1: none.
        splits: 'train', 'val' or 'test' of each agent, or None.
        dt: seconds of a step.
    """

    name: str
    agents: tuple[str, ...]
    agent: np.ndarray
    time: np.ndarray
    xy: np.ndarray
    maps: Dataset | None
    map_of: np.ndarray
    splits: np.ndarray | None
    dt: float

    def __len__(self) -> int:
        return len(self.xy)

    def without_maps(self) -> Tracks:
        return replace(self, maps=None, map_of=np.full(len(self), -1, np.int64))

    def starts(self, history: int, future: int) -> np.ndarray:
        """Rows to forecast from: `history` rows of the same agent before, `future` after, and a map if there are any.

        Raises:
            DataError: there is none.
        """
        row = np.arange(len(self))
        there = (row >= history) & (row < len(self) - future)
        there[there] = self.agent[row[there] - history] == self.agent[row[there] + future]
        if not there.any():
            longest = int(np.bincount(self.agent).max())
            raise DataError(
                f"{self.name}: no agent has {history} + 1 + {future} steps (history, the last observed one, future), "
                f"the longest has {longest}: expected longer tracks, or a shorter history or future"
            )
        if self.maps is not None:
            there &= self.map_of >= 0
            if not there.any():
                raise DataError(
                    f"{self.name}: no row with a map has {history} steps before it and {future} after it: expected the "
                    "map at the last observed step"
                )
        return np.flatnonzero(there)

    def cut(self, rows: np.ndarray, history: int, future: int) -> tuple[np.ndarray, np.ndarray]:
        """Past [m, history + 1, 2] and future [m, future, 2] of each row, in its agent's frame; see `framed`."""
        origin, turn = self.frames(rows, history)
        around = rows[:, None] + np.arange(-history, future + 1)
        local = framed(self.xy[around], origin, turn)
        return local[:, : history + 1], local[:, history + 1 :]

    def frames(self, rows: np.ndarray, history: int) -> tuple[np.ndarray, np.ndarray]:
        """Origin [m, 2] and heading [m] (radians, of the last step that moved; 0 where none did) of rows."""
        steps = np.diff(self.xy[rows[:, None] + np.arange(-history, 1)], axis=1)
        moving = np.linalg.norm(steps, axis=-1) > 0
        last = steps.shape[1] - 1 - moving[:, ::-1].argmax(1) if history else np.zeros(len(rows), int)
        step = steps[np.arange(len(rows)), last] if history else np.zeros((len(rows), 2))
        return self.xy[rows], np.arctan2(step[:, 1], step[:, 0])

    def map(self, row: int) -> np.ndarray:
        """The map of a row, uint8 [MAP_SIDE, MAP_SIDE, 3].

        Raises:
            DataError: it cannot be read.
        """
        assert self.maps is not None
        image = self.maps.image(int(self.map_of[row]))
        if image.size != (MAP_SIDE, MAP_SIDE):
            image = image.resize((MAP_SIDE, MAP_SIDE), Image.Resampling.BILINEAR)
        return np.array(image)


def framed(xy: np.ndarray, origin: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Points [m, s, 2] -> the frames of m agents at `origin` [m, 2] that head along `turn` [m]."""
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    x, y = np.moveaxis(xy - origin[:, None], -1, 0)
    return np.stack([cos * x + sin * y, cos * y - sin * x], -1)


def unframed(xy: np.ndarray, origin: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """The way back of `framed`, for points [m, ..., 2]."""
    around = (len(xy),) + (1,) * (xy.ndim - 2)
    cos, sin = np.cos(turn).reshape(around), np.sin(turn).reshape(around)
    x, y = np.moveaxis(xy, -1, 0)
    return np.stack([cos * x - sin * y, sin * x + cos * y], -1) + origin.reshape(*around, 2)


def open_tracks(data: str | Path) -> Tracks:
    """Open a table of tracks. No map is decoded.

    Raises:
        DataError: not a table, no such columns, missing or non-finite numbers, times that are not evenly spaced, an
            agent in two splits, a map that does not exist.
    """
    path = Path(os.path.expanduser(os.fspath(data)))
    name = printable(path.name)
    if not path.is_file():
        raise DataError(f"{printable(str(data))} is not a file: tracks come as a .csv or .parquet table, {EXPECTED}")
    if path.suffix.lower() in (".parquet", ".pq"):
        import pyarrow.parquet as pq

        with reading(name):
            table = pq.ParquetFile(path).read()
            columns: dict[str, list[Any]] = {head.lower(): table[head].to_pylist() for head in table.column_names}
    elif path.suffix.lower() == ".csv":
        columns = csv_columns(path, name, EXPECTED)
    else:
        raise DataError(f"{name} is neither .csv nor .parquet: {EXPECTED}")
    check_columns(columns, name, COLUMNS, EXPECTED)
    values = [numbers(columns[column], column, name) for column in COLUMNS[1:]]
    for column, found in zip(COLUMNS[1:], values, strict=True):
        if len(bad := np.flatnonzero(~(np.abs(found) <= LARGEST))):
            raise DataError(
                f"{name} row {int(bad[0]) + 1}: {column} is {printable(repr(columns[column][int(bad[0])]))}, expected "
                f"a finite number up to {LARGEST:g}: fill it in, or leave out what comes before or after it"
            )
    agents = [printable(str("" if each is None else each)) for each in columns["agent"]]
    if "" in agents:
        raise DataError(f"{name} row {agents.index('') + 1} names no agent: {EXPECTED}")
    texts = {
        column: [str("" if value is None else value) for value in columns[column]]
        for column in ("map", "split")
        if column in columns
    }
    maps = existing(texts["map"], path.parent, name) if "map" in texts else None
    return assemble(name, agents, values[0], np.stack(values[1:], -1), maps, texts.get("split"))


def existing(paths: Sequence[str], folder: Path, name: str) -> tuple[Source, list[str]]:
    """
    Raises:
        DataError: a map that does not exist, or no map at all.
    """
    root = os.fspath(folder.absolute())
    for row, each in enumerate(paths):
        if each and not os.path.isfile(os.path.join(root, each)):
            raise DataError(
                f"{name} row {row + 1}: its map {printable(each)} does not exist: paths are relative to the table's "
                "folder"
            )
    if not any(paths):
        raise DataError(f"{name}: the column map is empty: fill it in at the last observed steps, or leave it out")
    return Files(root, [each for each in paths if each]), list(paths)


def assemble(
    name: str,
    agents: Sequence[str],
    time: np.ndarray,
    xy: np.ndarray,
    maps: tuple[Source, list[str]] | None,
    split: Sequence[str] | None,
) -> Tracks:
    """Rows in any order -> Tracks.

    Args:
        maps: where images are, and each row's image ('' for none); the source holds those that are not '', in order.

    Raises:
        DataError: no rows, times that are not evenly spaced, an unknown split, an agent in two splits.
    """
    if not len(xy):
        raise DataError(f"{name} has no rows: {EXPECTED}")
    names, agent = np.unique(np.array(agents, object).astype(str), return_inverse=True)
    order = np.lexsort((time, agent))
    agent, time, xy = agent[order].astype(np.int64), time[order], xy[order]
    dt = step_of(name, names, agent, time)
    map_of, dataset = np.full(len(xy), -1, np.int64), None
    if maps is not None:
        has = np.array([each != "" for each in maps[1]])
        map_of = np.where(has, np.cumsum(has) - 1, -1)[order]
        ids = [printable(each) for each in maps[1] if each]
        dataset = Dataset(name, ids, np.zeros(len(ids), np.int64), (), "single-label", None, maps[0])
    splits = None
    if split is not None and any(split):
        splits = splits_of(name, names, agent, [str(split[row]).strip() for row in order])
    return Tracks(name, tuple(names.tolist()), agent, time, xy, dataset, map_of, splits, dt)


def step_of(name: str, names: np.ndarray, agent: np.ndarray, time: np.ndarray) -> float:
    """Seconds of a step.

    Raises:
        DataError: no agent has two rows, or its times are not evenly spaced.
    """
    same = agent[1:] == agent[:-1]
    gaps = np.diff(time)[same]
    if not len(gaps):
        raise DataError(f"{name}: no agent has two rows, so nothing says how long a step is: {EXPECTED}")
    dt = float(np.median(gaps))
    wrong = np.flatnonzero(np.abs(gaps - dt) > UNEVEN * dt) if dt > 0 else np.flatnonzero(gaps <= 0)
    if len(wrong):
        row = int(np.flatnonzero(same)[wrong[0]])
        raise DataError(
            f"{name}: agent {names[agent[row]]} has rows at times {time[row]:g} and {time[row + 1]:g}, where others "
            f"are {dt:g} apart: expected even steps; resample, or give the parts agents of their own"
        )
    return dt


def splits_of(name: str, names: np.ndarray, agent: np.ndarray, split: Sequence[str]) -> np.ndarray:
    found = np.array([SPLIT_NAMES.get(each.lower(), "") for each in split])
    if (found == "").any():
        wrong = split[int(np.flatnonzero(found == "")[0])]
        raise DataError(f"{name} has a split '{printable(wrong)}': expected train, val or test in every row")
    first = np.searchsorted(agent, np.arange(len(names)))
    if len(mixed := np.flatnonzero(found != found[first][agent])):
        raise DataError(f"{name}: agent {names[agent[mixed[0]]]} is in two splits: expected one for all of its rows")
    return found[first]


def split_tracks(tracks: Tracks, rows: np.ndarray, seed: int) -> np.ndarray:
    """'train', 'val' or 'test' for each of `rows`; an agent is on one side.

    Splits that the data came with are kept; without 'test', 'val' is what is measured. Data without any are split by
    `seed`, 7 to 1 to 2.

    Raises:
        DataError: too few agents, or a given split that leaves none to learn from or to measure on.
    """
    agent = tracks.agent[rows]
    if tracks.splits is not None:
        splits = tracks.splits[agent]
        if not (splits == "test").any():
            splits[splits == "val"] = "test"
        for part in ("train", "test"):
            if not (splits == part).any():
                raise DataError(f"{tracks.name} has nothing to forecast in '{part}': expected agents with long tracks")
        return splits
    distinct = len(np.unique(agent))
    if distinct < 5:
        raise DataError(
            f"{tracks.name} has {distinct} agents to forecast, expected 5 at least to learn from and to measure on: "
            "add agents, or a column split"
        )
    stock = Stock.of(np.zeros(len(rows), np.int64), agent, None)
    return np.array(["train", "val", "test"])[stock.share(np.array([0.7, 0.1, 0.2]), seed)[stock.group_of]]


def in_memory(xy: np.ndarray, dt: float = 1.0, maps: np.ndarray | None = None, observed: int = 0) -> Tracks:
    """Tracks [n, s, 2], one agent each, as `open_tracks` would give them.

    Args:
        maps: uint8 [n, h, w, 3], of step `observed` of each.
    """
    count, steps = xy.shape[:2]
    agents = [f"agent-{row:05d}" for row in range(count) for _ in range(steps)]
    time = np.tile(dt * np.arange(steps), count)
    given = None
    if maps is not None:
        named = [f"map-{row:05d}" if step == observed else "" for row in range(count) for step in range(steps)]
        given = Memory([png(each) for each in maps]), named
    return assemble("memory", agents, time, xy.reshape(-1, 2).astype(np.float64), given, None)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
