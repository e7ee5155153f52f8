"""Diffusion models as a method asks of them: noise predictors of pixels by class, or of Stable Diffusion's latents.

Two folders are understood: foveal's own (painter.json and model.safetensors: a class-conditional UNet2DModel of
diffusers on pixels, its classes as words), and diffusers' (model_index.json) of Stable Diffusion 1.x and 2.x base. A
name such as owner/name is looked for in the Hugging Face cache; nothing is downloaded.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveal.core.bundle import atomic_folder, write_json
from foveal.core.errors import BackboneError, MissingExtra, UsageError
from foveal.core.schema import Stored, read_json

DETERMINISTIC = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
"""Schedulers whose noise levels are those of the betas in their settings; the steps between them are DDIM's, here."""


class StoredPainter(Stored):
    """painter.json."""

    format: Annotated[int, Field(ge=1, le=1)]
    classes: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    size: Annotated[int, Field(ge=8, le=256)]
    channels: Annotated[int, Field(ge=1, le=3)]
    widths: Annotated[list[Annotated[int, Field(ge=8, le=1024)]], Field(min_length=1, max_length=6)]
    layers: Annotated[int, Field(ge=1, le=8)]


@dataclass(frozen=True)
class Plan:
    """All that is needed to build a painter of pixels, without its weights."""

    classes: tuple[str, ...]
    size: int
    channels: int = 1
    widths: tuple[int, ...] = (32, 64)
    layers: int = 1


class PixelPainter(nn.Module):
    """A small class-conditional network of noise: images in -1..1 [B, C, S, S], a class for each or none.

    Attributes:
        alphas: [1000], of linear betas from 1e-4 to 0.02.
        empty: the class that stands for none.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        try:
            from diffusers.models.unets.unet_2d import UNet2DModel
        except ImportError:
            raise MissingExtra("diffusers", "generate", "a diffusion model") from None
        self.plan = plan
        last = len(plan.widths) - 1
        self.unet = UNet2DModel(
            sample_size=plan.size,
            in_channels=plan.channels,
            out_channels=plan.channels,
            layers_per_block=plan.layers,
            block_out_channels=plan.widths,
            down_block_types=tuple("AttnDownBlock2D" if k == last else "DownBlock2D" for k in range(last + 1)),
            up_block_types=tuple("AttnUpBlock2D" if k == 0 else "UpBlock2D" for k in range(last + 1)),
            norm_num_groups=8,
            attention_head_dim=8,
            num_class_embeds=len(plan.classes) + 1,
        )
        self.register_buffer("alphas", schedule(), persistent=False)
        self.register_buffer("empty", torch.tensor([len(plan.classes)]), persistent=False)

    alphas: Tensor
    empty: Tensor

    def forward(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """Noise in x [B, C, S, S] at timesteps t [B], for classes [B]."""
        return self.unet(x, t, class_labels=classes).sample

    def eps(self, x: Tensor, t: int, c: Tensor) -> Tensor:
        return self(x, torch.full((len(x),), t, device=x.device), c.expand(len(x)))

    def condition(self, text: str) -> Tensor:
        """The class that a text names [1]; '' is none.

        Raises:
            UsageError: no class of that name.
        """
        if text and text not in self.plan.classes:
            raise UsageError(f"this model knows no '{text}': it was taught {', '.join(self.plan.classes)}")
        return torch.tensor([self.plan.classes.index(text) if text else len(self.plan.classes)])

    def encode(self, image: Tensor) -> Tensor:
        """An image [1, 3, S, S] in 0..1 -> what the network sees [1, C, S, S].

        Raises:
            UsageError: another size.
        """
        side = self.plan.size
        if image.shape[-2:] != (side, side):
            raise UsageError(
                f"the image has {image.shape[-1]} x {image.shape[-2]} pixels, this model paints {side} x {side}: crop "
                "it to a square and resize it"
            )
        grey = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]
        seen = image if self.plan.channels == 3 else (image * grey).sum(1, keepdim=True)
        return 2 * seen - 1

    def decode(self, x: Tensor) -> Tensor:
        """The reverse: [1, C, S, S] -> an image [1, 3, S, S] in 0..1."""
        return ((x + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)


class LatentPainter:
    """Stable Diffusion: latents of 4 channels at an eighth of the size, conditions [1, 77, d] of CLIP's text tower."""

    def __init__(self, folder: Path) -> None:
        try:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError:
            raise MissingExtra("diffusers and transformers", "generate,language", "Stable Diffusion") from None
        self.alphas = alphas_of(folder / "scheduler" / "scheduler_config.json")
        try:
            given: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
            self.unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **given).eval()
            self.vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae", **given).eval()
            self.text: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", **given).eval()
            self.tokens: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackboneError(
                f"{folder} is not a Stable Diffusion that can be read ({reason}): expected unet, vae, text_encoder, "
                "tokenizer and scheduler, weights as .safetensors"
            ) from None
        self.multiple = 2 ** (len(self.vae.config.block_out_channels) - 1) * 2 ** (
            len(self.unet.config.block_out_channels) - 1
        )
        self.empty = self.condition("")

    def to(self, device: torch.device) -> LatentPainter:
        for module in (self.unet, self.vae, self.text):
            module.to(device)
        self.empty = self.empty.to(device)
        return self

    def eps(self, x: Tensor, t: int, c: Tensor) -> Tensor:
        return self.unet(x, t, encoder_hidden_states=c.expand(len(x), -1, -1)).sample

    @torch.no_grad()
    def condition(self, text: str) -> Tensor:
        length = min(self.tokens.model_max_length, self.text.config.max_position_embeddings)
        read = self.tokens(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text(read.input_ids.to(self.text.device))[0]

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """
        Raises:
            UsageError: sides that are no multiple of what the network halves.
        """
        if any(length % self.multiple for length in image.shape[-2:]):
            raise UsageError(
                f"the image has {image.shape[-1]} x {image.shape[-2]} pixels, expected multiples of {self.multiple}: "
                "crop or resize it"
            )
        return self.vae.encode(2 * image - 1).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        return ((self.vae.decode(x / self.vae.config.scaling_factor).sample + 1) / 2).clamp(0, 1)


def schedule(
    kind: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
    steps: int = 1000,
    start: float = 1e-4,
    end: float = 0.02,
) -> Tensor:
    """Cumulative products of 1 - beta [steps], float64: the names and formulas of diffusers' `beta_schedule`."""
    if kind == "squaredcos_cap_v2":
        bar = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).square()
        return torch.cumprod(1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999), 0)
    root = 0.5 if kind == "scaled_linear" else 1.0
    betas = torch.linspace(start**root, end**root, steps, dtype=torch.float64) ** (1 / root)
    return torch.cumprod(1 - betas, 0)


def alphas_of(file: Path) -> Tensor:
    """The schedule of a diffusers scheduler's settings.

    Raises:
        BackboneError: missing, of a sampler with other noise levels or fresh noise, or not of a predictor of noise.
    """
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise BackboneError(f"{file} cannot be read ({error}): expected a diffusers scheduler's settings") from None
    kind, target = str(config.get("_class_name")), config.get("prediction_type", "epsilon")
    if target != "epsilon":
        raise BackboneError(
            f"this model predicts '{target}', expected the noise ('epsilon'): choose Stable Diffusion 1.x or 2.x base"
        )
    fresh = float(config.get("eta") or 0) > 0 or config.get("use_karras_sigmas") or config.get("rescale_betas_zero_snr")
    if kind not in DETERMINISTIC or fresh:
        raise BackboneError(
            f"{kind} with these settings is not a deterministic DDIM: it adds fresh noise (eta > 0, ancestral) or "
            f"takes other noise levels (Karras); expected one of {', '.join(DETERMINISTIC)} with eta 0"
        )
    name = str(config.get("beta_schedule", "linear"))
    if name not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        raise BackboneError(f"beta schedule '{name}': expected linear, scaled_linear or squaredcos_cap_v2")
    return schedule(
        cast(Any, name),
        int(config.get("num_train_timesteps", 1000)),
        float(config.get("beta_start", 1e-4)),
        float(config.get("beta_end", 0.02)),
    )


def save_painter(painter: PixelPainter, folder: Path) -> None:
    """Write painter.json and model.safetensors, whole or not at all."""
    with atomic_folder(folder) as staging:
        stored = {name: value.contiguous() for name, value in painter.state_dict().items()}
        save_file(stored, staging / "model.safetensors")
        write_json(staging / "painter.json", {"format": 1, **asdict(painter.plan)})


def load_painter(model: str) -> PixelPainter | LatentPainter:
    """The diffusion model in a folder, or of a name in the Hugging Face cache.

    Raises:
        BackboneError: nothing of the kind there, or damaged.
        MissingExtra: diffusers (or transformers) is not installed.
    """
    folder = Path(model).expanduser()
    if (folder / "painter.json").is_file():
        return load_pixels(folder)
    if not folder.is_dir():
        folder = cached(model)
    if not (folder / "model_index.json").is_file():
        raise BackboneError(
            f"{folder} holds no diffusion model: expected painter.json (foveal's) or model_index.json (diffusers')"
        )
    return LatentPainter(folder)


def load_pixels(folder: Path) -> PixelPainter:
    try:
        stored = read_json(folder / "painter.json")
        StoredPainter.model_validate(stored)
        plan = Plan(
            tuple(stored["classes"]), stored["size"], stored["channels"], tuple(stored["widths"]), stored["layers"]
        )
        painter = PixelPainter(plan)
        painter.load_state_dict(load_file(folder / "model.safetensors"))
    except MissingExtra:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise BackboneError(f"painter.json in {folder} is not as foveal writes it ({fault})") from None
    except Exception as error:  # modules meet tensors of other shapes, types and numbers with errors of any type
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise BackboneError(f"the diffusion model in {folder} cannot be read ({reason}): teach it again") from None
    return painter.eval()


def cached(name: str) -> Path:
    """The folder of a name in the Hugging Face cache."""
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except Exception:  # the Hub client raises its own, its transport's and the system's errors
        raise BackboneError(
            f"no diffusion model '{name}' on this machine, and foveal downloads none unasked: give a folder of "
            f"diffusers (model_index.json) or of foveal (painter.json), or fetch it: huggingface-cli download {name}"
        ) from None
