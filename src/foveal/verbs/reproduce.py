"""`foveal reproduce`: run the small-scale experiment behind a method's card, and write what it measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from foveal.core.progress import Progress
from foveal.verbs._results import Result

if TYPE_CHECKING:
    from collections.abc import Callable


def reproduce(
    name: Annotated[str, "Name of a method or an architecture."],
    *,
    tiny: Annotated[bool, "Seconds instead of minutes; shows that it runs, measures nothing, writes no card."] = False,
    seeds: Annotated[int | None, "How many seeds, from 0; default: the card's."] = None,
    progress: Progress | None = None,
) -> Result:
    """Run a method's reproduction over its seeds, test the card's expectations, and write the measurement.

    Example: foveal reproduce linear --tiny
    """
    import datetime
    import statistics
    import time

    from foveal.core import cards

    progress = progress or Progress()
    experiment = load_reproduction(name)
    card = cards.read_card(name)
    expectation = card["expectation"]
    count = seeds or (1 if tiny else expectation["seeds"])
    start = time.perf_counter()
    runs: list[dict[str, float]] = []
    for seed in range(count):
        progress.update(f"reproducing {name}", seed, count)
        runs.append(experiment(seed=seed, tiny=tiny))
    progress.update(f"reproducing {name}", count, count)
    minutes = (time.perf_counter() - start) / 60
    values = {
        key: {
            "mean": round(statistics.fmean(run[key] for run in runs), 6),
            "std": round(statistics.stdev(run[key] for run in runs), 6) if count > 1 else 0.0,
            "runs": [round(run[key], 6) for run in runs],
        }
        for key in sorted(runs[0])
    }
    means = {key: statistics.fmean(run[key] for run in runs) for key in values}
    checks = [{"check": check, "held": cards.holds(check, means)} for check in expectation["checks"]]
    measured: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "seeds": count,
        "minutes": round(minutes, 2),
        "versions": versions(),
        "checks": checks,
        "values": values,
    }
    if not tiny and count >= expectation["seeds"]:
        cards.write_card(name, {**card, "measured": measured})
    return Result({"name": name, "tiny": tiny, **measured}, text)


def load_reproduction(name: str) -> Callable[..., dict[str, float]]:
    """The function `reproduce(seed, tiny)` of reproductions/<family>/<name>.py.

    Raises:
        UsageError: there is no such file; the nearest names are shown.
    """
    import difflib
    import importlib.util

    from foveal.core.catalogue import PACKAGE
    from foveal.core.errors import UsageError

    roots = (PACKAGE / "_reproductions", PACKAGE.parents[1] / "reproductions")
    files = {file.stem.replace("_", "-"): file for root in roots for file in root.glob("*/[!_]*.py")}
    if name not in files:
        near = difflib.get_close_matches(name, files, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(files))}"
        raise UsageError(f"no reproduction of '{name}': {hint}")
    spec = importlib.util.spec_from_file_location(f"foveal_reproduction_{files[name].stem}", files[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reproduce


def versions() -> dict[str, str]:
    """The versions that a measurement depends on."""
    import platform
    from importlib.metadata import version

    found = {library: version(library) for library in ("foveal", "torch", "timm", "onnxruntime", "numpy")}
    return {"python": platform.python_version(), **found}


def text(content: dict[str, Any]) -> str:
    lines = [f"{key}: {value['mean']:.4f} (s.d. {value['std']:.4f})" for key, value in content["values"].items()]
    lines += [f"{'held' if item['held'] else 'FAILED'}: {item['check']}" for item in content["checks"]]
    lines.append(f"{content['seeds']} seeds, {content['minutes']:.1f} minutes{', tiny' if content['tiny'] else ''}")
    return "\n".join(lines)
