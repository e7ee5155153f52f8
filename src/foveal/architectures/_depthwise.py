"""Depthwise convolution whose weights' gradient does not wait for a kernel that CPUs lack."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAR = 7
"""From this side of a kernel on torch's own gradient is slower: 13x13 on a map of 28x28 takes 30 forward passes."""


class DepthwiseFunction(torch.autograd.Function):
    """`F.conv2d` with as many groups as channels and stride 1, and its gradients by forward convolutions alone.

    The weights' gradient of a channel is a convolution of the padded map with the output's gradient as its kernel:
    with images and channels all in groups of their own, one call makes them all.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, None, 1, padding, dilation, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.padding, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        (rows, columns), dilation = ctx.padding, ctx.dilation
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = F.conv2d(grad, weight.flip(2, 3), None, 1, ctx.padding, dilation, groups=len(weight))
        if ctx.needs_input_grad[1]:
            batch, channels = x.shape[:2]
            padded = F.pad(x, (columns, columns, rows, rows)).flatten(0, 1)[None]
            kernels = grad.flatten(0, 1)[:, None]
            each = F.conv2d(padded, kernels, None, dilation, groups=batch * channels)
            to_weight = each.unflatten(1, (batch, channels)).sum((0, 1))[:, None]
        return to_x, to_weight, None, None


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d of one odd kernel per channel and stride 1: maps [B, C, H, W] -> [B, C, H, W].

    In float32 on a CPU kernels of 7x7 and more are trained through `DepthwiseFunction`.
    """

    def __init__(self, dim: int, size: int, dilation: int = 1, bias: bool = True) -> None:
        super().__init__(dim, dim, size, padding=dilation * (size // 2), dilation=dilation, groups=dim, bias=bias)
        self.far = size >= FAR

    def forward(self, input: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and self.weight.requires_grad and self.far
        if (
            not trained
            or input.device.type != "cpu"
            or input.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        y = DepthwiseFunction.apply(input, self.weight, self.padding, self.dilation)
        return y if self.bias is None else y + self.bias[:, None, None]
