"""Less is More (Wolf et al., Computers in Biology and Medicine 183, 2024, arXiv 2410.14524).

Slices, frames and photos of a production line repeat themselves; to contrastive pretraining every repetition is a
false negative. Each image is hashed to 64 bits, and a pool is covered greedily, in the order of names:

    bit_ij = [g_i,j+1 > g_ij] of the grey picture g at 8 x 9;   the first image left stays, and every image whose
    hash is at most `radius` bits from its goes.

Within a group (a volume, a patient, a video) each dropped image is within the radius of the one that stands for it,
and any two that stay are further apart. The paper's best radius is 6. It needs no labels and no network.

Where we depart from the paper: `--keep` looks for the smallest radius that leaves no more than a share. The paper's
rivals stand behind the same cover: `by=features` (hundredths of the cosine distance of a frozen backbone's features)
and `by=order` (every n-th image); their radii in the paper are not known to us. Mutual information and SSIM are left
out.

When not to use it: where small differences are what the images are for (a crack, a lesion: look at the sheet of the
fullest clusters first); where only the colour differs, which the hash does not see. On solar cells in six copies each
the gain over as many images drawn at random was within the spread of seeds (see the card).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int64, Num, UInt8
from PIL import Image

from foveal.blocks.cover import Cosine, Distance, Hamming, Steps, grouped_cover, pairs_within
from foveal.core.errors import DataError, UsageError
from foveal.core.families.curate import Curate, Selection
from foveal.core.method import Spec, method
from foveal.core.options import option, options

PAPER = 6
LARGEST = 64
CURVE = range(17)
"""Radii at which the number that stays is counted."""
HUE = 16
"""Levels of 0 to 255 by which the mean colours of copies may differ, brightness aside."""
BATCH = 256
"""Images of the contrastive batch whose false negatives are counted."""
COUNTED = 20_000
"""Images whose pairs are all compared for that count; of more, so many evenly drawn ones."""


def dhash(grey: Image.Image, size: int = 8) -> UInt8[np.ndarray, "bytes=8"]:
    """Difference hash of a grey picture, 64 bits in 8 bytes: whether each pixel is darker than its right neighbour."""
    small = np.asarray(grey.resize((size + 1, size), Image.Resampling.LANCZOS))
    return np.packbits(small[:, 1:] > small[:, :-1])


def to_grey(image: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    """8-bit grey; deep grey through a window (its ends become 0 and 255).

    Raises:
        UsageError: deep grey without a window.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("L")
    values = np.asarray(image).astype(np.float32)
    if window is None:
        raise UsageError(
            f"16-bit or deeper images (here {values.min():g} to {values.max():g}) need a window of grey values to be "
            "hashed: give window=LOW..HIGH, such as less-is-more:window=0..4095"
        )
    scaled = (values - window[0]) * (255 / (window[1] - window[0]))
    return Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))


def read_window(text: str) -> tuple[float, float] | None:
    """
    Raises:
        UsageError: not two rising numbers.
    """
    if not text:
        return None
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise UsageError(f"window={text}: expected LOW..HIGH in grey values, such as 0..4095")
    return low, high


def distances(seen: Num[np.ndarray, "n ..."], by: str) -> Distance:
    """How far apart images are: in bits of their hashes, in their features, or in their order."""
    if by == "dhash":
        return Hamming(np.ascontiguousarray(seen[:, :8]).view(np.uint64)[:, 0])
    if by == "order":
        return Steps(np.arange(len(seen)))
    X = np.asarray(seen, np.float32)
    return Cosine(X / np.linalg.norm(X, axis=1, keepdims=True).clip(1e-12))


@options
class Options:
    """What `less-is-more` can be told."""

    by: Literal["dhash", "features", "order"] = option("dhash", "what is compared: hashes, features, places in order")
    radius: int | None = option(
        None, "largest distance that is dropped; default 6, with --keep the smallest that reaches it", ge=0, le=LARGEST
    )
    window: str = option("", "LOW..HIGH, the grey values of 16-bit images that become black and white")


@method(
    Spec(
        family="curate",
        title="Less is More",
        year=2024,
        arxiv="2410.14524",
        needs=frozenset(),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class LessIsMore(Curate):
    def reads(self) -> Literal["pixels", "features"]:
        return "features" if self.options.by == "features" else "pixels"

    def look(self, image: Image.Image) -> UInt8[np.ndarray, "bytes=11"]:
        """The hash, then the mean red, green and blue."""
        if image.mode.startswith(("I", "F")):
            grey = to_grey(image, read_window(self.options.window))
            colour = np.zeros(3, np.uint8)
        else:
            grey, colour = (
                image.convert("L"),
                np.asarray(image.resize((1, 1), Image.Resampling.BOX).convert("RGB"))[0, 0],
            )
        return np.concatenate([dhash(grey), colour])

    def select(self, seen: Num[np.ndarray, "n ..."], groups: Int64[np.ndarray, " n"], keep: float | None) -> Selection:
        """
        Raises:
            UsageError: both --keep and a radius; a share that no radius reaches.
            DataError: no images.
        """
        if not len(seen):
            raise DataError("there are no images to choose from")
        chosen: Options = self.options
        if keep is not None and chosen.radius is not None:
            raise UsageError(
                f"--keep {keep:g} chooses the radius, but radius={chosen.radius} is given: say one of them"
            )
        distance, n = distances(seen, chosen.by), len(seen)
        counts: dict[int, int] = {}

        def cover(radius: int) -> tuple[np.ndarray, np.ndarray]:
            exemplar, apart = grouped_cover(distance, groups, radius)
            counts[radius] = int((exemplar == np.arange(n)).sum())
            return exemplar, apart

        radius = PAPER if chosen.radius is None else chosen.radius
        if keep is not None:
            radius = next((each for each in range(LARGEST + 1) if cover(each) and counts[each] <= keep * n), None)
        if radius is None:
            least = counts[LARGEST]
            raise UsageError(
                f"--keep {keep:g} cannot be met: even radius {LARGEST} leaves {least} of {n} images ({least / n:.2f}), "
                f"at least one of each of the {len(np.unique(groups))} groups: choose a larger share or fewer groups"
            )
        exemplar, apart = cover(radius)
        for each in CURVE:
            if each not in counts:
                cover(each)
        stands_for = np.bincount(exemplar, minlength=n)[exemplar]
        rows = zip((exemplar == np.arange(n)).tolist(), apart.tolist(), stands_for.tolist(), strict=True)
        return Selection(
            exemplar=exemplar,
            distance=apart,
            score=stands_for.astype(np.float32),
            reasons=[reason(*each, chosen.by) for each in rows],
            chosen={"radius": radius},
            curve=[{"radius": each, "kept": counts[each]} for each in sorted(counts)],
            audit=false_negatives(distance, exemplar, radius),
            notes=blind(seen, exemplar) if chosen.by == "dhash" else (),
        )


UNITS = {"dhash": "bits", "features": "hundredths of the cosine distance", "order": "places"}


def reason(kept: bool, apart: float, stands_for: int, by: str) -> str:
    if not kept:
        return f"dropped: {apart:.3g} {UNITS[by]} from its exemplar"
    return f"kept: stands for {stands_for - 1} more" if stands_for > 1 else "kept: like no earlier one"


def false_negatives(distance: Distance, exemplar: np.ndarray, radius: int) -> dict[str, float]:
    """Pairs within the radius that a random batch of BATCH images holds, on average, of all and of those that stay."""
    found = {}
    for name, items in (("before", np.arange(len(exemplar))), ("after", np.unique(exemplar))):
        drawn = items[np.linspace(0, len(items) - 1, min(len(items), COUNTED)).astype(np.int64)]
        share = pairs_within(distance, drawn, radius) / max(1, len(drawn) * (len(drawn) - 1) // 2)
        found[f"false_negatives_in_{BATCH}_{name}"] = share * BATCH * (BATCH - 1) / 2
    return found


def blind(seen: UInt8[np.ndarray, "n bytes=11"], exemplar: Int64[np.ndarray, " n"]) -> tuple[str, ...]:
    """A note where images were dropped for others of another colour."""
    colour = seen[:, 8:].astype(np.float32)
    hue = colour - colour.mean(1, keepdims=True)
    differ = int((np.abs(hue - hue[exemplar]).max(1) > HUE).sum())
    if not differ:
        return ()
    return (f"{differ} images were dropped for one of another colour, which the hash does not see: try by=features",)
