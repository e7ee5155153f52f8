"""What the pages share: their templates, the names of metrics, and how numbers and names are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

METRICS = {
    "accuracy": ("Accuracy", "share of images answered right"),
    "balanced_accuracy": ("Balanced accuracy", "mean over classes of the share answered right"),
    "macro_f1": ("Macro F1", "mean over classes of the balance of precision and recall"),
    "auroc": ("AUROC", "chance that an image of a class scores higher for it than one that is not"),
    "map": ("mAP", "mean over labels of average precision"),
    "ece": ("ECE", "gap between stated probability and share right; lower is better"),
}
MULTI_LABEL = {
    "accuracy": ("Accuracy", "share of images with every label right"),
    "balanced_accuracy": ("Balanced accuracy", "mean over labels of the shares of its presences and absences found"),
}
REFERENCES = {"majority": "majority class", "brightness": "brightness alone"}


@cache
def environment() -> Environment:
    return Environment(
        loader=PackageLoader("foveal.evaluate", "templates"),
        autoescape=lambda name: bool(name) and ".html" in name,
        undefined=StrictUndefined,
        finalize=lambda value: plain(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


PLACE = re.compile(r"(?<![\w.:/])~?/(?:[^/\s;,]+/)+(?=[^/\s;,])")


def without_place(text: str) -> str:
    """Text whose absolute paths are cut to their last part: whoever is shown a page need not know where things lie."""
    return PLACE.sub("", text)


def write_page(path: str | Path, template: str, page: Mapping[str, Any]) -> None:
    heads = {key: without_place(page[key]) for key in ("title", "subtitle") if type(page.get(key)) is str}
    page = {**page, **heads}
    text = environment().get_template(template).render(version=version("foveal"), **page)
    Path(path).write_bytes(text.encode("utf-8", "backslashreplace"))


def plain(text: str) -> str:
    """Text that any file may hold: undecodable bytes of file names and control characters become \\x escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def lane(entry: Mapping[str, Any], at: Callable[[float], str]) -> dict[str, str | None]:
    """CSS positions of a value and its interval."""
    if entry["value"] is None:
        return {"at": None, "left": None, "width": None}
    if entry["low"] is None:
        return {"at": at(entry["value"]), "left": None, "width": None}
    left, right = at(entry["low"]), at(entry["high"])
    return {"at": at(entry["value"]), "left": left, "width": f"{float(right[:-1]) - float(left[:-1]):.2f}%"}


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested names to rows of text."""
    for key, value in content.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}, ")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            for place_, item in enumerate(value, 1):
                yield from flatten(item, f"{name} {place_}, ") if isinstance(item, Mapping) else [(name, str(item))]
        else:
            yield name, quantity(value)


def named(content: Mapping[str, Any]) -> str:
    """size 224, mean 0.5, 0.5, 0.5: what has a value, in one line."""
    return without_place("; ".join(f"{name} {text}" for name, text in flatten(content) if text not in ("–", "")))


def method_text(method: Mapping[str, Any]) -> str:
    """lora (rank=8, epochs=10): a method's name and those of its options that are set."""
    options = ", ".join(f"{key}={value}" for key, value in method.get("options", {}).items() if value not in (None, ""))
    return method["name"] + (f" ({options})" if options else "")


def backbone_text(backbone: Mapping[str, Any]) -> str:
    """Name, the architecture where that is another, and where the weights come from."""
    architecture = f" ({backbone['arch']})" if backbone.get("arch", backbone["name"]) != backbone["name"] else ""
    return without_place(f"{backbone['name']}{architecture}, weights: {backbone.get('origin', 'unknown')}")


def split_sizes(data: Mapping[str, Any]) -> str:
    splits = data.get("splits", {})
    return ", ".join(f"{name} {count(splits[name])}" for name in ("train", "val", "test") if name in splits)


def data_rows(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a model has seen: a manifest's `data` in words."""
    held = ", ".join(
        f"{count(data[kind])} {kind}" for kind in ("images", "texts", "clips", "frames", "agents") if kind in data
    )
    yield "data", f"{data['name']}: {held}"
    if data.get("splits"):
        yield "split", f"{split_sizes(data)}; split by {data['split_by']}"
    if data.get("set_aside"):
        yield "set aside", f"{count(len(data['set_aside']))} that cannot be decoded"


def quantity(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return count(round(value)) if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%" if value in (0, 1) else f"{100 * value:.1f}%"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def interval_text(entry: Mapping[str, Any]) -> str:
    return "–" if entry.get("low") is None else f"{entry['low']:.3f} to {entry['high']:.3f}"


def figure(entry: Mapping[str, Any], digits: int = 3) -> str:
    """0.803 [0.771, 0.833]"""
    if entry["value"] is None:
        return "not defined"
    value, low, high = (fixed(entry[key], digits) for key in ("value", "low", "high"))
    return value if entry["low"] is None else f"{value} [{low}, {high}]"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".") if text else ""
