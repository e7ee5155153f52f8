"""How far found points are from the true ones: NME, PCK and their curves, with bootstrap intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from foveal.core.errors import DataError
from foveal.data.geometry import letterbox, moved
from foveal.evaluate.metrics import interval, multiplicities, number

THRESHOLDS = np.round(np.linspace(0, 0.2, 41), 3)
NORMALISER = "diagonal of the box around the image's labelled points (of the image, where only one is labelled)"


def distances(found: np.ndarray, xy: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Euclidean distances in pixels [n, K] between points [n, K, 2]; NaN where no point is labelled."""
    return np.where(known, np.linalg.norm(found - xy, axis=-1), np.nan)


def lengths(xy: np.ndarray, known: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What an image's errors are divided by [n], in pixels: see NORMALISER.

    Args:
        sizes: width and height of the images [n, 2].
    """
    low = np.where(known[..., None], xy, np.inf).min(1)
    high = np.where(known[..., None], xy, -np.inf).max(1)
    diagonal = np.linalg.norm(np.where(np.isfinite(high - low), high - low, 0), axis=-1)
    return np.where(diagonal > 0, diagonal, np.linalg.norm(sizes, axis=-1))


def measure_points(
    found: np.ndarray,
    xy: np.ndarray,
    known: np.ndarray,
    sizes: np.ndarray,
    names: Sequence[str],
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Every metric, with its 95% percentile bootstrap interval over images.

    Args:
        found, xy: points [n, K, 2] in pixels; known: which are labelled [n, K]; sizes: of the images [n, 2].

    Returns:
        n and points (how many were judged); as {"value", "low", "high"}: nme (mean error over labelled points, as a
        share of NORMALISER), pck_05 and pck_10 (share of points within 5% and 10% of it), pixels (mean error); curve
        (thresholds, and PCK at each with its interval); per_point {name: nme with interval, pck_10, n}.

    Raises:
        DataError: no labelled point, or arrays of other shapes.
    """
    if found.shape != xy.shape or known.shape != xy.shape[:2]:
        raise DataError(f"points of shapes {found.shape}, {xy.shape}, labelled {known.shape}: expected equal ones")
    if not known.any():
        raise DataError("no point is labelled: there is nothing to measure on")
    pixels = distances(found, xy, known)
    shares = pixels / lengths(xy, known, sizes)[:, None]
    with np.errstate(invalid="ignore"):
        close = (shares[..., None] <= THRESHOLDS).sum(1)
    parts = [known.sum(1)[:, None], np.nansum(shares, 1)[:, None], np.nansum(pixels, 1)[:, None], close, known,
             np.nan_to_num(shares), np.nan_to_num(shares, nan=np.inf) <= 0.1]  # fmt: skip
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    columns = np.hstack([part.astype(np.float64) for part in parts])

    def metrics(W: np.ndarray) -> dict[str, np.ndarray]:
        """Multiplicities [n, R] -> arrays [..., R]."""
        count, share, pixel, near, each, error, right = np.split(columns.T @ W, ends)
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "nme": share[0] / count[0],
                "pixels": pixel[0] / count[0],
                "curve": near / count[0],
                "by_point": error / each,
                "by_point_pck": right / each,
            }

    point = {name: value[..., 0] for name, value in metrics(np.ones((len(xy), 1))).items()}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in point}
    for W in multiplicities(len(xy), resamples, seed):
        for name, value in metrics(W).items():
            drawn[name].append(value)
    unknown = {name: np.full(np.shape(value), np.nan) for name, value in point.items()}
    spans = {name: interval(np.concatenate(each, -1)) if each else (unknown[name],) * 2 for name, each in drawn.items()}

    def row(name: str, at: Any = ...) -> dict[str, float | None]:
        low, high = spans[name]
        return {"value": number(point[name][at]), "low": number(low[at]), "high": number(high[at])}

    places = {share: int(np.flatnonzero(np.isclose(THRESHOLDS, share))[0]) for share in (0.05, 0.1)}
    return {
        "n": len(xy),
        "points": int(known.sum()),
        "normaliser": NORMALISER,
        "nme": row("nme"),
        "pck_05": row("curve", places[0.05]),
        "pck_10": row("curve", places[0.1]),
        "pixels": row("pixels"),
        "curve": {
            "thresholds": THRESHOLDS.tolist(),
            "value": point["curve"].tolist(),
            "low": [number(low) for low in spans["curve"][0]],
            "high": [number(high) for high in spans["curve"][1]],
        },
        "per_point": {
            name: {**row("by_point", k), "pck_10": number(point["by_point_pck"][k]), "n": int(known[:, k].sum())}
            for k, name in enumerate(names)
        },
    }


def mean_places(xy: np.ndarray, known: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Where each point lies on average [K, 2], the images fitted into a square of side 1: what guessing comes to.

    A point that is never labelled lies in the middle.
    """
    into = np.stack([letterbox((int(w), int(h)), 1) for w, h in sizes])
    unit = np.where(known[..., None], moved(into, xy), 0)
    count = known.sum(0)[:, None]
    return np.where(count > 0, unit.sum(0) / np.maximum(count, 1), 0.0)


def placed(places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Places [K, 2] in the square of side 1 -> points [n, K, 2] in the pixels of images of these sizes."""
    back = np.linalg.inv(np.stack([letterbox((int(w), int(h)), 1) for w, h in sizes]))
    return moved(back, np.broadcast_to(places, (len(sizes), *places.shape)))
