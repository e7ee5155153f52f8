"""The two-dimensional real Fourier transform as pairs of real tensors, with a form for engines that have no FFT."""

from __future__ import annotations

import torch
from torch import Tensor


def rfft2_pair(x: Tensor, dense: bool | None = None) -> tuple[Tensor, Tensor]:
    """Real maps [..., H, W] of any float type -> real and imaginary parts [..., H, W // 2 + 1], float32, orthonormal.

    Args:
        dense: multiply by DFT matrices, O(HW(H + W)), rather than transform fast, O(HW log HW); equal to about 1e-5.
            None: only while a graph is exported to ONNX, since its exporter and most mobile engines have no FFT.
    """
    x = x.float()
    if not (torch.onnx.is_in_onnx_export() if dense is None else dense):
        z = torch.fft.rfft2(x, norm="ortho")
        return z.real, z.imag
    height, width = int(x.shape[-2]), int(x.shape[-1])
    cos_w, sin_w = waves(width, width // 2 + 1, x)
    cos_h, sin_h = waves(height, height, x)
    real, imaginary = x @ cos_w, -(x @ sin_w)
    return cos_h @ real + sin_h @ imaginary, cos_h @ imaginary - sin_h @ real


def irfft2_pair(real: Tensor, imaginary: Tensor, size: tuple[int, int], dense: bool | None = None) -> Tensor:
    """Inverse of `rfft2_pair`: parts [..., H, W // 2 + 1] -> real maps [..., H, W], float32."""
    if not (torch.onnx.is_in_onnx_export() if dense is None else dense):
        return torch.fft.irfft2(torch.complex(real, imaginary), s=size, norm="ortho")
    height, width = size
    cos_h, sin_h = waves(height, height, real)
    real, imaginary = cos_h @ real - sin_h @ imaginary, cos_h @ imaginary + sin_h @ real
    cos_w, sin_w = waves(width, width // 2 + 1, real)
    twice = torch.full((width // 2 + 1,), 2.0, device=real.device)  # a column stands for its mirror image too
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return (real * twice) @ cos_w.mT - (imaginary * twice) @ sin_w.mT


def filter_map(x: Tensor, real: Tensor, imaginary: Tensor, dense: bool | None = None) -> Tensor:
    """Multiply spectra of maps [..., H, W] by a + ib [..., H, W // 2 + 1]: a convolution that wraps around, float32.

    Args:
        dense: as `rfft2_pair`'s.
    """
    size = (int(x.shape[-2]), int(x.shape[-1]))
    if torch.onnx.is_in_onnx_export() if dense is None else dense:
        a, b = rfft2_pair(x, True)
        return irfft2_pair(a * real - b * imaginary, a * imaginary + b * real, size, True)
    return torch.fft.irfft2(torch.fft.rfft2(x.float()) * torch.complex(real, imaginary), s=size)


def waves(length: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi n k / length, over sqrt(length): [length, count] each. The angle is reduced in integers."""
    n = torch.arange(length, device=like.device)
    turns = (n[:, None] * n[None, :count]).remainder(length).double() * (2 * torch.pi / length)
    scale = length**-0.5
    return (turns.cos() * scale).float(), (turns.sin() * scale).float()
