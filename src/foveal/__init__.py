"""foveal: from a folder of images to a vision model you can trust and ship.

The verbs are functions here, under the same names as on the command line, and imported when first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from foveal.ship.bundle import Bundle, load
    from foveal.verbs.audit import audit
    from foveal.verbs.backbones import backbones
    from foveal.verbs.check import check
    from foveal.verbs.compare import compare
    from foveal.verbs.curate import curate
    from foveal.verbs.distill import distill
    from foveal.verbs.edit import edit
    from foveal.verbs.embed import embed
    from foveal.verbs.evaluate import evaluate
    from foveal.verbs.explain import explain
    from foveal.verbs.export import export
    from foveal.verbs.fit import fit
    from foveal.verbs.index import index
    from foveal.verbs.methods import methods
    from foveal.verbs.predict import predict
    from foveal.verbs.pretrain import pretrain
    from foveal.verbs.push import push
    from foveal.verbs.reproduce import reproduce
    from foveal.verbs.samples import samples
    from foveal.verbs.search import search
    from foveal.verbs.serve import serve
    from foveal.verbs.shrink import shrink
    from foveal.verbs.update import update

VERBS = (
    "fit",
    "compare",
    "embed",
    "pretrain",
    "predict",
    "evaluate",
    "explain",
    "edit",
    "audit",
    "check",
    "curate",
    "index",
    "search",
    "export",
    "shrink",
    "distill",
    "update",
    "serve",
    "push",
    "methods",
    "backbones",
    "samples",
    "reproduce",
)
__all__ = [
    "Bundle",
    "audit",
    "backbones",
    "check",
    "compare",
    "curate",
    "distill",
    "edit",
    "embed",
    "evaluate",
    "explain",
    "export",
    "fit",
    "index",
    "load",
    "methods",
    "predict",
    "pretrain",
    "push",
    "reproduce",
    "samples",
    "search",
    "serve",
    "shrink",
    "update",
]


class Api(ModuleType):
    """Importing a room (foveal.evaluate, foveal.methods, foveal.backbones) leaves the verb of its name in place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = Api


def __getattr__(name: str) -> Any:
    if name in VERBS:
        return getattr(import_module(f"foveal.verbs.{name}"), name)
    if name in ("Bundle", "load"):
        return getattr(import_module("foveal.ship.bundle"), name)
    raise AttributeError(f"module 'foveal' has no attribute '{name}'")
