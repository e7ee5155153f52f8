"""report.html and comparison.html: one file each, with no script and nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import Environment, PackageLoader, StrictUndefined

from foveal.evaluate.charts import curves_chart, drawn, place, reliability_chart, unknown_chart

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
FINDINGS = {
    "corrupt": "files that cannot be decoded, set aside",
    "leak": "groups of copies on both sides of the given splits",
    "conflicting_label": "groups of copies with different labels",
    "duplicate": "groups of identical images",
    "near_duplicate": "groups of nearly identical images, kept on one side of the split",
    "suspicious_label": "labels that models trained on the other images contradict",
    "missing_class": "classes missing from a split",
    "few_images": "classes with very few images",
    "imbalance": "rare classes",
    "blank": "images of a single colour",
    "tiny": "notes on tiny images",
    "odd_size": "images of unusual size or shape",
}
SHOWN_FINDINGS = 12
SHOWN_CLASSES = 25
SHOWN_MISTAKES = 12


class Mistake(TypedDict):
    """A wrong answer: `thumbnail` is a JPEG, PNG or WebP file in memory; several labels are joined by '|'."""

    id: str
    thumbnail: bytes
    true: str
    predicted: str
    probability: float


class ReportContext(TypedDict):
    """What report.html and the model card are made of.

    manifest: bundle.json: `task`, `classes`, `backbone` (name, arch, origin, preprocessing, width), `method` (name,
        options), `why`, `seed`, `class_weights`, `data` (name, images, set_aside, splits, split_by,
        near_duplicate_images, fingerprint), `foveal` (versions by library), `parent`, `seconds`.
    calibration: calibration.json: `temperature` (value, fitted_on and test: records of `calibration_record`),
        `unknown` (the record of `choose_ood`).
    metrics: metrics.json: what `measure` returns, with `split`, `references` (metrics by name, and `about`), `race`
        (rows of method, metrics and seconds, best first; None if the method was asked for) and `history` (one row per
        epoch: epoch, train_loss, val_loss, val_balanced_accuracy; empty without training).
    cost: cost.json: names to numbers, text or dicts of them.
    findings: kind -> rows of `images` and `message`, from `foveal check`.
    mistakes: most confident first.
    """

    manifest: dict[str, Any]
    calibration: dict[str, Any]
    metrics: dict[str, Any]
    cost: dict[str, Any]
    findings: dict[str, list[dict[str, Any]]]
    mistakes: list[Mistake]


def write_report(path: str | Path, context: ReportContext) -> None:
    """Write report.html."""
    manifest, metrics = context["manifest"], context["metrics"]
    multi = manifest["task"] == "multi-label"
    page = {
        "title": f"{manifest['data']['name']}: {manifest['method']['name']}",
        "subtitle": subtitle(manifest),
        "verdict": verdict(metrics),
        "tiles": list(tiles(context)),
        "trained": list(trained(context)),
        "race": race(metrics.get("race"), manifest.get("why", "")),
        "findings": findings(context["findings"]),
        "n": count(metrics["n"]),
        "split": metrics.get("split", "test"),
        "notes": metrics.get("notes", []),
        "interval_about": interval_about(metrics),
        "forest": list(forest(metrics, multi)),
        "references": [
            (REFERENCES.get(name, name), row["about"])
            for name, row in metrics.get("references", {}).items()
            if row.get("about")
        ],
        "multi": multi,
        "per_class": per_class(metrics["per_class"]),
        "confusion": confusion(metrics, manifest["classes"]),
        "confused": confused(metrics, manifest["classes"]),
        "calibration": calibration(context["calibration"]["temperature"], metrics.get("split", "test")),
        "unknown": unknown(context["calibration"]["unknown"]),
        "curves": curves(metrics.get("history") or []),
        "mistakes": [shot(mistake) for mistake in context["mistakes"][:SHOWN_MISTAKES]],
        "cost": list(flatten(context["cost"])),
        "provenance": list(provenance(manifest, metrics)),
    }
    write_page(path, "report.html.j2", page)


def write_comparison(path: str | Path, rows: Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> None:
    """Write comparison.html.

    Args:
        rows: one per method, best first, reference rows last: `method`, `seeds`, each metric as the mean over seeds and
            `<metric>_std` (None for one seed), `seconds`, `trained_params`, `total_params`, `images_per_second`.
        context: `data`, `backbone`, `images`, `classes`, `reading_seconds`, and `rows`: the same per method and seed.
    """
    each = list(context["rows"])
    seeds = sorted({row["seed"] for row in each})
    methods = [row for row in rows if row["method"] not in REFERENCES]
    names = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    columns = {
        "seconds": "seconds to fit",
        "trained_params": "trained parameters",
        "total_params": "all parameters",
        "images_per_second": "images/s",
    }
    page = {
        "title": f"{context['data']}: {count(len(methods))} method{'' if len(methods) == 1 else 's'} compared",
        "subtitle": f"{count(context['images'])} images, {count(len(context['classes']))} classes, on frozen or "
        f"fine-tuned {context['backbone']}; measured on test images that training never saw.",
        "verdict": comparison_verdict(methods, rows, len(seeds)),
        "plots": [dot_plot(name, rows, each) for name in ("balanced_accuracy", "auroc") if name in names],
        "seeds": len(seeds),
        "columns": ["method", *(METRICS[name][0] for name in names), *columns.values()],
        "table": [
            {
                "name": REFERENCES.get(row["method"], row["method"]),
                "kind": "reference" if row["method"] in REFERENCES else "chosen" if row is rows[0] else "",
                "cells": [spread(row, name) for name in names] + [quantity(row.get(name)) for name in columns],
            }
            for row in rows
        ],
        "provenance": [
            ("data", f"{context['data']}: {count(context['images'])} images"),
            ("classes", listed(context["classes"])),
            ("backbone", context["backbone"]),
            ("seeds", ", ".join(map(str, seeds))),
            ("reading images and computing features", duration(context.get("reading_seconds"))),
            ("majority class", "always answers the most frequent class of the training split"),
            ("brightness alone", "logistic regression on the mean and standard deviation of each image"),
        ],
    }
    write_page(path, "comparison.html.j2", page)


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


def write_page(path: str | Path, template: str, page: Mapping[str, Any]) -> None:
    text = environment().get_template(template).render(version=version("foveal"), **page)
    Path(path).write_bytes(text.encode("utf-8", "backslashreplace"))


def plain(text: str) -> str:
    """Text that any file may hold: undecodable bytes of file names and control characters become \\x escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def subtitle(manifest: Mapping[str, Any]) -> str:
    kind = "several labels per image" if manifest["task"] == "multi-label" else "one label per image"
    return f"{listed(manifest['classes'])}: {kind}, {count(manifest['data']['images'])} images"


def verdict(metrics: Mapping[str, Any]) -> dict[str, str]:
    """One line a person can act on, and its tone: good, care or plain."""
    own = metrics["balanced_accuracy"]
    if own["value"] is None:
        return {"tone": "care", "text": "The test images are too few to judge this model."}
    text = f"Balanced accuracy {figure(own)} on {count(metrics['n'])} {metrics.get('split', 'test')} images."
    rivals = {
        name: row["balanced_accuracy"]
        for name, row in metrics.get("references", {}).items()
        if row["balanced_accuracy"]["value"] is not None
    }
    if not rivals:
        return {"tone": "", "text": text}
    name, best = max(rivals.items(), key=lambda item: item[1]["value"])
    against = f"{REFERENCES.get(name, name)} ({best['value']:.3f})"
    if own["value"] <= best["value"]:
        return {"tone": "care", "text": f"{text} That is not above {against}: do not rely on it."}
    if own["low"] is None or best["high"] is None:
        return {"tone": "", "text": f"{text} That is above {against}."}
    if own["low"] > best["high"]:
        return {"tone": "good", "text": f"{text} Clearly above {against}: the intervals do not overlap."}
    return {"tone": "care", "text": f"{text} Above {against}, but the intervals overlap: more test images would tell."}


def tiles(context: ReportContext) -> Iterator[dict[str, str]]:
    metrics, unknown = context["metrics"], context["calibration"]["unknown"]
    for name in ("balanced_accuracy", "auroc", "ece"):
        entry = metrics[name]
        yield {"name": METRICS[name][0], "value": fixed(entry["value"]), "about": interval_text(entry)}
    yield {
        "name": "Garbage called unknown",
        "value": percent(unknown.get("garbage_caught")),
        "about": f"keeping {percent(unknown.get('recall'))} of known images",
    }


def trained(context: ReportContext) -> Iterator[tuple[str, str]]:
    manifest = context["manifest"]
    data, backbone, method = manifest["data"], manifest["backbone"], manifest["method"]
    options = ", ".join(f"{key}={value}" for key, value in method.get("options", {}).items())
    splits = data.get("splits", {})
    sizes = ", ".join(f"{name} {count(splits[name])}" for name in ("train", "val", "test") if name in splits)
    architecture = f" ({backbone['arch']})" if backbone.get("arch", backbone["name"]) != backbone["name"] else ""
    yield "backbone", f"{backbone['name']}{architecture}, weights: {backbone.get('origin', 'unknown')}"
    yield "method", method["name"] + (f" ({options})" if options else "")
    yield "images", f"{count(data['images'])}: {sizes}" if sizes else count(data["images"])
    if data.get("split_by"):
        yield "split by", data["split_by"]
    if data.get("near_duplicate_images"):
        yield "copies", f"{count(data['near_duplicate_images'])} images are near-copies of another"
    if data.get("set_aside"):
        yield "set aside", f"{count(len(data['set_aside']))} files that cannot be decoded"
    yield "class weights", str(manifest.get("class_weights", "none"))
    if manifest.get("seconds") is not None:
        yield "time", duration(manifest["seconds"])


def race(rows: Sequence[Mapping[str, Any]] | None, why: str) -> dict[str, Any] | None:
    if not rows:
        return None
    names = [name for name in METRICS if rows[0].get(name) is not None]
    return {
        "about": f"{sentence(why)} Cross-validated inside the training split; test images played no part.",
        "columns": [METRICS[name][0] for name in names],
        "rows": [
            {
                "method": row["method"],
                "cells": [fixed(row.get(name)) for name in names],
                "seconds": fixed(row.get("seconds"), 2),
            }
            for row in rows
        ],
    }


def findings(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Kinds with anything in them, gravest first."""
    order = [*(kind for kind in FINDINGS if kind in found), *(kind for kind in found if kind not in FINDINGS)]
    return [
        {
            "name": FINDINGS.get(kind, kind.replace("_", " ")),
            "count": len(found[kind]),
            "messages": [row["message"] for row in found[kind][:SHOWN_FINDINGS]],
            "more": max(0, len(found[kind]) - SHOWN_FINDINGS),
        }
        for kind in order
        if found[kind]
    ]


def interval_about(metrics: Mapping[str, Any]) -> str:
    resamples = metrics.get("bootstrap", {}).get("resamples")
    return f" ({count(resamples)} resamples of the images)" if resamples else ""


def forest(metrics: Mapping[str, Any], multi: bool) -> Iterator[dict[str, Any]]:
    """Each metric with its interval, above those of the references."""
    at = place(0.0, 1.0)
    for name, about in METRICS.items():
        if name not in metrics:
            continue
        rows = [("this model", metrics[name], "")]
        for key, row in metrics.get("references", {}).items():
            if name in row:
                rows.append((REFERENCES.get(key, key), row[name], str(row.get("about", ""))))
        title, description = MULTI_LABEL.get(name, about) if multi else about
        lanes = [{"name": label, "text": figure(entry), "about": tip, **lane(entry, at)} for label, entry, tip in rows]
        yield {"name": title, "about": description, "lanes": lanes}


def lane(entry: Mapping[str, Any], at: Any) -> dict[str, str | None]:
    """CSS positions of a value and its interval."""
    if entry["value"] is None:
        return {"at": None, "left": None, "width": None}
    if entry["low"] is None:
        return {"at": at(entry["value"]), "left": None, "width": None}
    left, right = at(entry["low"]), at(entry["high"])
    return {"at": at(entry["value"]), "left": left, "width": f"{float(right[:-1]) - float(left[:-1]):.2f}%"}


def per_class(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per class; the hardest first when there are many."""
    at = place(0.0, 1.0)
    made = []
    for name, row in rows.items():
        entry = {"value": row["recall"], "low": row.get("recall_low"), "high": row.get("recall_high")}
        made.append(
            {
                "name": name,
                "support": count(row["support"]),
                **{key: fixed(row.get(key)) for key in ("precision", "recall", "f1", "auroc")},
                "ap": fixed(row.get("average_precision")),
                "interval": interval_text(entry),
                "order": row["recall"] if row["recall"] is not None else 2.0,
                **lane(entry, at),
            }
        )
    return sorted(made, key=lambda row: row["order"]) if len(made) > SHOWN_CLASSES else made


def confusion(metrics: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any] | None:
    cells = metrics.get("confusion")
    if not cells or len(classes) > SHOWN_CLASSES:
        return None
    rows = []
    for name, counts in zip(classes, cells, strict=True):
        total = sum(counts) or 1
        shares = [round(value / total, 3) for value in counts]
        rows.append(
            {
                "name": name,
                "cells": [
                    {"count": count(value), "share": share, "percent": percent(share)}
                    for value, share in zip(counts, shares, strict=True)
                ],
            }
        )
    return {"names": list(classes), "rows": rows, "dense": len(classes) > 6}


def confused(metrics: Mapping[str, Any], classes: Sequence[str], most: int = 10) -> list[dict[str, str]]:
    """The pairs of classes that are mistaken most often; needed from five classes on."""
    cells = metrics.get("confusion")
    if not cells or len(classes) < 5:
        return []
    pairs = [
        (value, value / sum(counts), true, answered)
        for true, counts in enumerate(cells)
        for answered, value in enumerate(counts)
        if value and true != answered
    ]
    return [
        {"true": classes[true], "answered": classes[answered], "count": count(value), "share": percent(share)}
        for value, share, true, answered in sorted(pairs, key=lambda pair: pair[:2], reverse=True)[:most]
    ]


def calibration(temperature: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The reliability diagram on test images where there is one, else on the images the temperature was fitted on."""
    fitted, record = temperature.get("fitted_on"), temperature.get("test") or temperature.get("fitted_on")
    source = f", fitted on {fitted['n']:,} {fitted['measured_on']}" if isinstance(fitted, Mapping) else ""
    if not isinstance(record, Mapping):
        return {"about": f"Logits are divided by {temperature['value']:.2f}{source}.", "chart": None}
    where = f"{split} images" if record is temperature.get("test") else record["measured_on"]
    return {
        "about": f"Logits are divided by a temperature of {temperature['value']:.2f}{source}. On {where}, an answer "
        "given with 80% should be right 80 times in 100: points on the dashed line are. Large dots hold many answers.",
        "chart": reliability_chart(record["before"], record["after"]) if record["after"] else None,
        "before": fixed(record["ece_before"]),
        "after": fixed(record["ece_after"]),
    }


def unknown(record: Mapping[str, Any]) -> dict[str, Any]:
    tried = ", ".join(f"{name} {fixed(value)}" for name, value in record.get("auroc", {}).items())
    return {
        "about": f"An image that scores above {record['threshold']:.3g} by {record['name']} is answered unknown. The "
        f"threshold keeps {percent(record.get('recall'))} of {record.get('fitted_on', 'held-out images')}, and catches "
        f"{percent(record.get('garbage_caught'))} of procedural garbage. AUROC of known against garbage: {tried}.",
        "chart": unknown_chart(record["histogram"], record["threshold"]) if record.get("histogram") else None,
        "known": count(record.get("known")),
        "garbage": count(record.get("garbage")),
    }


def curves(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss, and validation metrics, by epoch."""
    groups = [
        ("loss", {"train_loss": ("training loss", "muted"), "val_loss": ("validation loss", "accent")}),
        (
            "validation",
            {
                "val_balanced_accuracy": ("balanced accuracy", "accent"),
                "val_accuracy": ("accuracy", "muted"),
                "val_auroc": ("AUROC", "warm"),
            },
        ),
    ]
    made = []
    for label, names in groups:
        there = {key: look for key, look in names.items() if any(drawn(row.get(key)) for row in history)}
        chart = curves_chart(history, {key: colour for key, (_, colour) in there.items()}, label)
        if chart:
            made.append({"chart": chart, "key": list(there.values())})
    return made


def shot(mistake: Mistake) -> dict[str, str | None]:
    data = mistake["thumbnail"]
    kinds = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"RIFF": "webp"}
    kind = next((kind for start, kind in kinds.items() if data.startswith(start)), None)
    return {
        "source": f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if kind else None,
        "id": mistake["id"],
        "true": mistake["true"].replace("|", ", ") or "none of the labels",
        "predicted": mistake["predicted"].replace("|", ", ") or "none of the labels",
        "probability": fixed(mistake["probability"], 2),
    }


def provenance(manifest: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "seed", str(manifest.get("seed"))
    yield "data fingerprint", str(manifest["data"].get("fingerprint"))
    if (backbone := manifest["backbone"]).get("preprocessing"):
        yield "preprocessing", ", ".join(f"{key} {value}" for key, value in backbone["preprocessing"].items())
    if manifest.get("parent"):
        yield "made from", str(manifest["parent"])
    if manifest.get("request"):
        yield "asked for", ", ".join(f"{key} {value}" for key, value in manifest["request"].items())
    yield "versions", ", ".join(f"{library} {release}" for library, release in manifest.get("foveal", {}).items())


def comparison_verdict(
    methods: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], seeds: int
) -> dict[str, str]:
    judged = [row for row in methods if row.get("balanced_accuracy") is not None]
    if not judged:
        return {"tone": "care", "text": "No method could be judged on these images."}
    best, *others = sorted(judged, key=lambda row: -row["balanced_accuracy"])
    text = f"Best balanced accuracy: {best['method']}, {spread(best, 'balanced_accuracy')}"
    if others:
        text += f"; then {others[0]['method']}, {spread(others[0], 'balanced_accuracy')}"
    text += f", over {seeds} seed{'' if seeds == 1 else 's'}."
    rivals = [row for row in rows if row["method"] in REFERENCES and row.get("balanced_accuracy") is not None]
    if rivals:
        top = max(rivals, key=lambda row: row["balanced_accuracy"])
        against = f"{REFERENCES[top['method']]} ({fixed(top['balanced_accuracy'])})"
        if best["balanced_accuracy"] <= top["balanced_accuracy"]:
            return {"tone": "care", "text": f"{text} It is not above {against}."}
        below = [row["method"] for row in judged if row["balanced_accuracy"] <= top["balanced_accuracy"]]
        text += f" {'All are' if not below else 'Not all are'} above {against}"
        text += f": {', '.join(below)} {'is' if len(below) == 1 else 'are'} not." if below else "."
    return {"tone": "good", "text": text}


def dot_plot(name: str, rows: Sequence[Mapping[str, Any]], each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A lane per method: a ring per seed, a dot at the mean, a bar of its 95% t-interval over seeds."""
    values = [row[name] for row in each if row.get(name) is not None]
    low = max(0.0, math.floor((min(values) - 0.02) * 20) / 20)
    high = min(1.0, math.ceil((max(values) + 0.02) * 20) / 20)
    at = place(low, high)
    lanes = []
    for row in rows:
        own = [one for one in each if one["method"] == row["method"] and one.get(name) is not None]
        entry = {"value": row.get(name), "low": None, "high": None}
        deviation = row.get(f"{name}_std")
        if deviation is not None and len(own) > 1:
            half = t_quantile(len(own) - 1) * deviation / math.sqrt(len(own))
            entry |= {"low": entry["value"] - half, "high": entry["value"] + half}
        dots = [{"at": at(one[name]), "seed": one["seed"], "text": fixed(one[name])} for one in own if len(own) > 1]
        lanes.append(
            {
                "name": REFERENCES.get(row["method"], row["method"]),
                "reference": row["method"] in REFERENCES,
                "text": spread(row, name),
                "dots": dots,
                **lane(entry, at),
            }
        )
    several = any(len(item["dots"]) > 1 for item in lanes)
    about = METRICS[name][1][0].upper() + METRICS[name][1][1:] + "."
    return {
        "name": METRICS[name][0],
        "about": about + (" A ring per seed, the mean, and its 95% interval over seeds." if several else ""),
        "lanes": lanes,
        "low": f"{low:.2f}",
        "middle": f"{(low + high) / 2:.3g}",
        "high": f"{high:.2f}",
    }


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t (exact to the table up to 10 degrees, Cornish-Fisher beyond)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    z = 1.959964
    return table[freedom - 1] if freedom <= len(table) else z + (z**3 + z) / (4 * freedom)


def spread(row: Mapping[str, Any], name: str) -> str:
    deviation = row.get(f"{name}_std")
    return fixed(row.get(name)) + (f" ± {deviation:.3f}" if deviation is not None else "")


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


def figure(entry: Mapping[str, Any]) -> str:
    """0.803 [0.771, 0.833]"""
    if entry["value"] is None:
        return "not defined"
    return f"{entry['value']:.3f}" + (f" [{entry['low']:.3f}, {entry['high']:.3f}]" if entry["low"] is not None else "")


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
