import pytest

from foveal.core.cards import holds
from foveal.core.errors import UsageError

VALUES = {"vpt-deep.acc": 0.8, "linear.acc": 0.75}


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ("vpt-deep.acc > linear.acc", True),
        ("vpt-deep.acc > linear.acc + 0.1", False),
        ("vpt-deep.acc - 0.05 <= linear.acc + 1e-9", True),
        ("linear.acc >= 0.75", True),
        ("linear.acc < 0.5", False),
    ],
)
def test_comparisons(check: str, expected: bool):
    assert holds(check, VALUES) is expected


@pytest.mark.parametrize("check", ["vpt-deep.acc", "__import__('os') > 1", "lora.acc > linear.acc"])
def test_what_is_no_comparison_of_measured_names_is_refused(check: str):
    with pytest.raises(UsageError):
        holds(check, VALUES)
