import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foveal.architectures.convfirst import conv_first, mbconv
from foveal.core.errors import UsageError
from foveal.evaluate.waterline import (
    Kernel,
    Waterline,
    efficiency,
    fuse,
    kernels,
    latency,
    measure_bandwidth,
    measure_peak,
)


def on_meta(model: nn.Module, *shape: int) -> list[Kernel]:
    found = kernels(model.to("meta"), torch.zeros(*shape, device="meta"))
    assert not found.unknown
    assert found.coverage == 1
    return found.kernels


@pytest.mark.parametrize(("name", "gmacs"), [("resnet50", 4.09), ("convnext_tiny", 4.46)])
def test_operations_of_known_models(name: str, gmacs: float):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(kernel.ops for kernel in on_meta(model, 1, 3, 224, 224)) / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_one_convolution_by_hand():
    (kernel,) = on_meta(nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4, bias=False), 2, 16, 8, 10)
    assert kernel.ops == 2 * 2 * 32 * 4 * 5 * 9 * (16 / 4)
    assert kernel.read == 2 * 2 * 16 * 8 * 10
    assert kernel.written == 2 * 2 * 32 * 4 * 5
    assert kernel.weights == 2 * 32 * 4 * 9
    assert kernel.bytes == kernel.read + kernel.written + kernel.weights


def test_a_group_of_g_multiplies_operations_and_moves_only_more_weights():
    (narrow,) = on_meta(nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), 1, 64, 56, 56)
    (wide,) = on_meta(nn.Conv2d(64, 64, 3, padding=1, groups=8, bias=False), 1, 64, 56, 56)
    assert wide.ops == 8 * narrow.ops
    assert (wide.read, wide.written) == (narrow.read, narrow.written)
    assert wide.weights == 8 * narrow.weights
    assert wide.intensity > 7 * narrow.intensity


def test_functions_are_counted_and_what_is_unknown_is_named():
    class Functional(nn.Module):
        def forward(self, x):
            return torch.cumsum(torch.einsum("bnd,bmd->bnm", x, x), 1)

    found = kernels(Functional(), torch.zeros(1, 4, 8))
    assert found.ops == 2 * 4 * 4 * 8
    assert found.unknown == {"cumsum": 1}
    assert found.coverage < 1


KERNEL = st.builds(Kernel, st.just("k"), *[st.floats(1, 1e9, allow_nan=False) for _ in range(4)])


@given(st.lists(KERNEL, min_size=1, max_size=6), st.floats(1, 1e12), st.floats(1, 1e12))
def test_bounds_are_in_order(sequence: list[Kernel], peak: float, bandwidth: float):
    line = Waterline(sequence, peak, bandwidth)
    assert line.seconds >= line.overlapped * (1 - 1e-9)
    assert 0 < line.ceiling <= 1 + 1e-9
    block = fuse(sequence)
    assert block.bytes <= sum(kernel.bytes for kernel in sequence) * (1 + 1e-9)
    assert block.intensity >= sum(k.ops for k in sequence) / sum(k.bytes for k in sequence) * (1 - 1e-9)
    assert all(kernel.bytes * line.height > kernel.ops for kernel in line.bound_by_memory)


def test_fusing_costs_a_halo_only_before_the_convolution():
    first, last = (on_meta(make(64, 64), 1, 64, 56, 56) for make in (conv_first, mbconv))
    assert len(first) == len(last) == 3
    ops = sum(kernel.ops for kernel in last)
    assert fuse(last, before=1).ops == ops
    assert fuse(last, tile=8, before=1).ops == ops + last[0].ops * ((10 / 8) ** 2 - 1)
    assert fuse(first, tile=8, before=0).ops == sum(kernel.ops for kernel in first)
    assert fuse(first).bytes == 2 * (2 * 64 * 56 * 56) + 2 * (8 * 9 * 64 + 2 * 4 * 64 * 64)
    assert math.isclose(fuse(last, tile=1e9, before=1).ops, ops, rel_tol=1e-6)


def test_efficiency_of_this_machine():
    peak, bandwidth = measure_peak(size=256), measure_bandwidth(megabytes=8)
    a = torch.randn(256, 256)
    assert efficiency(2 * 256**3, latency(lambda: a @ a, 10), 1e3 * peak) < 1
    assert Waterline([Kernel("mm", 2 * 256**3, 1, 1, 1)], peak, bandwidth).seconds > 0
    with pytest.warns(UserWarning, match=r"efficiency 2\.00 is above 1"):
        assert efficiency(2.0, 1.0, 1.0) == 2


def test_bad_input_names_the_numbers():
    with pytest.raises(UsageError, match="peak 0, bandwidth 1"):
        Waterline([], 0, 1)
    with pytest.raises(UsageError, match="3 repeats: expected at least 10"):
        latency(lambda: None, 3)
    with pytest.raises(UsageError, match="1 operations in 0 seconds"):
        efficiency(1, 0, 1)
