"""report.html: what was trained, how good it is and how it fails; one file, no script, nothing loaded."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from foveal.evaluate.beside import sides
from foveal.evaluate.charts import curves_chart, drawn, frontier_chart, place, reliability_chart, unknown_chart
from foveal.evaluate.page import (
    METRICS,
    MULTI_LABEL,
    REFERENCES,
    backbone_text,
    count,
    duration,
    figure,
    fixed,
    flatten,
    interval_text,
    lane,
    listed,
    method_text,
    named,
    percent,
    sentence,
    split_sizes,
    write_page,
)

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
        "title": title_of(manifest),
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
        "distilled": distilled(metrics.get("distilled")),
        "updated": updated(metrics.get("update")),
        "multi": multi,
        "per_class": per_class(metrics["per_class"]),
        "confusion": confusion(metrics, manifest["classes"]),
        "confused": confused(metrics, manifest["classes"]),
        "calibration": calibration(context["calibration"]["temperature"], metrics.get("split", "test")),
        "unknown": unknown(context["calibration"]["unknown"]),
        "curves": curves(metrics.get("history") or []),
        "mistakes": [shot(mistake) for mistake in context["mistakes"][:SHOWN_MISTAKES]],
        "beside": before_after(context["cost"].get("shrunk")),
        "cost": list(cost_rows(context["cost"])),
        "provenance": list(provenance(manifest)),
    }
    write_page(path, "report.html.j2", page)


def title_of(manifest: Mapping[str, Any]) -> str:
    """Data and method, and what was done to the model since."""
    methods = [manifest["method"], *manifest.get("steps", [])]
    return f"{manifest['data']['name']}: {' + '.join(each['name'] for each in methods)}"


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
        about = interval_text(entry) + (" (0 is best)" if name == "ece" else "")
        yield {"name": METRICS[name][0], "value": fixed(entry["value"]), "about": about}
    yield {
        "name": "Garbage called unknown",
        "value": percent(unknown.get("garbage_caught")),
        "about": f"keeping {percent(unknown.get('recall'))} of known images",
    }


def trained(context: ReportContext) -> Iterator[tuple[str, str]]:
    manifest = context["manifest"]
    data, backbone, method = manifest["data"], manifest["backbone"], manifest["method"]
    sizes = split_sizes(data)
    yield "backbone", backbone_text(backbone)
    yield "method", method_text(method)
    for step in manifest.get("steps", []):
        yield "then", step["name"] if "shrunk" in context["cost"] else method_text(step)
    yield "images", f"{count(data['images'])}: {sizes}" if sizes else count(data["images"])
    if data.get("split_by"):
        yield "split by", data["split_by"]
    if data.get("near_duplicate_images"):
        yield "copies", f"{count(data['near_duplicate_images'])} images are near-copies of another"
    if data.get("set_aside"):
        yield "set aside", f"{count(len(data['set_aside']))} that cannot be decoded"
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


def distilled(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A student beside its teacher, on the same test images and in the same run."""
    if not record:
        return None
    share, others = record["shares"], record["unlabelled"]
    faster = "" if share["milliseconds"] < 1 else " It is not faster."
    joined = f" {count(others)} images without labels joined training." if others else ""
    rows = [
        {
            "name": row["name"],
            "about": row["about"],
            "cells": [
                figure(row["balanced_accuracy"]) if "balanced_accuracy" in row else "other classes",
                count(row.get("parameters")),
                "–" if row.get("macs") is None else f"{row['macs'] / 1e6:,.1f}",
                fixed(row.get("milliseconds"), 1),
            ],
        }
        for row in record["rows"]
    ]
    return {
        "about": f"The student has {percent(share['parameters'])} of the teacher's parameters, does "
        f"{percent(share['macs'])} of its multiply-accumulates and takes {percent(share['milliseconds'])} of its time "
        f"for one image, both timed in torch on {threads_text(record['rows'][0])} in one run.{faster}{joined}",
        "notes": [sentence(note) for note in record["notes"]],
        "columns": ["balanced accuracy", "parameters", "million MACs", "ms an image"],
        "rows": rows,
    }


def updated(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Whether a Bundle that learnt new classes answers the old ones as before."""
    if not record:
        return None
    moved, new = record["moved"], sum(row["new"] for row in record["per_class"])
    if moved is None:
        tone, said = "care", "There were no old images to test on: what happened to the old classes is not known."
    elif moved["equal"]:
        tone = "good"
        said = f"The scores of the old classes are equal bit by bit, before and after, on {count(moved['n'])} images."
    else:
        tone = "care"
        said = f"The scores of the old classes moved by up to {moved['moved']:.3g} (mean {moved['moved_mean']:.3g}) on "
        said += f"{count(moved['n'])} old images; {percent(moved['altered'])} of these have another best old class."
    if moved is not None:
        said += f" {percent(moved['taken'])} of the old images are now given a new class. Old classes were answered "
        said += f"right {percent(record['old_before'])} of the time, and are {percent(record['old_after'])}; "
        said += f"new ones {percent(record['new_after'])}."
    return {
        "tone": tone,
        "verdict": said,
        "about": f"{record['method']} added {new} classes and {count(record['parameters_added'])} numbers. Old test "
        f"images: {record['about']}.",
        "rows": [
            {
                "name": row["name"],
                "new": row["new"],
                "n": count(row["n"]),
                "before": percent(row["before"]),
                "after": percent(row["after"]),
            }
            for row in record["per_class"]
        ],
    }


def findings(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Kinds with anything in them, gravest first."""
    order = [*(kind for kind in FINDINGS if kind in found), *(kind for kind in found if kind not in FINDINGS)]
    return [
        {
            "name": sentence(FINDINGS.get(kind, kind.replace("_", " ")))[:-1],
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
    sources = {"this model": metrics}
    sources |= {REFERENCES.get(name, name): row for name, row in metrics.get("references", {}).items()}
    for name, about in METRICS.items():
        if name in metrics:
            title, description = MULTI_LABEL.get(name, about) if multi else about
            lanes = [
                {"name": label, "text": figure(source[name]), **lane(source[name], at)}
                for label, source in sources.items()
                if name in source
            ]
            yield {"name": title, "about": description, "lanes": lanes}


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


def curves(history: Sequence[Mapping[str, Any]], of: str = "images") -> list[dict[str, Any]]:
    """Loss, and validation metrics, by epoch."""
    groups = [
        ("loss", {"train_loss": ("training loss", "muted"), "val_loss": ("validation loss", "accent")}),
        (
            f"on validation {of}",
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


def before_after(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a shrunk model lost and gained."""
    if record is None:
        return None
    columns, rows = sides(record)
    timed = f"timed in turns in one run by {where(record)}" if record["engine"] else ""
    return {
        "tone": "good" if record["accepted"] else "care",
        "verdict": sentence(record["verdict"]),
        "about": sentence("; ".join(filter(None, [timed, record.get("reason", "")]))),
        "columns": columns,
        "rows": rows,
        "frontier": frontier_chart(record.get("frontier") or []),
        "steps": [(step["name"], named({**step["options"], **step["notes"]})) for step in record["steps"]],
    }


def provenance(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "seed", str(manifest.get("seed"))
    yield "data fingerprint", str(manifest["data"].get("fingerprint"))
    if (backbone := manifest["backbone"]).get("preprocessing"):
        yield "preprocessing", named(backbone["preprocessing"])
    if manifest.get("parent"):
        yield "made from", f"the Bundle {manifest['parent']}"
    if manifest.get("request"):
        yield "asked for", named(manifest["request"])
    yield "versions", ", ".join(f"{library} {release}" for library, release in manifest.get("foveal", {}).items())


def cost_rows(cost: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """cost.json in words; what it holds beyond the known, by its own names."""
    known = {"parameters", "macs", "bytes", "latency", "throughput", "shrunk", "memory", "onnx"}
    if size := cost.get("parameters"):
        yield "parameters", f"{count(size['total'])}, of which {count(size['trained'])} were set by training"
    if cost.get("macs") is not None:
        yield "multiply-accumulates", f"{cost['macs'] / 1e6:,.1f} million for one image"
    if cost.get("bytes") is not None:
        yield "weights on disk", f"{cost['bytes'] / 1e6:,.1f} MB"
    for row in cost.get("latency", []):
        images = "one image" if row["batch"] == 1 else f"{row['batch']} images"
        yield "latency", f"{row['milliseconds']:,.1f} ms for {images} ({where(row)})"
    for row in cost.get("throughput", []):
        yield "throughput", f"{row['images_per_second']:,.0f} images/s in batches of {row['batch']} ({where(row)})"
    if kept := cost.get("memory"):
        yield "kept to learn more by", f"{count(kept['images'])} images, {kept['bytes'] / 1e6:,.1f} MB"
    yield from flatten({key: value for key, value in cost.items() if key not in known})


def where(row: Mapping[str, Any]) -> str:
    return f"{row['engine']}, {threads_text(row)}"


def threads_text(row: Mapping[str, Any]) -> str:
    return f"{row['threads']} thread{'' if row['threads'] == 1 else 's'}"
