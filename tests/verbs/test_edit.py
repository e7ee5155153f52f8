"""foveal edit: a picture, words and a diffusion model in a folder; the picture, the mask and a page out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import foveal
from foveal.backbones.painter import LatentPainter, PixelPainter, Plan, alphas_of, load_painter, save_painter, schedule
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.data.glyphs import STROKES, glyph

LIGHT = "diffedit:steps=4,maps=2,guidance=2"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion model of 16 x 16 pixels that was taught nothing."""
    folder = tmp_path_factory.mktemp("models") / "glyphs"
    torch.manual_seed(0)
    save_painter(PixelPainter(Plan(tuple(STROKES), 16, 1, (8, 16))), folder)
    return folder


@pytest.fixture
def three(tmp_path: Path) -> Path:
    pixels = (255 * glyph("3", 0, seed=0)).round().astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "three.png")
    return tmp_path / "three.png"


def test_an_edit_with_the_models_own_mask(model: Path, three: Path, tmp_path: Path):
    out = tmp_path / "out"
    record = foveal.edit(three, to="8", from_="3", model=str(model), method=LIGHT, out=out).to_dict()
    assert json.loads((out / "edit.json").read_text()) == record
    before, after, mask = (np.asarray(Image.open(out / f"{name}.png")) for name in ("original", "edited", "mask"))
    assert np.array_equal(before, np.asarray(Image.open(three)))
    assert 0 < record["share"] < 1
    assert (mask > 0).mean() == pytest.approx(record["share"])
    assert np.array_equal(after[mask == 0], before[mask == 0]), "outside of the mask every pixel is as before"
    assert record["changed_outside"] == 0.0
    assert not np.array_equal(after, before)
    page = (out / "index.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "“8”" in page
    again = foveal.edit(three, to="8", from_="3", model=str(model), method=LIGHT, out=tmp_path / "again")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "edited.png")), after)
    assert "of the picture was open to the edit" in again.to_text()


def test_a_mask_that_was_drawn(model: Path, three: Path, tmp_path: Path):
    drawn = np.zeros((16, 16), np.uint8)
    drawn[:, :8] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    record = foveal.edit(three, to="8", model=str(model), method=LIGHT, mask=tmp_path / "mask.png", out=out)
    assert record["mask"] == "given"
    assert record["share"] == 0.5
    before, after = (np.asarray(Image.open(out / f"{name}.png")) for name in ("original", "edited"))
    assert np.array_equal(after[:, 8:], before[:, 8:])
    assert not np.array_equal(after[:, :8], before[:, :8])


def test_equal_texts_leave_the_picture_and_say_so(model: Path, three: Path, tmp_path: Path):
    out = tmp_path / "out"
    record = foveal.edit(three, to="3", from_="3", model=str(model), method=LIGHT, out=out)
    assert "the mask is empty" in record["notes"][0]
    assert record["changed"] == 0
    assert np.array_equal(np.asarray(Image.open(out / "edited.png")), np.asarray(Image.open(three)))


def test_what_is_refused(model: Path, three: Path, tmp_path: Path):
    def edit(image: Path = three, to: str = "8", folder: str = str(model), mask: Path | None = None, **more: str):
        foveal.edit(image, to=to, model=folder, method=LIGHT, mask=mask, out=tmp_path / "out", **more)  # type: ignore

    with pytest.raises(UsageError, match="--to and --from are both empty"):
        edit(to=" ")
    with pytest.raises(UsageError, match="knows no 'cat': it was taught 0, 1, 2"):
        edit(to="cat")
    Image.new("RGB", (20, 16)).save(tmp_path / "wide.png")
    with pytest.raises(UsageError, match="the image has 20 x 16 pixels, this model paints 16 x 16: crop it"):
        edit(tmp_path / "wide.png")
    with pytest.raises(UsageError, match="the mask has 20 x 16 pixels, the image 16 x 16"):
        edit(mask=tmp_path / "wide.png")
    with pytest.raises(DataError, match=r"missing.png: cannot be read"):
        edit(tmp_path / "missing.png")
    with pytest.raises(
        BackboneError, match="no diffusion model 'nobody/nothing' on this machine, and foveal downloads"
    ):
        edit(folder="nobody/nothing")
    with pytest.raises(BackboneError, match="holds no diffusion model"):
        edit(folder=str(tmp_path))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and holds no edit: choose another --out"):
        edit()


def test_damaged_models_are_refused(model: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    stored = json.loads((broken / "painter.json").read_text())
    (broken / "painter.json").write_text(json.dumps({**stored, "size": 10**6}))
    with pytest.raises(BackboneError, match=r"painter.json in .* is not as foveal writes it"):
        load_painter(str(broken))
    (broken / "painter.json").write_text(json.dumps({**stored, "widths": [16, 16]}))
    with pytest.raises(BackboneError, match=r"cannot be read .*teach it again"):
        load_painter(str(broken))
    kept = load_painter(str(model))
    assert isinstance(kept, PixelPainter)
    x = torch.rand(2, 1, 16, 16)
    torch.manual_seed(0)
    assert torch.equal(kept.eps(x, 5, kept.empty), PixelPainter(kept.plan).eval().eps(x, 5, kept.empty))


GOOD = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "v_prediction"}, "predicts 'v_prediction', expected the noise"),
        ({"prediction_type": "sample"}, "predicts 'sample', expected the noise"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "not a deterministic DDIM: it adds fresh noise"),
        ({"use_karras_sigmas": True}, "takes other noise levels .Karras."),
        ({"eta": 0.5}, "adds fresh noise .eta > 0"),
        ({"beta_schedule": "sigmoid"}, "beta schedule 'sigmoid'"),
    ],
)
def test_samplers_that_are_no_ddim_are_refused(tmp_path: Path, change: dict[str, object], message: str):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(BackboneError, match=message):
        alphas_of(tmp_path / "scheduler_config.json")


def test_stable_diffusions_own_schedule(tmp_path: Path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(GOOD))
    assert torch.equal(alphas_of(tmp_path / "scheduler_config.json"), schedule("scaled_linear", 1000, 0.00085, 0.012))


def test_a_small_stable_diffusion_in_a_diffusers_folder(tmp_path: Path):
    """Random weights in every part, as diffusers and transformers save them."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path / "sd"
    (folder / "tokenizer").mkdir(parents=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words = {word: place for place, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    tokens.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=53, bos_token_id=52, pad_token_id=53,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")

    painter = load_painter(str(folder))
    assert isinstance(painter, LatentPainter)
    assert painter.multiple == 4
    assert painter.empty.shape == (1, 16, 16)
    assert not torch.equal(painter.condition("cat"), painter.empty)
    with pytest.raises(UsageError, match="the image has 18 x 16 pixels, expected multiples of 4"):
        painter.encode(torch.zeros(1, 3, 16, 18))
    latent = painter.encode(torch.rand(1, 3, 16, 16))
    assert latent.shape == (1, 4, 8, 8)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    record = foveal.edit(
        tmp_path / "in.png", to="cat", from_="dog", model=str(folder), method=LIGHT, out=tmp_path / "out"
    )
    assert 0 < record["share"] < 1
    assert record["evaluations"] == 2 * 2 + 2 * 3
    shutil.rmtree(folder / "vae")
    with pytest.raises(BackboneError, match="is not a Stable Diffusion that can be read"):
        load_painter(str(folder))
