"""docs/choose.md: which method for which case, from the measured cards alone. What was not measured says `unknown`."""

from __future__ import annotations

import ast
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
WORLDS = {"digits": "digits, raw pixels", "elpv": "solar cells, EfficientNet-Lite0 features"}
FEW = re.compile(r"(?P<method>[\w-]+)\.(?P<world>[a-z-]+)_(?P<shots>\d+)\.balanced_accuracy")
KEPT = {"trained_params": "trained numbers", "seconds": "seconds to fit", "step_seconds": "seconds a step"}
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""0.975 quantile of Student's t by degrees of freedom."""


@dataclass(frozen=True)
class Cell:
    """Balanced accuracy of one method in one setting: one number per seed, and the card it is from."""

    runs: tuple[float, ...]
    card: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.runs)

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.runs):.3f}" if len(self.runs) > 1 else ""
        return f"{self.mean:.3f}{spread}"


Row = dict[str, Cell]
"""Method -> what it reached on the same draws."""


def as_good(best: Cell, other: Cell) -> bool:
    """Whether the paired differences, seed by seed, leave it open which of the two is better (95% t-interval)."""
    gaps = [a - b for a, b in zip(best.runs, other.runs, strict=True)]
    if len(gaps) < 2:
        return False
    margin = STUDENT.get(len(gaps) - 1, 2.26) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.fmean(gaps) <= margin


def chosen(row: Row) -> list[str]:
    """The method with the best mean, and those that are as good; best first."""
    order = sorted(row, key=lambda name: -row[name].mean)
    return [name for name in order if as_good(row[order[0]], row[name]) or name == order[0]]


def few_shot(cards: Mapping[str, Mapping[str, Any]], methods: Iterable[str]) -> dict[tuple[str, int], Row]:
    """(world, images a class) -> row. Numbers of several cards stand together where a method that both measured has
    the same number in each, seed by seed: then they are of the same draws."""
    known = set(methods)
    per_card: dict[tuple[str, int], dict[str, Row]] = {}
    for name, card in sorted(cards.items()):
        for key, value in card.get("measured", {}).get("values", {}).items():
            found = FEW.fullmatch(key)
            if found and found["method"] in known and found["world"] in WORLDS:
                place = per_card.setdefault((found["world"], int(found["shots"])), {})
                place.setdefault(name, {})[found["method"]] = Cell(tuple(value["runs"]), name)
    rows: dict[tuple[str, int], Row] = {}
    for place, given in per_card.items():
        by_size = sorted(given.values(), key=len, reverse=True)
        row = dict(by_size[0])
        for more in by_size[1:]:
            shared = row.keys() & more.keys()
            if shared and all(row[name].runs == more[name].runs for name in shared):
                row.update({name: cell for name, cell in more.items() if name not in row})
        if len(row) > 1:
            rows[place] = row
    return dict(sorted(rows.items(), key=lambda item: (item[0][1], item[0][0])))


@dataclass(frozen=True)
class Contest:
    """One card's comparison of methods that train through the backbone with others, on one data set."""

    card: str
    setting: str
    rows: dict[str, dict[str, Cell]]
    """Method or variant -> balanced_accuracy and what it cost."""
    minutes: float

    @property
    def backbone(self) -> str:
        return "ViT" if "ViT" in self.setting else "CNN"


def contests(cards: Mapping[str, Mapping[str, Any]], settings: Mapping[str, str]) -> list[Contest]:
    """Cards that measured `METHOD.balanced_accuracy` of several methods, with the first line of their experiment."""
    made: list[Contest] = []
    for name, card in sorted(cards.items()):
        measured = card.get("measured", {})
        rows: dict[str, dict[str, Cell]] = {}
        for key, value in measured.get("values", {}).items():
            method, _, what = key.rpartition(".")
            if what in ("balanced_accuracy", *KEPT) and re.fullmatch(r"[\w-]+", method):
                rows.setdefault(method.replace("_", "-"), {})[what] = Cell(tuple(value["runs"]), name)
        priced = any(row.keys() & KEPT.keys() for row in rows.values())
        rows = {
            method: row
            for method, row in rows.items()
            if "balanced_accuracy" in row and (row.keys() & KEPT.keys() or not priced)
        }
        if len(rows) > 1 and name in rows and name in settings:
            made.append(Contest(name, settings[name], rows, measured["minutes"]))
    return made


def settings_of(folder: Path) -> dict[str, str]:
    """Card name -> first sentence of its reproduction."""
    made: dict[str, str] = {}
    for file in sorted(folder.glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        made[file.stem.replace("_", "-")] = " ".join(text.split("\n\n")[0].split()).rstrip(".")
    return made


def link(name: str, known: Iterable[str]) -> str:
    return f"[{name}](methods/{name}.md)" if name in set(known) else name


def lines(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def page(
    specs: Mapping[str, Any],
    cards: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, str],
    capabilities: Mapping[str, Mapping[str, str]],
) -> str:
    """The whole page. `specs`: the adapt methods by name; `cards`: theirs."""
    shots, tuned = few_shot(cards, specs), contests(cards, settings)
    parts = [
        "# Which method for my case",
        "Written from the measured cards of the methods (`foveal reproduce NAME`), not from opinion: a method is "
        "named where it had the best mean balanced accuracy, together with all that the same seeds cannot tell from "
        "it (paired 95% t-interval). `unknown` means that nobody has measured it. On your own images `foveal compare "
        "DATA` measures all of them, and `foveal fit DATA` lets those on frozen features race by cross-validation.",
        "## By what you have",
        lines(answers(specs, shots, tuned, capabilities)),
        "## Few images, frozen backbone",
        f"Balanced accuracy on test images, mean ± standard deviation over {seeds(shots)} seeds; **bold** is best or "
        "as good. Fitting takes seconds on a CPU once the backbone has seen the images.",
        lines(few_shot_table(specs, shots)),
        "## Training through the backbone",
        "Every table is one run: the same images, the same seeds, the same machine.",
    ]
    for contest in tuned:
        parts += [
            f"{contest.setting} ({contest.minutes:g} minutes for all seeds):",
            lines(contest_table(contest, specs)),
        ]
    parts += [
        "## What each method can do",
        "The kinds of backbone are what the contract battery found on a small one of each: *works*, or *refuses* with "
        "a message that says why.",
        lines(abilities(specs, tuned, capabilities)),
    ]
    return "\n\n".join(parts) + "\n"


def seeds(shots: Mapping[tuple[str, int], Row]) -> str:
    counts = sorted({len(cell.runs) for row in shots.values() for cell in row.values()})
    return " or ".join(map(str, counts)) or "no"


def answers(
    specs: Mapping[str, Any],
    shots: Mapping[tuple[str, int], Row],
    tuned: Sequence[Contest],
    capabilities: Mapping[str, Mapping[str, str]],
) -> list[list[str]]:
    """Situation, methods, evidence."""
    rows = [["you have", "take (best mean first)", "balanced accuracy", "`linear` on the same", "measured on"]]
    for (world, count), row in shots.items():
        rows.append(
            [
                f"{count} labelled images a class",
                links(chosen(row), specs),
                str(row[chosen(row)[0]]),
                str(row["linear"]) if "linear" in row else UNKNOWN,
                WORLDS[world],
            ]
        )
    for contest in tuned:
        reached = {name: row["balanced_accuracy"] for name, row in contest.rows.items() if name in specs}
        rows.append(
            [
                f"a {contest.backbone} that may be trained",
                links(chosen(reached), specs),
                str(reached[chosen(reached)[0]]),
                str(reached["linear"]) if "linear" in reached else UNKNOWN,
                contest.setting,
            ]
        )
    several = [name for name, spec in specs.items() if "multi-label" in spec.tasks]
    rows.append(["several labels an image", among(several, specs), UNKNOWN, UNKNOWN, UNKNOWN])
    text = [name for name, spec in specs.items() if "text" in spec.needs]
    rows.append(["names of classes and no images", among(text, specs), UNKNOWN, UNKNOWN, UNKNOWN])
    frozen = [name for name, spec in specs.items() if "gradients" not in spec.needs]
    rows.append(
        ["no time to train the backbone", f"{links(frozen, specs)}: see above", "see above", "see above", pace(tuned)]
    )
    for kind in ("cnn", "vit", "windowed", "hybrid"):
        able = [n for n in specs if "gradients" in specs[n].needs and capabilities.get(n, {}).get(kind) == "works"]
        if kind not in {contest.backbone.lower() for contest in tuned}:
            name = {"windowed": "windowed transformer", "cnn": "CNN", "vit": "ViT"}.get(kind, kind)
            rows.append([f"a {name} that may be trained", among(able, specs), UNKNOWN, UNKNOWN, UNKNOWN])
    return rows


def pace(tuned: Sequence[Contest]) -> str:
    """How long fits took where seconds were measured."""
    told: list[str] = []
    for contest in tuned:
        spent = {name: row["seconds"] for name, row in contest.rows.items() if "seconds" in row}
        if spent:
            told.append(", ".join(f"{name} {quantity(cell)} s" for name, cell in sorted(spent.items())))
            told[-1] += f" ({contest.setting})"
    return "; ".join(told) or UNKNOWN


def links(names: Iterable[str], specs: Mapping[str, Any]) -> str:
    return ", ".join(link(name, specs) for name in names)


def among(names: Sequence[str], specs: Mapping[str, Any]) -> str:
    return f"{UNKNOWN} among {links(names, specs)}" if names else "no method yet"


def few_shot_table(specs: Mapping[str, Any], shots: Mapping[tuple[str, int], Row]) -> list[list[str]]:
    names = sorted({name for row in shots.values() for name in row})
    rows = [["images a class", "measured on", *(link(name, specs) for name in names)]]
    for (world, count), row in sorted(shots.items()):
        best = chosen(row)
        cells = [
            UNKNOWN if name not in row else f"**{row[name]}**" if name in best else str(row[name]) for name in names
        ]
        rows.append([str(count), WORLDS[world].partition(",")[0], *cells])
    return rows


def contest_table(contest: Contest, specs: Mapping[str, Any]) -> list[list[str]]:
    costs = [key for key in KEPT if any(key in row for row in contest.rows.values())]
    reached = {name: row["balanced_accuracy"] for name, row in contest.rows.items()}
    best = chosen(reached)
    rows = [["method", "balanced accuracy", *(KEPT[key] for key in costs)]]
    for name, cell in sorted(reached.items(), key=lambda item: -item[1].mean):
        shown = f"**{cell}**" if name in best else str(cell)
        spent = [quantity(contest.rows[name].get(key)) for key in costs]
        rows.append([link(name, specs), shown, *spent])
    return rows


def quantity(cell: Cell | None) -> str:
    if cell is None:
        return UNKNOWN
    return f"{cell.mean:,.0f}" if cell.mean >= 100 else f"{cell.mean:.3g}"


def abilities(
    specs: Mapping[str, Any], tuned: Sequence[Contest], capabilities: Mapping[str, Mapping[str, str]]
) -> list[list[str]]:
    kinds = ("cnn", "vit", "windowed", "hybrid")
    rows = [["method", "CNN", "ViT", "windowed", "hybrid", "several labels", "needs", "backbone", "seconds to fit"]]
    for name, spec in specs.items():
        own = next((contest for contest in tuned if contest.card == name), None)
        seconds = own.rows[name].get("seconds") if own else None
        rows.append(
            [
                link(name, specs),
                *(capabilities.get(name, {}).get(kind, UNKNOWN) for kind in kinds),
                "yes" if "multi-label" in spec.tasks else "no",
                ", ".join(sorted(spec.needs - {"gradients"})),
                "trained through" if "gradients" in spec.needs else "frozen",
                quantity(seconds),
            ]
        )
    return rows
