"""What the docs site is made of: pages of docs/ in reading order, and files of the root that are pages too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"index.md": "README.md", "security.md": "SECURITY.md"}
"""Pages whose one source lies in the root of the repository, unless docs/ has them."""
READING = (
    ("Start here", "index.md"),
    ("Which method for my case", "choose.md"),
    ("Verbs and options", "verbs.md"),
    ("Methods", "methods"),
    ("Architectures", "architectures"),
    (
        "Living with a model",
        (
            "curate.md",
            "bundle.md",
            "explain.md",
            "library.md",
            "language.md",
            "forecast.md",
            "audit.md",
            "update.md",
            "export.md",
            "serve.md",
            "share.md",
            "scale.md",
            "security.md",
        ),
    ),
    ("Benchmarks", "benchmarks.md"),
    ("Add a method in 20 minutes", "add-a-method.md"),
)


def on_config(config: Any) -> Any:
    config["nav"] = navigation(Path(config["docs_dir"]))
    return config


def on_files(files: Any, config: Any) -> Any:
    for page, source in FROM_ROOT.items():
        if files.get_file_from_path(page) is None and (ROOT / source).exists():
            text = from_docs((ROOT / source).read_text(encoding="utf-8"))
            files.append(File.generated(config, page, content=text))
    return files


def from_docs(text: str) -> str:
    """Links as they are in the root, to where a page of docs/ finds them."""
    return re.sub(r"\]\(docs/", "](", text).replace("](SECURITY.md)", "](security.md)")


def navigation(docs: Path) -> list[Any]:
    """The pages that are there: those of READING in its order, then any other."""
    placed: set[str] = set()
    made: list[Any] = []
    there = {file.relative_to(docs).as_posix() for file in docs.rglob("*.md")}
    there |= {page for page, source in FROM_ROOT.items() if (ROOT / source).exists()}
    for title, what in READING:
        if isinstance(what, tuple):
            inner: list[str] = [page for page in what if page in there]
        elif what.endswith(".md"):
            placed.add(what)
            made += [{title: what}] if what in there else []
            continue
        else:
            inner = sorted(
                (page for page in there if page.startswith(f"{what}/")),
                key=lambda page: (page != f"{what}/index.md", page),
            )
        placed.update(inner)
        made += [{title: inner}] if inner else []
    rest = sorted(there - placed)
    return [*made, {"More": rest}] if rest else made
