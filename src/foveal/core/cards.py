"""Cards: one TOML per method with the paper's claim, the small-scale expectation and the last measurement."""

from __future__ import annotations

import operator
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foveal.core.catalogue import PACKAGE
from foveal.core.errors import UsageError

COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


def card_path(name: str) -> Path:
    return PACKAGE / "papers" / f"{name}.toml"


def read_card(name: str) -> dict[str, Any]:
    """The card of a method.

    Raises:
        UsageError: the method has none, or it is not readable.
    """
    try:
        return tomllib.loads(card_path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no card for '{name}': expected {card_path(name).name} in foveal/papers") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the card of '{name}' is not TOML: {error}") from None


def write_card(name: str, card: Mapping[str, Any]) -> None:
    """Replace a card, whole or not at all."""
    import tomli_w

    path = card_path(name)
    staging = path.with_suffix(f".{os.getpid()}.tmp")
    staging.write_text(tomli_w.dumps(card), encoding="utf-8")
    os.replace(staging, path)


def holds(check: str, values: Mapping[str, float]) -> bool:
    """Whether a comparison such as `vpt.balanced_accuracy > linear.balanced_accuracy + 0.02` is true.

    Sides are sums and differences of measured names and numbers; signs stand between spaces.

    Raises:
        UsageError: not of that form, or a name that was not measured.
    """
    match = re.fullmatch(r"(.+?)\s+(>=|<=|>|<)\s+(.+)", check.strip())
    if not match:
        raise UsageError(f"'{check}' is not a comparison: expected NAME > NAME, with + and - between spaces")
    left, sign, right = match.groups()
    return COMPARE[sign](total(left, values), total(right, values))


def total(side: str, values: Mapping[str, float]) -> float:
    terms = re.split(r"\s+([+-])\s+", side.strip())
    result = value_of(terms[0], values)
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        result += value_of(term, values) if sign == "+" else -value_of(term, values)
    return result


def value_of(term: str, values: Mapping[str, float]) -> float:
    try:
        return float(term)
    except ValueError:
        pass
    if term not in values:
        raise UsageError(f"'{term}' was not measured; measured were {', '.join(sorted(values))}")
    return values[term]
