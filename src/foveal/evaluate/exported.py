"""What an export came to, in the report and the card of its Bundle, where the fit left a place for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup, escape

from foveal.core.folders import atomic_file
from foveal.evaluate.page import fixed

BEGIN, END = "<!-- exported -->", "<!-- /exported -->"
PLACE = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
COLUMNS = ("variant", "size", "one image", "eight images", "balanced accuracy", "lost", "verdict")


def note_export(bundle: Path, onnx: Mapping[str, Any]) -> None:
    """Put the record of an export, cost.json's `onnx`, into report.html and README.md; a later one takes its place."""
    for name, write in (("report.html", as_html), ("README.md", as_markdown)):
        page = bundle / name
        if page.is_file() and PLACE.search(content := page.read_text(encoding="utf-8")):
            before, after = PLACE.split(content, maxsplit=1)
            with atomic_file(page) as staging:
                staging.write_text(f"{before}{BEGIN}\n{write(onnx)}\n{END}{after}", encoding="utf-8")


def about(onnx: Mapping[str, Any]) -> str:
    said = f"model.onnx answers as the torch model: the largest difference is {onnx['max_abs_difference']:.1e}."
    if "variants" not in onnx:
        return said
    return (
        f"{said} Of the variants below, timed in turns in one run, {onnx['chosen']} is what `foveal serve` uses. int8 "
        f"was calibrated on {onnx['calibrated_on']}; all were judged on {onnx['judged_on']}."
    )


def rows_of(onnx: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of COLUMNS for each variant."""
    return [
        (
            row["name"] + (" (chosen)" if row["name"] == onnx["chosen"] else ""),
            f"{row['bytes'] / 1e6:.1f} MB" if "bytes" in row else "–",
            *(times(row) if "timings" in row else ("–", "–")),
            fixed(row.get("balanced_accuracy")),
            fixed(row.get("drop")),
            row["reason"],
        )
        for row in onnx.get("variants", [])
    ]


def times(row: Mapping[str, Any]) -> tuple[str, str]:
    first, last = row["timings"][0], row["timings"][-1]
    return f"{first['milliseconds']:.1f} ms", f"{last['milliseconds']:.1f} ms"


def as_html(onnx: Mapping[str, Any]) -> str:
    said = Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(about(onnx)))))
    table = ""
    if rows := rows_of(onnx):
        body = Markup("").join(Markup("<tr>{}</tr>").format(cells("td", row)) for row in rows)
        table = Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
            cells("th", COLUMNS), body
        )
    return Markup('<section>\n<h2>Exported</h2>\n<p class="lead">{}</p>\n{}\n</section>').format(said, table)


def cells(tag: Literal["th", "td"], row: Sequence[str]) -> Markup:
    """A row of COLUMNS as cells: a name, numbers, and a sentence."""
    kinds = ["name", *["num"] * (len(row) - 2), "said"]
    return Markup("").join(
        Markup('<{} class="{}">{}</{}>').format(tag, kind, cell, tag) for kind, cell in zip(kinds, row, strict=True)
    )


def as_markdown(onnx: Mapping[str, Any]) -> str:
    lines = ["## Exported", "", about(onnx)]
    if rows := rows_of(onnx):
        lines += ["", f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 2)}---|"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)
