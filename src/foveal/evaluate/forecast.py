"""How far forecasts are off, and whether they stay the same as time goes on: ADE, FDE, dispersion, convergence."""

from __future__ import annotations

from typing import Any

import numpy as np

from foveal.core.errors import DataError
from foveal.evaluate.metrics import interval, multiplicities, number

RANGES = (0.2, 1.0, 5.0)
"""Distances of the convergence to range, in the data's unit."""


def errors(found: np.ndarray, future: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ADE and FDE [n]: mean distance over the steps, and distance at the last, between trajectories [n, T, 2]."""
    if found.shape != future.shape:
        raise DataError(f"trajectories of shapes {found.shape} and {future.shape}: expected equal ones")
    away = np.linalg.norm(found - future, axis=-1)
    return away.mean(-1), away[:, -1]


def leads(agent: np.ndarray, rows: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forecasts of one instant, made 1..T steps earlier.

    Args:
        agent: of every row of the tracks [N], rows of an agent one step apart.
        rows: last observed steps [n] that were forecast from, growing.
        found: most likely trajectories [n, T, 2].

    Returns:
        Points [m, T, 2], point k-1 made k steps earlier, and the row [m] of each instant; only instants that all T
        were made for.
    """
    steps = found.shape[1]
    made = np.full(len(agent), -1)
    made[rows] = np.arange(len(rows))
    instant = np.arange(steps, len(agent))
    instant = instant[agent[instant] == agent[instant - steps]]
    lead = np.arange(1, steps + 1)
    which = made[instant[:, None] - lead]
    whole = (which >= 0).all(1)
    return found[which[whole], lead - 1], instant[whole]


def dispersion(points: np.ndarray) -> np.ndarray:
    """D [m]: root of the mean squared distance of points [m, T, 2] from their centre."""
    return np.sqrt(np.square(points - points.mean(1, keepdims=True)).sum(-1).mean(-1))


def convergence(points: np.ndarray, truth: np.ndarray, within: float, dt: float) -> np.ndarray:
    """C [m], in seconds: for how long before an instant all forecasts of it lay within a distance of the truth.

    Args:
        points: [m, T, 2], see `leads`; truth: [m, 2]; dt: seconds of a step.

    Raises:
        DataError: dt is not a positive number.
    """
    if not (np.isfinite(dt) and dt > 0):
        raise DataError(f"dt={dt}: convergence is in seconds, and needs to know how long a step is")
    near = np.linalg.norm(points - truth[:, None], axis=-1) <= within
    return dt * np.cumprod(near, 1).sum(1)


def straight_on(xy: np.ndarray, rows: np.ndarray, steps: int) -> np.ndarray:
    """Trajectories [n, steps, 2] that go on at the last velocity: what not looking comes to."""
    speed = xy[rows] - xy[rows - 1]
    return xy[rows][:, None] + np.arange(1, steps + 1)[:, None] * speed[:, None]


def measure_forecasts(
    modes: np.ndarray,
    xy: np.ndarray,
    agent: np.ndarray,
    rows: np.ndarray,
    dt: float,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Every metric, with its 95% percentile bootstrap interval over agents.

    Args:
        modes: futures [n, K, T, 2], the most likely first; xy, agent: the tracks [N, 2], [N]; rows: last observed
            steps [n], growing, each with T rows of its agent after it.

    Returns:
        n (forecasts), agents, instants, T and dt; as {"value", "low", "high"}: ade, fde (of the most likely future),
        best_ade, best_fde (of the closest one), and, None where no instant was forecast at all lead times, dispersion
        and convergence {distance: ...}.

    Raises:
        DataError: nothing to measure on.
    """
    if not len(rows):
        raise DataError("no forecast to measure on: expected longer test tracks, or a shorter history or future")
    steps = modes.shape[2]
    future = xy[rows[:, None] + np.arange(1, steps + 1)]
    away = np.linalg.norm(modes - future[:, None], axis=-1)
    ade, fde = errors(modes[:, 0], future)
    by_start = np.stack([ade, fde, away.mean(-1).min(1), away[..., -1].min(1), np.ones(len(rows))])
    points, instant = leads(agent, rows, modes[:, 0])
    by_instant = np.stack(
        [dispersion(points), *(convergence(points, xy[instant], each, dt) for each in RANGES), np.ones(len(instant))]
    )
    names, place = np.unique(agent[rows], return_inverse=True)
    tables = [
        np.stack([np.bincount(at, row, len(names)) for row in table])
        for table, at in ((by_start, place), (by_instant, np.searchsorted(names, agent[instant])))
    ]

    def metrics(W: np.ndarray) -> np.ndarray:
        """Multiplicities of agents [a, R] -> [8, R]."""
        sums = [table @ W for table in tables]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.concatenate([each[:-1] / each[-1] for each in sums])

    point = metrics(np.ones((len(names), 1)))[:, 0]
    drawn = [metrics(W) for W in multiplicities(len(names), resamples, seed)]
    low, high = interval(np.concatenate(drawn, -1)) if drawn else (np.full(len(point), np.nan),) * 2
    figures = [
        {"value": number(value), "low": number(a), "high": number(b)}
        for value, a, b in zip(point, low, high, strict=True)
    ]
    return {
        "n": len(rows),
        "agents": len(names),
        "instants": len(instant),
        "steps": steps,
        "dt": dt,
        **dict(zip(("ade", "fde", "best_ade", "best_fde", "dispersion"), figures[:5], strict=True)),
        "convergence": {f"{each:g}": row for each, row in zip(RANGES, figures[5:], strict=True)},
    }
