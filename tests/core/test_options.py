import dataclasses

import pytest

from foveal.core.errors import UsageError
from foveal.core.options import describe_options, option, options, options_to_dict, parse_options, split_choice


@options
class Example:
    k: int = option(20, "neighbours", ge=1, le=512)
    rate: float = option(0.1, "step size", gt=0)
    deep: bool = option(True, "in every block")


def test_strings_become_typed_values():
    chosen = parse_options(Example, {"k": "5", "rate": "1e-2", "deep": "false"}, "example")
    assert options_to_dict(chosen) == {"k": 5, "rate": 0.01, "deep": False}


def test_stored_options_round_trip():
    chosen = parse_options(Example, {"k": 7}, "example")
    assert parse_options(Example, options_to_dict(chosen), "example") == chosen


def test_every_fault_is_named_at_once():
    with pytest.raises(UsageError) as caught:
        parse_options(Example, {"k": "0", "rate": "fast", "wide": 1}, "example")
    for part in ("k=0", "rate=fast", "wide: unknown", "options: k, rate, deep"):
        assert part in str(caught.value)


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().k = 3  # type: ignore[misc]


def test_description_has_default_range_and_help():
    first = describe_options(Example)[0]
    assert first == {
        "name": "k",
        "type": "integer",
        "default": 20,
        "range": ">= 1, <= 512",
        "help": "neighbours",
    }


def test_choice_splits_into_name_and_options():
    assert split_choice("vpt:p=10,deep=true") == ("vpt", {"p": "10", "deep": "true"})
    assert split_choice("linear") == ("linear", {})
    with pytest.raises(UsageError, match="key=value"):
        split_choice("vpt:p")
