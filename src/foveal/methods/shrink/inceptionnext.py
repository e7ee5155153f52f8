"""InceptionNeXt: large depthwise convolutions become Inception ones, in which 5 of 8 channels pass, and are tuned.

Yu, Zhou, Yan and Wang, "InceptionNeXt: When Inception Meets ConvNeXt", CVPR 2024, arXiv 2303.16900. A 7x7 depthwise
convolution on C channels, bound by memory, becomes three small ones on g = C / 8 channels each,

    y = [x_1, DW_3x3 x_2, DW_1x11 x_3, DW_11x1 x_4],    widths C - 3g, g, g, g.

The 3x3 begins with the centre of the old kernels, the bands with their sums over rows and columns; what passes loses
its kernel. Optimiser steps on the task afterwards repair the model. It needs labels and gradients, and a network with
depthwise convolutions of at least 5x5 and stride 1: ConvNeXt, MambaOut, some EfficientNets.

Where we depart: the paper trains such networks from the start; carrying weights over from a trained one is ours. Steps
and learning rate are those of `singe`. Norms stay what they were. `foveal.architectures.inceptionnext` does the same to
any model in Python (`inceptionize`), and tells of the traffic that is gone.

When not to use it: without images to tune on; on networks of 3x3 convolutions, plain ViTs and windows (refused); where
`foveal shrink` has not timed it faster: the smaller the map and the wider the MLP, the less there is to gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from foveal.architectures.inceptionnext import inceptionize, swapped
from foveal.backbones.adapter import Backbone
from foveal.core.errors import BackboneError, UsageError
from foveal.core.families.shrink import Shrink, Shrunk, Target, TaskData
from foveal.core.method import Classifier, Spec, method
from foveal.core.options import option, options


@options
class Options:
    """What `inceptionnext` can be told."""

    min_kernel: int = option(5, "the smallest depthwise kernel that is replaced", ge=5, le=99)
    branch_ratio: float = option(0.125, "share of the channels in each of the three branches", gt=0, le=1 / 3)
    band: int = option(11, "length of the band kernels; odd", ge=3, le=31)
    after: int = option(200, "optimiser steps after the swap", ge=0, le=1_000_000)
    lr: float = option(3e-4, "learning rate of these steps", gt=0, le=1)


@method(
    Spec(
        family="shrink",
        title="InceptionNeXt",
        year=2023,
        arxiv="2303.16900",
        needs=frozenset({"labels", "gradients"}),
        tasks=("single-label", "multi-label"),
    ),
    Options,
)
class Inceptionnext(Shrink):
    """No target: the options say how far to go. Within their bounds a mixer has fewer weights than what it replaces."""

    def shrink(self, model: Classifier, data: TaskData | None, target: Target | None) -> Shrunk:
        """
        Raises:
            BackboneError: no depthwise convolution that could be replaced.
            UsageError: no data, unless `after` is 0.
        """
        chosen: Options = self.options
        backbone = cast(Backbone, model.backbone)
        side = backbone.preprocessing.size
        try:
            made, report = inceptionize(
                model, chosen.min_kernel, chosen.branch_ratio, chosen.band, input_size=(side, side)
            )
        except BackboneError as error:
            raise BackboneError(f"inceptionnext on {backbone.arch}: {error}") from None
        if chosen.after:
            if data is None:
                raise UsageError("inceptionnext tunes on labelled training images: give it some, or set after=0")
            made = data.tune(cast(Classifier, made.requires_grad_(True)), chosen.after, chosen.lr)
        notes: dict[str, Any] = {
            "replaced": len(report.replaced),
            "skipped": len(report.skipped),
            "depthwise_bytes_before": report.before.depthwise_bytes,
            "depthwise_bytes_after": report.after.depthwise_bytes,
        }
        return Shrunk(cast(Classifier, made.eval()), {"replaced": list(report.replaced)}, notes)

    def rebuild(self, model: Classifier, plan: Mapping[str, Any]) -> Classifier:
        chosen: Options = self.options
        made, replaced, _ = swapped(model, chosen.min_kernel, chosen.branch_ratio, chosen.band, transfer=False)
        if list(replaced) != plan["replaced"]:
            raise UsageError(
                f"the plan of inceptionnext is for other convolutions than the {len(replaced)} that these options "
                f"replace in {cast(Backbone, model.backbone).arch}"
            )
        return cast(Classifier, made.eval())
