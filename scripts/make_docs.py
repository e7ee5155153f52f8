"""Write docs/methods/ and docs/architectures/ from docstrings, Options and cards, docs/choose.md from the measured
cards, and docs/verbs.md from the verbs.

`--check` writes nothing and exits with 1 when a page is out of date.
"""

from __future__ import annotations

import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin

import decision

from foveal import VERBS
from foveal.cli.main import parameter_types
from foveal.core import cards, catalogue
from foveal.core.method import Spec
from foveal.core.options import describe_options

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FAMILIES = ("cnn", "vit", "windowed", "hybrid")
COMMANDS = {
    "accelerate": "foveal shrink BUNDLE",
    "adapt": "foveal fit DATA",
    "continual": "foveal update BUNDLE NEWDATA",
    "curate": "foveal curate DATA",
    "dense": "foveal fit DATA --task landmarks",
    "distill": "foveal distill TEACHER DATA",
    "explain": "foveal explain BUNDLE IMAGES",
    "generate": "foveal edit IMAGE --to TEXT",
    "language": "foveal fit PAIRS",
    "motion": "foveal fit TRACKS --task forecast",
    "pretrain": "foveal pretrain DATA",
    "retrieve": "foveal index DATA",
    "robust": "foveal audit BUNDLE DATA",
    "shrink": "foveal shrink BUNDLE",
    "video": "foveal fit CLIPS --task video",
}
WORKS = {
    "accelerate": "the weights stay as they are and the multiply-accumulates fall, or these stay and the blocks become "
    "fewer; rebuilt from its plan and exported to ONNX, it answers the same; tokens that left give the others what "
    "masked ones would",
    "adapt": "the same seed gives the same model; saved, loaded, resumed and exported to ONNX, it answers the same",
    "continual": "grown, saved, loaded, resumed and exported to ONNX, it answers the same; the old model is as before, "
    "and old answers are equal bit by bit until training, or for good where that is promised",
    "curate": "the same images give the same selection; every image dropped has one that stays, of its own group; "
    "a share that is asked for is met or refused",
    "dense": "the same seed gives the same network; saved, loaded and exported to ONNX, it finds the same points, "
    "whatever other images come with them",
    "distill": "the teacher is as before, bit by bit; the same seed gives the same student; saved, loaded, resumed and "
    "exported to ONNX, it answers the same",
    "explain": "the same seed gives the same map, whatever other images come with it, in memory that does not grow "
    "with their number; nothing is left on the model, also after a crash",
    "generate": "the same seed gives the same picture, and what lies outside of the mask stays as it was; nothing is "
    "left on the model, also after a crash",
    "language": "the same seed gives the same towers; saved and loaded, they give the same vectors, and a classifier "
    "of words exported to ONNX answers the same",
    "motion": "the same seed gives the same network; saved and loaded, it forecasts the same, whatever other windows "
    "come with them; it reads no backbone",
    "pretrain": "the same seed gives the same weights, also after a kill; they load strictly into the plain network, "
    "and nothing is left on it, also after a crash",
    "retrieve": "the backbone is as before, bit by bit; the same seed gives the same embedding, also after a kill; "
    "saved and loaded, and in the fast session, it gives the same vectors",
    "robust": "the network is as before, bit by bit; the same seed gives the same attack, also after a kill; it stays "
    "within its budget, on any image",
    "shrink": "the original is as before, bit by bit; the same seed gives the same smaller model; rebuilt from its "
    "plan, loaded and exported to ONNX, it answers the same; nothing is left on it, also after a crash",
    "video": "the same seed gives the same classifier; saved, loaded and (on CNNs and plain ViTs) exported to ONNX, it "
    "answers the same, whatever other clips come with them",
}
"""Of each family: the command that takes `--method`, and what its contract battery means by *works*."""
CAPABILITIES: dict[str, dict[str, str]] = json.loads(
    (DOCS / "methods" / "capabilities.json").read_text(encoding="utf-8")
)
ARCHITECTURES: dict[str, dict[str, str]] = json.loads(
    (DOCS / "architectures" / "capabilities.json").read_text(encoding="utf-8")
)


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    def cell(value: Any) -> str:
        return str("" if value is None else value).replace("|", "\\|")

    lines = [columns, ["---"] * len(columns), *[[cell(row[column]) for column in columns] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def method_page(name: str) -> str:
    cls = catalogue.get(name)
    card = cards.read_card(name)
    spec = cls.spec
    paper = f"[arXiv {spec.arxiv}](https://arxiv.org/abs/{spec.arxiv}), " if spec.arxiv else ""
    parts = [
        f"# {name}",
        f"{spec.title} ({paper}{spec.year}). Family {spec.family}; "
        + "; ".join(filter(None, [f"needs {needs(spec)}", ", ".join(spec.tasks)]))
        + ".",
        inspect.getdoc(sys.modules[cls.__module__]) or "",
        "## Options",
        table(describe_options(cls.Options), ["name", "type", "default", "range", "help"]),
        f"On the command line: `{COMMANDS[spec.family]} --method {name}`, options as `{name}:key=value,key=value`.",
        "## Evidence",
        f"Claim: {card['claim']}",
        measurement(card),
    ]
    return "\n\n".join(parts) + "\n"


def measurement(card: dict[str, Any]) -> str:
    measured = card.get("measured")
    if not measured:
        return f"Not measured yet: `foveal reproduce {card['name']}`."
    verdicts = [{"expected": item["check"], "held": "yes" if item["held"] else "no"} for item in measured["checks"]]
    values = [
        {"quantity": key, "mean": f"{value['mean']:.4f}", "s.d.": f"{value['std']:.4f}"}
        for key, value in measured["values"].items()
    ]
    return "\n\n".join(
        [
            f"Measured by `foveal reproduce {card['name']}` on {measured['date']}, {measured['seeds']} seeds, "
            f"{measured['minutes']} minutes, "
            + ", ".join(f"{library} {version}" for library, version in measured["versions"].items())
            + ":",
            table(verdicts, ["expected", "held"]),
            table(values, ["quantity", "mean", "s.d."]),
        ]
    )


def needs(spec: Spec) -> str:
    alone = {"explain": "scores only", "motion": "tracks only"}
    return ", ".join(sorted(spec.needs)) or alone.get(spec.family, "images only")


def index_page() -> str:
    specs = {name: catalogue.get(name).spec for name in catalogue.families()}
    parts = ["# Methods"]
    for family in sorted({spec.family for spec in specs.values()}):
        rows = [index_row(name, spec) for name, spec in specs.items() if spec.family == family]
        parts += [
            f"## {family}",
            f"`{COMMANDS[family]} --method NAME`",
            table(rows, list(rows[0])),
            f"*works*: {WORKS[family]}.",
        ]
    parts.append(
        "cnn, vit, windowed, hybrid: what the contract battery found on a small backbone of that kind. *refuses*: with "
        "a message that says why."
    )
    return "\n\n".join(parts) + "\n"


def index_row(name: str, spec: Spec) -> dict[str, Any]:
    checks = cards.read_card(name).get("measured", {}).get("checks", [])
    return {
        "method": f"[{name}]({name}.md)",
        "title": spec.title,
        "needs": needs(spec),
        "tasks": ", ".join(spec.tasks),
        **{kind: CAPABILITIES.get(name, {}).get(kind, "unknown") for kind in FAMILIES},
        "expectations held": f"{sum(check['held'] for check in checks)} of {len(checks)}" if checks else "unknown",
    }


def verbs_page() -> str:
    parts = ["# Verbs", "On the command line `foveal VERB`, in Python `foveal.VERB(...)` with the same names."]
    for name in VERBS:
        verb = getattr(import_module(f"foveal.verbs.{name}"), name)
        rows: list[dict[str, Any]] = []
        types = parameter_types(verb)
        for key, parameter in inspect.signature(verb).parameters.items():
            if key == "progress":
                continue
            help_text = get_args(types[key])[1] if get_origin(types[key]) is not None else ""
            option = parameter.kind is parameter.KEYWORD_ONLY
            default = "" if parameter.default in (parameter.empty, None) else parameter.default
            dashes = "-" if len(key) == 1 else "--"
            shown = f"`{dashes}{key.rstrip('_').replace('_', '-')}`" if option else f"`{key.upper()}`"
            rows.append({"argument": shown, "default": default, "meaning": help_text})
        parts += [f"## {name}", inspect.getdoc(verb) or ""]
        parts += [table(rows, ["argument", "default", "meaning"])] if rows else []
    return "\n\n".join(parts) + "\n"


def architecture_files() -> list[Path]:
    return sorted((catalogue.PACKAGE / "architectures").glob("[!_]*.py"))


def cards_of(file: Path) -> list[dict[str, Any]]:
    """Cards of an architecture file: of its own name, and of single variants it registers."""
    module = import_module(f"foveal.architectures.{file.stem}")
    names = sorted(path.stem for path in cards.card_path("").parent.glob("*.toml"))
    own = [name for name in names if name.replace("-", "_") == file.stem]
    others = [name for name in names if name not in own and name not in catalogue.families()]
    variants = [name for name in others if hasattr(module, name.replace("-", "_"))]
    return [cards.read_card(name) for name in [*own, *variants]]


def architecture_page(file: Path) -> str:
    """One file of foveal.architectures: its docstring, its variants, what the battery found, and its cards."""
    parts = [f"# {file.stem.replace('_', '-')}"]
    found = cards_of(file)
    for card in found:
        paper = f"[arXiv {card['arxiv']}](https://arxiv.org/abs/{card['arxiv']}), " if card.get("arxiv") else ""
        parts.append(f"{card['title']} ({paper}{card['year']}).")
    parts += [
        inspect.getdoc(import_module(f"foveal.architectures.{file.stem}")) or "",
        "`import foveal.architectures` registers it with timm; foveal's own verbs do so by themselves: "
        "`--backbone NAME`.",
    ]
    variants = {name: row for card in found for name, row in card.get("variants", {}).items()}
    if variants:
        keys = list(dict.fromkeys(key for row in variants.values() for key in row))
        rows = [{"variant": f"`{variant}`", **{key: row.get(key) for key in keys}} for variant, row in variants.items()]
        parts += ["## Variants", table(rows, ["variant", *keys])]
    if probed := ARCHITECTURES.get(file.stem):
        rows = [{"what": key, "found": value} for key, value in probed.items()]
        parts += ["## What the contract battery found", table(rows, ["what", "found"])]
    for card in found:
        parts += ["## Evidence", f"Claim: {card['claim']}", measurement(card)]
    return "\n\n".join(parts) + "\n"


def architectures_index() -> str:
    rows: list[dict[str, Any]] = []
    for file in architecture_files():
        name = file.stem.replace("_", "-")
        found = cards_of(file)
        checks = [check for card in found for check in card.get("measured", {}).get("checks", [])]
        rows.append(
            {
                "architecture": f"[{name}]({name}.md)",
                "title": "; ".join(card["title"] for card in found),
                "variants": sum(len(card.get("variants", {})) for card in found) or None,
                **{key: ARCHITECTURES.get(file.stem, {}).get(key, "unknown") for key in ("family", "onnx", "compile")},
                "expectations held": f"{sum(check['held'] for check in checks)} of {len(checks)}"
                if checks
                else "unknown",
            }
        )
    columns = ["architecture", "title", "variants", "family", "onnx", "compile", "expectations held"]
    about = (
        "Backbones of papers that timm lacks. Every timm model is a backbone too; `foveal backbones` lists all. "
        "None has pretrained weights that come with foveal but `vit-hybrid-foveal`: `foveal fit DATA --backbone NAME "
        "--scratch` trains one from random weights. "
        "onnx, compile: what the contract battery found on a small one."
    )
    return f"# Architectures\n\n{about}\n\n{table(rows, columns)}\n"


def choose_page() -> str:
    adapt = [name for name, family in catalogue.families().items() if family == "adapt"]
    return decision.page(
        {name: catalogue.get(name).spec for name in adapt},
        {name: cards.read_card(name) for name in adapt},
        decision.settings_of(ROOT / "reproductions" / "adapt"),
        CAPABILITIES,
    )


def pages() -> dict[Path, str]:
    made = {DOCS / "methods" / f"{name}.md": method_page(name) for name in catalogue.families()}
    made |= {
        DOCS / "architectures" / f"{file.stem.replace('_', '-')}.md": architecture_page(file)
        for file in architecture_files()
    }
    return {
        **made,
        DOCS / "methods" / "index.md": index_page(),
        DOCS / "architectures" / "index.md": architectures_index(),
        DOCS / "choose.md": choose_page(),
        DOCS / "verbs.md": verbs_page(),
    }


def main() -> None:
    made = pages()
    stale = [path for path, content in made.items() if not path.exists() or path.read_text("utf-8") != content]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is out of date: make docs")
        sys.exit(bool(stale))
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(made[path], encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
