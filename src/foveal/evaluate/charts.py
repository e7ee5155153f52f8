"""The charts of a report: inline SVG that takes its colours from the page, so that it follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """A plot area in SVG units, and the values at its edges."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 50
    top: float = 12
    width: float = 320
    height: float = 220

    def at(self, x: float, y: float) -> Point:
        across = (x - self.x[0]) / (self.x[1] - self.x[0] or 1)
        up = (y - self.y[0]) / (self.y[1] - self.y[0] or 1)
        return round(self.left + across * self.width, 1), round(self.top + (1 - up) * self.height, 1)

    def axes(
        self, x_label: str, y_label: str, x_ticks: Sequence[float] | Mapping[float, str], y_ticks: Sequence[float]
    ) -> list[str]:
        """Grid lines, tick labels (of a mapping, its values) and the names of both axes."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = []
        named = x_ticks if isinstance(x_ticks, Mapping) else tick_labels(x_ticks)
        for value, label in named.items():
            x, _ = self.at(value, self.y[0])
            parts.append(f'<line class="grid" x1="{x}" y1="{self.top}" x2="{x}" y2="{bottom}"/>')
            parts.append(f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="middle">{label}</text>')
        for value, label in tick_labels(y_ticks).items():
            _, y = self.at(self.x[0], value)
            parts.append(f'<line class="grid" x1="{self.left}" y1="{y}" x2="{right}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{self.left - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
        middle = self.left + self.width / 2
        parts.append(f'<text class="axis" x="{middle}" y="{bottom + 33}" text-anchor="middle">{escape(x_label)}</text>')
        across = self.top + self.height / 2
        parts.append(
            f'<text class="axis" x="11" y="{across}" text-anchor="middle" transform="rotate(-90 11 {across})">'
            f"{escape(y_label)}</text>"
        )
        return parts

    def svg(self, parts: Sequence[str], title: str) -> Markup:
        width, height = self.left + self.width + 14, self.top + self.height + 40
        return Markup(
            f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" style="max-width:{1.15 * width:.0f}px" '
            f'role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
        )


def short(value: float, digits: int = 3) -> str:
    """A number in few signs: 0.25, 12, 3.4k, 5M."""
    unit, name = next(((unit, name) for unit, name in ((1e6, "M"), (1e3, "k")) if abs(value) >= unit), (1.0, ""))
    return f"{value / unit:.{digits}g}{name}"


def tick_labels(values: Iterable[float]) -> dict[float, str]:
    """Values to labels, with as many digits as tell them apart."""
    values = list(values)
    for digits in range(3, 8):
        labels = [short(value, digits) for value in values]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(values, labels, strict=True))


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers between low and high."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    rough = span / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def path(points: Sequence[Point], kind: str, close: bool = False) -> str:
    joined = "L".join(f"{x} {y}" for x, y in points)
    return f'<path class="{kind}" d="M{joined}{"Z" if close else ""}"/>'


def reliability_chart(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> Markup:
    """Share that was right against stated probability, before and after calibration.

    Args:
        before, after: rows of `foveal.evaluate.calibration.reliability`; a dot's area grows with its images.
    """
    frame = Frame((0, 1), (0, 1), width=270, height=270)
    unit = [0, 0.25, 0.5, 0.75, 1]
    parts = frame.axes("stated probability", "share that was right", unit, unit)
    parts.append(path([frame.at(0, 0), frame.at(1, 1)], "ideal"))
    total = sum(row["n"] for row in after) or 1
    for rows, kind in ((before, "muted"), (after, "accent")):
        points = [frame.at(row["confidence"], row["accuracy"]) for row in rows]
        if len(points) > 1:
            parts.append(path(points, f"line {kind}"))
        for row, (x, y) in zip(rows, points, strict=True):
            radius = 2.5 + 7 * math.sqrt(row["n"] / total)
            tip = f"{row['n']} answers at {row['confidence']:.2f}, {row['accuracy']:.2f} of them right"
            parts.append(f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="{radius:.1f}"><title>{tip}</title></circle>')
    return frame.svg(parts, "Reliability before and after calibration")


def unknown_chart(histogram: Mapping[str, Any], threshold: float) -> Markup:
    """Shares of known and of garbage images by unknown score, and the threshold between them.

    Args:
        histogram: of a record of `foveal.evaluate.ood.choose_ood`.
    """
    scale = math.log10 if histogram.get("log") and threshold > 0 else float
    edges, limit = [scale(edge) for edge in histogram["edges"]], scale(threshold)
    shares = {}
    for kind in ("known", "garbage"):
        total = sum(histogram[kind]) or 1
        shares[kind] = [count / total for count in histogram[kind]]
    low, high = min(edges[0], limit), max(edges[-1], limit)
    top = max(max(shares["known"]), max(shares["garbage"])) * 1.12 or 1
    frame = Frame((low, high), (0, top), width=330, height=180)
    if scale is float:
        marks = {value: short(value) for value in ticks(low, high, 5)}
    else:
        powers = range(math.floor(low), math.ceil(high) + 1)
        steps = (1, 2, 5) if high - low < 2.5 else (1,)
        marks = {math.log10(step) + power: short(step * 10.0**power) for power in powers for step in steps}
        marks = {at: label for at, label in marks.items() if low <= at <= high}
    parts = frame.axes("unknown score", "share", marks, ticks(0, top, 3))
    for kind, colour in (("garbage", "warm"), ("known", "accent")):
        points = [frame.at(edges[0], 0)]
        for left, right, share in zip(edges[:-1], edges[1:], shares[kind], strict=True):
            points += [frame.at(left, share), frame.at(right, share)]
        parts.append(path([*points, frame.at(edges[-1], 0)], f"area {colour}", close=True))
    x, y = frame.at(limit, top)
    anchor, shift = ("end", -5) if x > frame.left + frame.width / 2 else ("start", 5)
    parts.append(f'<line class="threshold" x1="{x}" y1="{y}" x2="{x}" y2="{frame.top + frame.height}"/>')
    parts.append(f'<text class="note" x="{x + shift}" y="{y + 11}" text-anchor="{anchor}">threshold</text>')
    return frame.svg(parts, "Unknown scores of known and garbage images")


def curves_chart(
    history: Sequence[Mapping[str, Any]], names: Mapping[str, str], y_label: str, x: str = "epoch"
) -> Markup | None:
    """Lines over epochs, or over another number; None when no line has two points.

    Args:
        history: rows, in the order of their `x`.
        names: key in a row -> colour class.
    """
    series = {
        key: [
            (float(row.get(x, place + 1)), float(row[key])) for place, row in enumerate(history) if drawn(row.get(key))
        ]
        for key in names
    }
    points = [point for line in series.values() for point in line]
    if all(len(line) < 2 for line in series.values()):
        return None
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    pad = (max(ys) - min(ys)) * 0.08 or 0.05
    edges = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    frame = Frame(edges, (min(ys) - pad, max(ys) + pad), width=300, height=180)
    marks = ticks(*edges) if edges[1] - edges[0] > 6 else sorted({at for at in xs if at == int(at)})
    parts = frame.axes(x, y_label, marks, ticks(*frame.y))
    for key, colour in names.items():
        line = [frame.at(*point) for point in series[key]]
        if len(line) > 1:
            parts.append(path(line, f"line {colour}"))
        for (across, up), (at, value) in zip(line, series[key], strict=True):
            tip = f"{x} {at:g}: {value:.4g}"
            parts.append(f'<circle class="dot {colour}" cx="{across}" cy="{up}" r="2.6"><title>{tip}</title></circle>')
    return frame.svg(parts, f"{y_label} by {x}")


def frontier_chart(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Balanced accuracy against time, one dot for each budget with its name; None when nothing can be drawn.

    Args:
        rows: name, milliseconds, balanced_accuracy; the first is the model that nothing was done to.
    """
    known = [row for row in rows if drawn(row["milliseconds"]) and drawn(row["balanced_accuracy"])]
    if not known:
        return None
    times, answers = ([float(row[key]) for row in known] for key in ("milliseconds", "balanced_accuracy"))
    pad = (max(answers) - min(answers)) * 0.15 or 0.05
    frame = Frame((0, 1.15 * max(times)), (min(answers) - pad, max(answers) + pad), width=330, height=200)
    parts = frame.axes("milliseconds of one image", "balanced accuracy", ticks(*frame.x), ticks(*frame.y))
    points = [frame.at(*each) for each in zip(times, answers, strict=True)]
    parts.append(path(points, "line accent"))
    places = label_places([row["name"] for row in known], points)
    for place_, (row, (x, y), (left, base)) in enumerate(zip(known, points, places, strict=True)):
        tip = f"{row['name']}: {row['milliseconds']:.1f} ms, {row['balanced_accuracy']:.3f}"
        kind = "accent" if place_ else "muted"
        parts.append(f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="4"><title>{escape(tip)}</title></circle>')
        parts.append(f'<text class="note" x="{left}" y="{base}">{escape(row["name"])}</text>')
    return frame.svg(parts, "Balanced accuracy by time at several budgets")


def label_places(names: Sequence[str], points: Sequence[Point]) -> list[Point]:
    """Where the text of each name begins: as near above or below its dot as it covers no dot and no name before it."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    chosen: list[Point] = []
    for name, (x, y) in zip(names, points, strict=True):
        wide = 6.5 * len(name)
        tried = [(x - wide / 2, y + shift) for shift in (-8, 17, -22, 31, -36, 45)]
        boxes = {(left, base): (left, base - 9, left + wide, base + 2) for left, base in tried}
        free = (at for at, box in boxes.items() if not any(overlap(box, other) for other in taken))
        at = next(free, tried[0])
        taken.append(boxes[at])
        chosen.append((round(at[0], 1), round(at[1], 1)))
    return chosen


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes (left, top, right, bottom) share more than an edge."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def drawn(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def place(low: float, high: float) -> Callable[[float], str]:
    """Value -> position on a track, as a CSS percentage of what lies between low and high, kept inside."""
    span = high - low or 1.0
    return lambda value: f"{100 * min(max((value - low) / span, 0.0), 1.0):.2f}%"
