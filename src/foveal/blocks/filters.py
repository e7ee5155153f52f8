"""What a bank of filters is like, in numbers: how many differ, how they were drawn, and what shape they have.

A bank is the weight of a convolution, [n, m, kh, kw]: n filters that read m channels each. Nothing here needs images
or labels, but for `texture_length`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.core.errors import DataError

TINY = torch.finfo(torch.float64).tiny
SAME = 1e-6
"""How far, as a share of its norm, a filter may be from another and count as identical."""
RELUS = ("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "silu", "gelu", "hardswish", "mish", "elu", "celu")


def flat(bank: Tensor) -> Tensor:
    """Filters [n, ...] as rows [n, d] in float64."""
    return bank.detach().flatten(1).double().cpu()


def energies(bank: Tensor) -> Tensor:
    """Squared singular values of the flattened bank, largest first, [min(n, d)]."""
    rows = flat(bank)
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def effective_rank(bank: Tensor) -> float:
    """exp of the entropy of the shares of the squared singular values: 1 for copies, n for n orthogonal filters of one
    norm, 0 for a bank of zeros."""
    values = energies(bank)
    total = float(values.sum())
    if total <= TINY:
        return 0.0
    share = values / total
    share = share[share > 1e-15]
    return float(torch.exp(-(share * share.log()).sum()))


def energy_rank(bank: Tensor, share: float = 0.99) -> int:
    """The fewest directions that hold `share` of the bank's squared norm."""
    held = energies(bank).cumsum(0)
    return int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1 if float(held[-1]) > TINY else 0


def unit(bank: Tensor) -> Tensor:
    rows = flat(bank)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(TINY)


def duplicates(bank: Tensor, groups: int = 1, above: float = 0.95) -> int:
    """How many filters have an earlier one of the same group (that is, on the same channels) with |cos| > `above`."""
    rows = unit(bank).reshape(groups, -1, bank[0].numel())
    near = (rows @ rows.transpose(1, 2)).abs() > above
    return int(torch.tril(near, -1).any(2).sum())


def identical(bank: Tensor, groups: int = 1) -> int:
    """How many filters equal an earlier one of the same group: trained alike, they stay alike."""
    rows = flat(bank).reshape(groups, -1, bank[0].numel())
    norms = rows.square().sum(2)
    apart = norms[:, :, None] + norms[:, None] - 2 * rows @ rows.transpose(1, 2)
    return int(torch.tril(apart <= SAME**2 * norms[:, :, None], -1).any(2).sum())


def orthogonality(bank: Tensor) -> float:
    """|U U^T - I|_F / n for the filters at unit norm: 0 when no two share a direction, near 1 when all do."""
    rows = unit(bank)
    return float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).norm()) / len(rows)


def hoyer(bank: Tensor) -> Tensor:
    """(sqrt d - |w|_1 / |w|_2) / (sqrt d - 1) of each filter [n]: 0 for equal weights, 1 for one weight (Hoyer, 2004);
    0 where d = 1."""
    rows = flat(bank)
    root = math.sqrt(rows.shape[1])
    ratio = rows.abs().sum(1) / rows.norm(dim=1).clamp_min(TINY)
    return (root - ratio) / (root - 1) if root > 1 else torch.zeros(len(rows), dtype=rows.dtype)


def deviations(fan_in: int, fan_out: int) -> dict[str, float]:
    """Standard deviation of the weights under each scheme: He (2015), Glorot (2010) and LeCun (1998)."""
    return {
        "He": math.sqrt(2 / fan_in),
        "Glorot": math.sqrt(2 / (fan_in + fan_out)),
        "LeCun": math.sqrt(1 / fan_in),
    }


def recommended(activation: str) -> str:
    """The scheme of `deviations` that keeps variance through a layer followed by that activation ('': none)."""
    return "He" if activation in RELUS else "LeCun" if activation == "selu" else "Glorot"


def stacked(kernel: int, inputs: int, outputs: int, groups: int = 1) -> int:
    """Weights of the stack of 3 x 3 convolutions that sees as much as one kernel of odd side `kernel`; the first goes
    from `inputs` to `outputs` channels."""
    layers = (kernel - 1) // 2
    return 9 * (outputs * inputs + (layers - 1) * outputs * outputs) // groups


def separability(bank: Tensor) -> Tensor:
    """Share of each filter's energy [n] in the leading outer product of every channel's kernel: 1 where k x 1 and then
    1 x k do the same."""
    found: list[Tensor] = []
    for part in bank.detach().cpu().split(max(1, (1 << 17) // bank.shape[1])):
        kernels = part.double()
        gram = kernels @ kernels.mT if kernels.shape[2] <= kernels.shape[3] else kernels.mT @ kernels
        values = torch.linalg.eigvalsh(gram)
        total = values.sum((1, 2))
        found.append(torch.where(total > TINY, values[..., -1].sum(1) / total.clamp_min(TINY), 1.0))
    return torch.cat(found)


@dataclass(frozen=True)
class Spectrum:
    """Of each filter [n], its channels' power spectra added up.

    Attributes:
        dc: share of the power at frequency 0, 0..1.
        frequency: mean distance from frequency 0 weighted by power, cycles a pixel, 0..0.71.
        orientation: of the main wave's normal, degrees 0..180; 0 changes along a row, 90 along a column.
        coherence: how much of the variation goes one way, 0 (all ways alike) to 1 (stripes).
        energy: squared norm without the mean of each kernel.
    """

    dc: Tensor
    frequency: Tensor
    orientation: Tensor
    coherence: Tensor
    energy: Tensor

    def oriented(self) -> float:
        """Mean coherence, weighted by energy: the share of the bank's variation that has a direction."""
        return float((self.coherence * self.energy).sum() / self.energy.sum().clamp_min(TINY))


def spectrum(bank: Tensor) -> Spectrum:
    """Power spectra on a padded grid of odd side, so that frequencies lie evenly around 0, and from their second
    moments, the structure tensor of the kernels (Parseval), orientation and coherence."""
    height, width = bank.shape[2:]
    down, across = (torch.fft.fftfreq(4 * side + 1, dtype=torch.float64) for side in (height, width))
    v, u = down[:, None], across[None]
    parts: list[Tensor] = []
    for kernels in bank.detach().cpu().split(max(1, (1 << 22) // (bank.shape[1] * 16 * height * width))):
        kernels = kernels.double()
        power = torch.fft.fft2(kernels, s=(len(down), len(across))).abs().square().sum(1)
        energy = kernels.square().sum((1, 2, 3))
        mean = kernels.sum((2, 3)).square().sum(1) / (height * width)
        total = power.sum((1, 2)).clamp_min(TINY)
        across_, down_, both = (((power * moment).sum((1, 2)) / total) for moment in (u * u, v * v, u * v))
        spread = torch.hypot(across_ - down_, 2 * both)
        parts.append(
            torch.stack(
                [
                    mean / energy.clamp_min(TINY),
                    (power * torch.hypot(u, v)).sum((1, 2)) / total,
                    torch.rad2deg(0.5 * torch.atan2(2 * both, across_ - down_)) % 180,
                    spread / (across_ + down_).clamp_min(TINY),
                    (energy - mean).clamp_min(0),
                ]
            )
        )
    return Spectrum(*torch.cat(parts, 1))


def texture_length(images: Tensor) -> Tensor:
    """How far, in pixels, each image [B, C, H, W] resembles itself: the lag at which the autocorrelation of its mean
    over channels, averaged over all directions, falls below 1/e; at most half of the shorter side. [B].

    Raises:
        DataError: an image without any variation.
    """
    grey = images.detach().double().mean(1)
    grey = grey - grey.mean((1, 2), keepdim=True)
    flat_ones = torch.nonzero(grey.square().mean((1, 2)) < 1e-12)[:, 0].tolist()
    if flat_ones:
        raise DataError(
            f"{len(flat_ones)} of {len(images)} images are one constant colour (the first is image {flat_ones[0]}): "
            "zero variance has no texture; leave them out"
        )
    height, width = grey.shape[1:]
    size = (2 * height, 2 * width)
    pairs = torch.fft.irfft2(torch.fft.rfft2(torch.ones_like(grey[:1]), s=size).abs().square(), s=size)
    y, x = (torch.fft.fftfreq(side, 1 / side) for side in size)
    lag = torch.hypot(y[:, None], x[None]).round().long()
    most = min(height, width) // 2
    inside = lag <= most
    count = torch.zeros(1, most + 1, dtype=torch.float64).index_add_(1, lag[inside], pairs[:, inside])
    found: list[Tensor] = []
    for part in grey.split(16):
        share = torch.fft.irfft2(torch.fft.rfft2(part, s=size).abs().square(), s=size)
        rings = torch.zeros(len(part), most + 1, dtype=torch.float64).index_add_(1, lag[inside], share[:, inside])
        rings /= count
        below = rings / rings[:, :1] < 1 / math.e
        found.append(torch.where(below.any(1), below.double().argmax(1), most).double())
    return torch.cat(found)
