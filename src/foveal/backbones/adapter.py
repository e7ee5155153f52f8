"""The only place that knows a timm model's insides: features, tokens, blocks, feature maps, preprocessing.

A Backbone made from stored weights is built only when something looks inside it: its features may already be in
the feature cache, and importing timm takes longer than fitting a head on them.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.backbones import weights
from foveal.backbones.quirks import BLOCK_ENDS, Family, Quirk, is_self_attention, quirk_of
from foveal.backbones.recorder import recording
from foveal.backbones.tokens import TokenHook, attention_mask
from foveal.core.errors import BackboneError, FovealError
from foveal.core.folders import atomic_file, cache_root
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing

DEFAULT = "tf_efficientnet_lite0"
ALIASES = {"vit": "vit_hybrid_foveal"}
"""Short names of backbones whose weights come with foveal."""
STORE = 1
"""Version of the files in the cache's `backbones` folder."""
ARGS = ("img_size",)
"""What a stored plan may pass to timm. Other arguments reach files and the network (`checkpoint_path`, `cache_dir`,
`pretrained_cfg_overlay`), and a stored plan may come from a stranger."""


@dataclass(frozen=True)
class Plan:
    """All that is needed to build a backbone, without its weights."""

    name: str
    arch: str
    args: dict[str, Any]
    preprocessing: Preprocessing
    width: int
    origin: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "preprocessing": self.preprocessing.to_dict()}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Plan:
        return Plan(**{**stored, "preprocessing": Preprocessing.from_dict(stored["preprocessing"])})


class Backbone(nn.Module):
    """A timm model without its classifier: normalised images [B, 3, H, W] -> features [B, width].

    Attributes:
        name: what the user asked for.
        arch: timm's name of the architecture.
        preprocessing: what is done to an image first.
        width: D, the length of a feature vector.
        origin: where the weights came from.
        changes: what was done to its structure since, in words that tell one change from another.
        token_hook: what happens to the tokens between blocks; None, or on a backbone that `has_tokens`.
    """

    def __init__(self, plan: Plan, model: nn.Module | None = None, tensors: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.changes = ""
        self.token_hook: TokenHook | None = None
        self._tensors = tensors
        if model is not None:
            self.__dict__["_modules"]["model"] = model
        elif tensors is None:
            raise ValueError("a Backbone needs a model or its tensors")

    @property
    def _modules(self) -> dict[str, nn.Module | None]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Children, as torch walks them; the model is built at the first look."""
        modules: dict[str, nn.Module | None] = self.__dict__["_modules"]
        if not modules and self.__dict__.get("_tensors") is not None:
            modules["model"] = build(self.plan, self._tensors).train(self.training)
            self._tensors = None
        return modules

    @_modules.setter
    def _modules(self, modules: dict[str, nn.Module | None]) -> None:
        self.__dict__["_modules"] = modules

    @property
    def built(self) -> bool:
        """Whether the timm model exists yet."""
        return bool(self.__dict__["_modules"])

    @property
    def model(self) -> Any:
        """The timm module, with `num_classes=0`."""
        return self._modules["model"]

    def train(self, mode: bool = True) -> Backbone:
        if self.built:
            return super().train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.built or args:
            return super().state_dict(*args, **kwargs)
        destination = kwargs.get("destination")
        destination = {} if destination is None else destination
        assert self._tensors is not None
        destination.update({f"{kwargs.get('prefix', '')}model.{name}": t for name, t in self._tensors.items()})
        return destination

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalised -> pooled features [B, D], what a classifier reads."""
        return self.model(images) if self.token_hook is None else self.finish_tokens(self.tokens(images))

    name = property(lambda self: self.plan.name)
    arch = property(lambda self: self.plan.arch)
    preprocessing = property(lambda self: self.plan.preprocessing)
    width = property(lambda self: self.plan.width)
    origin = property(lambda self: self.plan.origin)

    @property
    def quirk(self) -> Quirk:
        return quirk_of(self.model)

    @property
    def family(self) -> Family:
        """'cnn', 'vit' (one sequence at one width), 'windowed', or 'hybrid' (convolutions, then attention)."""
        return self.quirk.family

    @property
    def has_tokens(self) -> bool:
        """Whether `embed`, `blocks` and `finish_tokens` exist: one sequence that may grow or shrink midway."""
        return self.quirk.embed is not None

    def _tokens(self) -> Quirk:
        quirk = self.quirk
        if quirk.embed is None:
            raise BackboneError(
                f"{self.arch} ({quirk.family}) has no token sequence that can be changed: "
                "use a plain ViT such as vit, which comes with foveal"
            )
        return quirk

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, N, d], prefix tokens first and positions added, ready for block 0.

        Raises:
            BackboneError: the backbone has no token sequence.
        """
        return cast(Any, self._tokens().embed)(self.model, images)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks [B, N, d] -> [B, N, d], in order (the model's own modules, not copies)."""
        self._tokens()
        return nn.ModuleList(self.model.blocks)

    def tokens(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, N, d] after the last block, with what the token hook does on the way."""
        tokens, hook, state = self.embed(images), self.token_hook, dict[str, Any]()
        for done, block in enumerate(self.model.blocks):
            tokens = hook(done, tokens, state) if hook else tokens
            seen = state.get("seen")
            tokens = block(tokens) if seen is None else block(tokens, attn_mask=attention_mask(seen, tokens))
        return hook(len(self.model.blocks), tokens, state) if hook else tokens

    def finish_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, d] after the last block -> features [B, D]: final norm, pooling, head norm."""
        return cast(Any, self._tokens().finish)(self.model, tokens)

    @property
    def prefix(self) -> int:
        """How many class, distillation and register tokens come before the patch tokens."""
        self._tokens()
        return int(self.model.num_prefix_tokens)

    @property
    def reads_class_token(self) -> bool:
        """Whether the features are made of the class token alone."""
        return getattr(self.model, "global_pool", "") == "token"

    @property
    def token_width(self) -> int:
        self._tokens()
        return int(self.model.embed_dim)

    def attention_modules(self) -> list[tuple[str, nn.Module]]:
        """Self-attention modules and their names within this module; empty on networks without attention."""
        return [(name, module) for name, module in self.named_modules() if is_self_attention(module)]

    def block_ends(self) -> list[tuple[str, nn.Conv2d]]:
        """The last convolution of every residual block and its name within this module, from early to late.

        Raises:
            BackboneError: no residual blocks of convolutions.
        """
        found: list[tuple[str, nn.Conv2d]] = []
        for name, module in self.named_modules():
            end = BLOCK_ENDS.get(type(module).__name__, "")
            last = getattr(module, end, None) if end else None
            if not isinstance(last, nn.Conv2d):  # one with its norm, as in RegNet
                end, last = f"{end}.conv", getattr(last, "conv", None)
            if isinstance(last, nn.Conv2d):
                found.append((f"{name}.{end}", last))
        if not found:
            raise BackboneError(
                f"{self.arch} ({self.family}) has no residual blocks of convolutions: "
                "use a ResNet, RegNet, EfficientNet or MobileNet"
            )
        return found

    def feature_map(self, images: Tensor) -> list[tuple[Tensor, int]]:
        """Images [B, 3, H, W] -> a (map [B, C, h, w], stride in pixels) per stage, from early to late.

        Raises:
            BackboneError: the architecture does not give its feature maps.
        """
        if not hasattr(self.model, "forward_intermediates"):
            raise BackboneError(f"{self.arch} does not give its feature maps: choose another backbone")
        maps: list[Tensor] = self.model.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
        return [(each, round(int(images.shape[-1]) / int(each.shape[-1]))) for each in maps]

    @property
    def cell_width(self) -> int:
        """C of the cells of `features_and_cells`."""
        return int(self.model.num_features)

    def features_and_cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] as `forward` gives them, and what they are pooled from: cells of the last map, or patch
        tokens, [B, n, C].

        Raises:
            BackboneError: the architecture pools within its last layers.
        """
        last = self.model.forward_features(images) if hasattr(self.model, "forward_head") else None
        if not isinstance(last, Tensor) or last.ndim not in (3, 4):
            raise BackboneError(f"{self.arch} does not show what its features are pooled from: choose another backbone")
        if last.ndim == 4:
            cells = last.flatten(1, 2) if self.channels_last else last.flatten(2).transpose(1, 2)
        else:
            cells = last[:, int(getattr(self.model, "num_prefix_tokens", 0)) :]
        return self.model.forward_head(last), cells

    def map_layer(self) -> str:
        """timm's name of the module whose answer the network pools into features, found by running it once.

        Raises:
            BackboneError: the last map is computed outside of any module.
        """
        names = [name for name, _ in self.model.named_modules() if name]
        blank = next(self.model.parameters()).new_zeros(1, 3, self.preprocessing.size, self.preprocessing.size)
        with recording(self.model, names) as seen:
            pooled = self.model.forward_features(blank)
        found = [name for name in names if seen.get(name) is pooled]
        if not found:
            raise BackboneError(f"{self.arch} computes its last map outside of any layer: give layer=NAME")
        return found[0]

    @property
    def channels_last(self) -> bool:
        """Whether maps inside the network are [B, h, w, C]."""
        return getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def grid(self, size: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of patch tokens of an image of `size` (height, width), if it has patch tokens."""
        count = getattr(getattr(self.model, "patch_embed", None), "dynamic_feat_size", None)
        if count is None:
            return None
        rows, columns = count((int(size[0]), int(size[1])))
        return int(rows), int(columns)

    def describe(self) -> dict[str, Any]:
        """Plain data from which `rebuild_backbone` makes the same architecture."""
        return self.plan.to_dict()

    def fingerprint(self) -> str:
        """32 hex digits that change with any weight, the architecture, or the preprocessing."""
        tensors = self.model.state_dict() if self.built else cast("dict[str, Tensor]", self._tensors)
        digest = hashlib.sha256()
        plan = self.plan
        digest.update(json.dumps([plan.arch, plan.args, plan.preprocessing.to_dict()], sort_keys=True).encode())
        digest.update(self.changes.encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels uint8 [B, H, W, 3] -> float32 [B, 3, H, W], (x / 255 - mean) / std."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device) * 255
    scale = 1 / (torch.tensor(preprocessing.std, device=pixels.device) * 255)
    return ((pixels.float() - mean) * scale).permute(0, 3, 1, 2)


@torch.inference_mode(False)  # tensors made within inference mode could never take part in a gradient
def build(plan: Plan, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The timm module of a plan; with `tensors` (exactly its state dict), they become its parameters."""
    import timm

    import foveal.architectures  # noqa: F401

    if not timm.is_model(plan.arch):  # timm would look for hf-hub:owner/name on the network, for local-dir:/x on disk
        raise BackboneError(f"no backbone '{plan.arch}': `foveal backbones` lists them")

    def create() -> nn.Module:
        try:
            return timm.create_model(plan.arch, pretrained=False, num_classes=0, **plan.args)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise BackboneError(
                f"timm cannot build {plan.arch} at {plan.preprocessing.size} pixels ({error})"
            ) from None

    if tensors is None:
        return create()
    with torch.device("meta"):
        model = create()
    check_names(tensors, model, plan)
    tensors = {name: tensors[name].to(like.dtype) for name, like in model.state_dict().items()}
    if not has_hidden_buffers(model):
        model.load_state_dict(tensors, assign=True)
        return model
    model = create()
    model.load_state_dict(tensors)
    return model


def check_names(tensors: Mapping[str, Tensor], model: nn.Module, plan: Plan) -> None:
    expected = model.state_dict()
    weights.check_shapes(tensors, expected, plan.origin)
    extra = next((name for name in tensors if name not in expected), None)
    if extra is not None:
        raise BackboneError(f"{plan.origin}: tensor {extra} is not part of {plan.arch}")


def has_hidden_buffers(model: nn.Module) -> bool:
    """Whether the model computes tensors when it is made that its state dict does not hold."""
    stored = model.state_dict().keys()
    if any(name not in stored for name, _ in model.named_buffers()):
        return True
    return any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


def load_backbone(name: str, *, pretrained: bool = True, offline: bool = False, size: int | None = None) -> Backbone:
    """A backbone by timm's name, or from a local file.

    Args:
        name: any timm name (`foveal backbones`), `vit`, `ARCH@weights.safetensors`, the path of a .safetensors file
            whose metadata has an `architecture`, or a folder that `foveal pretrain` made.
        pretrained: False gives random weights (from torch's global generator), also where a file is named.
        offline: open no network connection.
        size: image side in pixels, if not the architecture's own.

    Raises:
        BackboneError: unknown name, weights missing or of another shape, no network.
    """
    folder = weights.folder_of(name)
    if folder is not None:
        return from_folder(name, folder, size, pretrained)
    name = ALIASES.get(name, name)
    arch, file = locate(name)
    if not pretrained:
        plan = make_plan(name, arch, size, "random")
        return Backbone(plan, build(plan))
    stored = stored_path(name, size)
    remembered = recall(stored)
    if remembered is not None:
        return remembered
    if file is not None:
        plan = make_plan(name, arch, size, str(file.absolute()))
        model, source = from_file(plan, file), file
    else:
        model, source, plan = from_name(name, arch, size, offline)
    return remember(stored, Backbone(plan, model), source)


def from_folder(name: str, folder: Path, size: int | None, pretrained: bool = True) -> Backbone:
    """What `foveal pretrain` left in a folder, at the image size it was pretrained with unless another is given."""
    described, tensors = weights.read_folder(folder)
    stored = Preprocessing.from_dict(described["preprocessing"])
    origin = str(folder.absolute()) if pretrained else "random"
    plan = make_plan(name, described["arch"], size or stored.size, origin)
    plan = replace(plan, preprocessing=replace(stored, size=plan.preprocessing.size))
    return Backbone(plan, build(plan, tensors if pretrained else None))


def rebuild_backbone(
    described: Mapping[str, Any], tensors: dict[str, Tensor] | None = None, *, most: int | None = None
) -> Backbone:
    """The backbone that `Backbone.describe` told of: with random weights to load into, or with `tensors`.

    Args:
        tensors: the timm model's whole state dict; the model is then built only when something looks inside it.
        most: how many numbers its weights may hold; an architecture with more is refused before memory is taken.

    Raises:
        BackboneError: not a plan that `describe` makes, or an architecture with too many weights.
    """
    plan = Plan.from_dict(described)
    size = plan.args.get("img_size", plan.preprocessing.size)
    if not plan.args.keys() <= set(ARGS) or size != plan.preprocessing.size:
        raise BackboneError(f"backbone arguments {plan.args}: expected none, or the image size as {ARGS[0]}")
    if tensors is not None:
        return Backbone(plan, tensors=tensors)
    if most is not None:
        with torch.device("meta"):
            numbers = sum(tensor.numel() for tensor in build(plan).state_dict().values())
        if numbers > most:
            raise BackboneError(f"{plan.arch} holds {numbers:,} numbers, its weights only {most:,}")
    return Backbone(plan, build(plan))


def imagenet_classifier(name: str = DEFAULT, *, offline: bool = False) -> Classifier:
    """The pretrained network with its own classifier: normalised images [B, 3, H, W] -> logits [B, 1000].

    Raises:
        BackboneError: as `load_backbone`, or the classifier is not a single linear layer.
    """
    name = ALIASES.get(name, name)
    arch, file = locate(name)
    if file is not None:
        raise BackboneError(f"{name} is a local file: expected the name of a pretrained timm model")
    backbone = load_backbone(name, offline=offline)
    full = from_name(name, arch, None, offline, classifier=True)[0]
    head = cast(Any, full).get_classifier()
    if not isinstance(head, nn.Linear) or head.in_features != backbone.width:
        raise BackboneError(f"the classifier of {arch} is not one linear layer: choose another backbone")
    return Classifier(backbone, head).eval()


def list_backbones(filter: str | None = None) -> list[dict[str, Any]]:
    """One row per timm architecture whose name matches `filter` (a shell pattern, or a part of the name).

    Rows have name, size (pixels), and weights: 'package', 'cache', 'hub' or 'none'.
    """
    import huggingface_hub as hub
    import timm

    import foveal.architectures  # noqa: F401

    pattern = filter if filter and any(sign in filter for sign in "*?[") else f"*{filter or ''}*"
    rows: list[dict[str, Any]] = []
    for name in timm.list_models():
        if not fnmatch.fnmatch(name, pattern):
            continue
        config = cast(Any, timm.get_pretrained_cfg(name))
        if weights.shipped_file(name):
            where = "package"
        elif config is None or not config.hf_hub_id:
            where = "none"
        else:
            found = hub.try_to_load_from_cache(f"{config.hf_hub_id}", "model.safetensors")
            where = "cache" if isinstance(found, str) else "hub"
        rows.append({"name": name, "size": config.input_size[-1] if config else None, "weights": where})
    return rows


def locate(name: str) -> tuple[str, Path | None]:
    """Split what the user gave into an architecture and a local weights file."""
    arch, at, path = name.partition("@")
    if at and (path.endswith((".safetensors", ".pth", ".pt", ".bin")) or os.path.exists(path)):
        return arch, Path(os.path.expanduser(path))
    if not name.endswith((".safetensors", ".pth", ".pt", ".bin")):
        return name, None
    file = Path(os.path.expanduser(name))
    if file.suffix == ".safetensors" and os.path.isfile(file):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
        except SafetensorError as error:
            raise BackboneError(f"cannot read weights from {file} ({error}): the file is damaged") from None
        if "architecture" in metadata:
            return metadata["architecture"], file
    if not os.path.exists(file):
        raise BackboneError(f"no weights file {file}: give an existing .safetensors file, or a timm name")
    raise BackboneError(f"{file} does not say its architecture: write ARCH@{name}, ARCH being a timm name")


def pretrained_config(arch: str) -> Any:
    import timm

    import foveal.architectures  # noqa: F401

    config = cast(Any, timm.get_pretrained_cfg(arch)) if timm.is_model(arch) else None
    if config is None:
        near = difflib.get_close_matches(arch.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`foveal backbones` lists them"
        raise BackboneError(f"no backbone '{arch}': {hint}")
    return config


def make_plan(name: str, arch: str, size: int | None, origin: str) -> Plan:
    config = pretrained_config(arch)
    args: dict[str, Any] = {}
    if size is not None and size < 1:
        raise BackboneError(f"image size {size}: expected a positive number of pixels")
    if size is not None and config.fixed_input_size and size != config.input_size[-1]:
        args["img_size"] = size
    preprocessing = Preprocessing(
        size=size or config.input_size[-1],
        mean=three(config.mean),
        std=three(config.std),
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",
        crop=float(config.crop_pct or 1.0),
    )
    plan = Plan(name, arch, args, preprocessing, 0, origin)
    with torch.device("meta"):
        model: Any = build(plan)
    return replace(plan, width=int(getattr(model, "head_hidden_size", None) or model.num_features))


def three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def from_file(plan: Plan, file: Path) -> nn.Module:
    """The model of a plan with a local file's weights; a classifier in the file is left out."""
    with torch.device("meta"):
        expected = build(plan).state_dict()
    given = weights.read_tensors(file)
    given = {
        name.removeprefix("model.") if "model." + next(iter(expected)) in given else name: t
        for name, t in given.items()
    }
    weights.check_shapes(given, expected, str(file))
    return build(plan, {name: given[name].to(like.dtype) for name, like in expected.items()})


def from_name(
    name: str, arch: str, size: int | None, offline: bool, classifier: bool = False
) -> tuple[nn.Module, Path, Plan]:
    """Weights an installed package ships, from the Hugging Face cache, or from the Hub."""
    import timm

    config = pretrained_config(arch)
    bare = arch.partition(".")[0]
    file = weights.shipped_file(bare)
    if file is not None:
        plan = make_plan(name, arch, size, f"package {weights.SHIPPED[bare][0]}")
        with torch.device("meta"):
            full = timm.create_model(arch, pretrained=False)
        tensors = weights.rename_in_order(weights.read_tensors(file), full.state_dict(), str(file))
        if classifier:
            full.load_state_dict(tensors, assign=True)
            return full, file, plan
        with torch.device("meta"):
            expected = build(plan).state_dict()
        if "pos_embed" in expected:
            tensors["pos_embed"] = on_grid(tensors["pos_embed"], expected["pos_embed"].shape[1])
        return build(plan, {key: tensors[key] for key in expected}), file, plan
    if not config.hf_hub_id:
        raise BackboneError(
            f"timm has no pretrained weights for {arch}: choose another, ARCH@file.safetensors, or --scratch"
        )
    filenames = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    file = weights.hub_file(arch, config.hf_hub_id, filenames, offline=offline)
    plan = make_plan(name, arch, size, f"hub:{config.hf_hub_id}")
    overlay = {"file": str(file), "hf_hub_id": None, "custom_load": False}
    try:
        options = {} if classifier else {"num_classes": 0}
        model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, **options, **plan.args)
    except Exception as error:  # timm's readers meet damaged and malicious files with errors of any type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"cannot load the weights of {arch} from {file} ({reason})") from None
    return model, file, plan


def on_grid(positions: Tensor, length: int) -> Tensor:
    """Positions [1, 1 + n^2, D] of a class token and a square of patches, resampled to `length` = 1 + m^2."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    side = math.isqrt(length - 1)
    return resample_abs_pos_embed(positions, [side, side])


def stored_path(name: str, size: int | None) -> Path:
    key = hashlib.sha256(repr((STORE, name, size, version("timm"), version("torch"))).encode()).hexdigest()[:32]
    return cache_root() / "backbones" / f"{key}.safetensors"


def stamp(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


def remember(stored: Path, backbone: Backbone, source: Path) -> Backbone:
    """Keep a backbone's tensors under timm's names, so that the next run needs neither timm nor the source's form."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in backbone.model.state_dict().items()}
    described = {"plan": backbone.describe(), "source": stamp(source), "fingerprint": backbone.fingerprint()}
    try:
        with atomic_file(stored) as staging:
            save_file(tensors, staging, {"foveal": json.dumps(described)})
    except (FovealError, RuntimeError):  # a full device, or tensors that share memory: only speed is lost
        pass
    return backbone


def recall(stored: Path) -> Backbone | None:
    """The backbone kept by `remember`, if its source has not changed since and no byte of it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(stored, "pt") as opened:
            described = json.loads(opened.metadata()["foveal"])
            if stamp(Path(described["source"][0])) != described["source"]:
                return None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    backbone = Backbone(Plan.from_dict(described["plan"]), tensors=tensors)
    return backbone if backbone.fingerprint() == described["fingerprint"] else None
