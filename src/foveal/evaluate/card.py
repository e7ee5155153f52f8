"""README.md of a Bundle: a Hugging Face model card."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from foveal.core.catalogue import PACKAGE
from foveal.core.method import Classifier
from foveal.evaluate.page import (
    METRICS,
    MULTI_LABEL,
    REFERENCES,
    environment,
    figure,
    fixed,
    interval_text,
    listed,
    percent,
    plain,
)
from foveal.evaluate.report import ReportContext, cost_rows, provenance, title_of, trained, verdict

HUB_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "auroc": "roc_auc", "balanced_accuracy": "balanced_accuracy"}


NO_LICENCE = "None has been chosen for this model, so others may look at it but not use it."


def write_card(path: str | Path, context: ReportContext, classifier: Classifier | None = None) -> None:
    """Write README.md: YAML front matter that the Hub reads (with a model-index of the results), then the card.

    Args:
        classifier: the model the card is of; the card then says how to load it without foveal, or why that fails.
    """
    manifest, metrics = context["manifest"], context["metrics"]
    multi = manifest["task"] == "multi-label"
    title = f"{title_of(manifest)} on {manifest['backbone']['name']}"
    unknown, temperature = context["calibration"]["unknown"], context["calibration"]["temperature"]
    rows = [
        (
            (MULTI_LABEL.get(name, about) if multi else about)[0],
            figure(metrics[name]),
            *(figure(row[name]) if name in row else "–" for row in metrics.get("references", {}).values()),
        )
        for name, about in METRICS.items()
        if name in metrics
    ]
    page = {
        "title": title,
        "verdict": verdict(metrics)["text"],
        "classes": manifest["classes"] if len(manifest["classes"]) <= 50 else [listed(manifest["classes"], 50)],
        "multi": multi,
        "trained": list(trained(context)),
        "why": manifest.get("why", ""),
        "split": metrics.get("split", "test"),
        "n": metrics["n"],
        "references": [REFERENCES.get(name, name) for name in metrics.get("references", {})],
        "metrics": rows,
        "notes": metrics.get("notes", []),
        "per_class": [
            (
                name,
                row["support"],
                fixed(row["precision"]),
                fixed(row["recall"]),
                recall_interval(row),
                fixed(row["f1"]),
            )
            for name, row in metrics["per_class"].items()
        ],
        "temperature": fixed(temperature["value"], 2),
        "unknown": unknown["name"],
        "recall": percent(unknown.get("recall")),
        "garbage_caught": percent(unknown.get("garbage_caught")),
        "cost": list(cost_rows(context["cost"])),
        "provenance": list(provenance(manifest)),
        "by_hand": classifier is not None,
        "beyond_timm": beyond_timm(classifier, manifest) if classifier else None,
        "bias": classifier is not None and getattr(classifier.head, "bias", None) is not None,
        "licence": NO_LICENCE,
    }
    write_markdown(path, "card.md.j2", front_matter(context, title), page)


def write_markdown(path: str | Path, template: str, front: Mapping[str, Any], page: Mapping[str, Any]) -> None:
    """Write a README.md from its template: YAML front matter, and the page's text as `markdown` keeps it text."""
    made = environment().overlay(finalize=lambda value: value).get_template(template)
    told = {key: markdown(value) for key, value in {**page, "version": version("foveal")}.items()}
    text = made.render(told, front="\n".join(yaml_lines(front)))
    Path(path).write_bytes(text.encode("utf-8", "backslashreplace"))


def beyond_timm(classifier: Classifier, manifest: Mapping[str, Any]) -> str | None:
    """Why timm and a matrix product cannot answer as this classifier does; None where they can."""
    kind, arch = type(classifier), manifest["backbone"]["arch"]
    if steps := manifest.get("steps"):
        return f"{listed([step['name'] for step in steps])} changed the structure of timm's {arch}"
    if kind.features is not Classifier.features or kind.forward is not Classifier.forward:
        return f"its features are computed in another way than timm's {arch} does ({kind.__name__})"
    if type(classifier.head) is not nn.Linear:
        return f"its head is more than a linear layer ({type(classifier.head).__name__})"
    own = PACKAGE.glob("architectures/[!_]*.py")
    if any(re.search(rf"^def {re.escape(arch)}\(", file.read_text("utf-8"), re.MULTILINE) for file in own):
        return f"the architecture {arch} comes with foveal"
    return None


def recall_interval(row: Mapping[str, Any]) -> str:
    return interval_text({"low": row.get("recall_low"), "high": row.get("recall_high")})


def markdown(value: Any) -> Any:
    """Text that stays text in Markdown, and in one table cell; lists and tuples item by item."""
    if isinstance(value, str):
        text = html.escape(plain(value), quote=False).replace("\n", " ").replace("\t", " ")
        for mark in "\\`*_[]|":
            text = text.replace(mark, f"\\{mark}")
        return text
    return type(value)(markdown(item) for item in value) if isinstance(value, list | tuple) else value


def front_matter(context: ReportContext, title: str) -> dict[str, Any]:
    """What the Hub reads of a classifier of images."""
    manifest, metrics = context["manifest"], context["metrics"]
    data = manifest["data"]["name"]
    hub = data.removeprefix("hub:") if data.startswith("hub:") else None
    base = (
        origin.removeprefix("hub:") if (origin := manifest["backbone"].get("origin", "")).startswith("hub:") else None
    )
    measured = {name: kind for name, kind in HUB_METRICS.items() if (metrics.get(name) or {}).get("value") is not None}
    dataset = {"name": data, "type": hub or "imagefolder", "split": metrics.get("split", "test")}
    results = [
        {"type": kind, "name": METRICS[name][0], "value": round(metrics[name]["value"], 4)}
        for name, kind in measured.items()
    ]
    return {
        "library_name": "foveal",
        "pipeline_tag": "image-classification",
        "tags": ["foveal", "timm", "image-classification", manifest["method"]["name"], manifest["task"]],
        **({"base_model": [base]} if base else {}),
        **({"datasets": [hub]} if hub else {}),
        "metrics": list(measured.values()),
        "model-index": [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": "image-classification", "name": "Image Classification"},
                        "dataset": dataset,
                        "metrics": results,
                    }
                ],
            }
        ],
    }


def yaml_lines(content: Mapping[str, Any] | Sequence[Any], indent: str = "") -> Iterator[str]:
    """Block-style YAML of nested dicts and lists of text and numbers; text in double quotes, as in JSON."""
    items = content.items() if isinstance(content, Mapping) else ((None, value) for value in content)
    for key, value in items:
        start = f"{indent}-" if key is None else f"{indent}{key}:"
        if isinstance(value, Mapping | list) and not value:
            yield f"{start} {'{}' if isinstance(value, Mapping) else '[]'}"
        elif isinstance(value, Mapping | list):
            deeper = list(yaml_lines(value, indent + "  "))
            if key is None:
                yield f"{start} {deeper[0].strip()}"
                yield from deeper[1:]
            else:
                yield start
                yield from deeper
        else:
            text = json.dumps(plain(value), ensure_ascii=False) if isinstance(value, str) else json.dumps(value)
            yield f"{start} {text}"
