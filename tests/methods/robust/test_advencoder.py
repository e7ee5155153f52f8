"""advencoder: the generator, the losses by other means, and what must not move."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.adapter import load_backbone
from foveal.backbones.pair import state_hash
from foveal.backbones.wrapper import Encoder
from foveal.core.errors import DataError, UsageError
from foveal.core.preprocessing import Preprocessing
from foveal.methods.robust.advencoder import (
    TEMPERATURE,
    Advencoder,
    Generator,
    Options,
    high_pass,
    info_nce,
    patch_mask,
)

PLAIN = Preprocessing(64, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Flat(nn.Module):
    """Normalised images -> [B, D], with batch statistics that must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3 * 16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(self.norm(images), 4).flatten(1))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(Flat().eval(), PLAIN)


def images(count: int = 4, size: int = 64, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bilinear")


def light(**given: object) -> Advencoder:
    return Advencoder(Options(candidates=4, width=2, **given))  # type: ignore[arg-type]


@pytest.mark.parametrize("candidates", [256, 16, 2])
def test_the_papers_generator_has_the_papers_parameters(candidates: int):
    with torch.device("meta"):
        made = Generator(candidates, 128, 64)
    assert sum(each.numel() for each in made.parameters()) == 12_660_355 + 9 * candidates + 1


@pytest.mark.parametrize("size", [8, 33, 64, 96])
def test_the_generator_grows_to_the_image(size: int):
    assert Generator(3, 2, size)().shape == (3, size, size)


def test_the_first_weights_are_small_and_the_biases_zero():
    torch.manual_seed(0)
    made = Generator(8, 32, 64)
    first = made.layers[0]
    assert isinstance(first, nn.ConvTranspose2d)
    assert float(first.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert first.bias is not None
    assert not first.bias.any()
    assert not torch.equal(made.noise[0], made.noise[1])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 48)])
@pytest.mark.parametrize("radius", [0.0, 1.0, 8.0])
def test_high_pass_is_the_shifted_disc_cut_out(height: int, width: int, radius: float):
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    spectrum = np.fft.fftshift(np.fft.fft2(x.numpy()), axes=(-2, -1))
    for row in range(height):
        for column in range(width):
            if math.hypot(row - height // 2, column - width // 2) < radius:
                spectrum[..., row, column] = 0
    theirs = torch.from_numpy(np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))).real)
    ours = high_pass(x, radius)
    assert torch.allclose(ours, theirs, atol=1e-12)
    low = x - ours
    assert torch.allclose(high_pass(low, radius), torch.zeros_like(low), atol=1e-12), "low and high overlap"


def test_high_pass_of_nothing_and_of_a_constant_and_it_is_linear():
    x, y = torch.rand(2, 1, 3, 32, 32)
    assert torch.allclose(high_pass(x, 0.0), x, atol=1e-5)
    assert high_pass(torch.full((1, 3, 32, 32), 0.7), 1.0).abs().max() < 1e-6
    assert torch.allclose(high_pass(2 * x - 3 * y, 5.0), 2 * high_pass(x, 5.0) - 3 * high_pass(y, 5.0), atol=1e-5)


def naive_info_nce(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros((), dtype=a.dtype)
    for i in range(len(a)):
        scores = [torch.dot(a[i], each) / (a[i].norm() * each.norm()) / TEMPERATURE for each in b]
        total = total + torch.logsumexp(torch.stack(scores), 0) - scores[i]
    return total / len(a)


def test_info_nce_is_a_cross_entropy_in_a_loop_gradients_too():
    a, b = (torch.randn(6, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, theirs = info_nce(a, b), naive_info_nce(a, b)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(theirs, (a, b)), strict=True):
        assert torch.allclose(mine, other, atol=1e-12)


def test_the_attack_wins_most_when_images_are_taken_for_each_other():
    features = torch.eye(5)
    right, wrong, flat = (
        info_nce(features, features),
        info_nce(features, features.roll(1, 0)),
        info_nce(features, torch.ones(5, 5)),
    )
    assert wrong > flat > right


@pytest.mark.parametrize("kind", ["perturbation", "patch"])
def test_the_loss_is_the_papers_by_hand(kind: str):
    method = light(kind=kind, eps=8 / 255, radius=3.0, alpha=2.0)
    torch.manual_seed(1)
    attack = method.attack(encoder(), 64)
    x = images()
    found = method.loss(attack, {"images": x})
    attacked = attack(x)
    eyes = encoder()
    expected = (
        -2.0 * naive_info_nce(eyes(x), eyes(attacked))
        + (attacked - x).square().mean()
        - (high_pass(attacked, 3.0) - high_pass(x, 3.0)).square().mean()
    )
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_only_the_generator_learns_and_labels_are_not_read():
    method = light()
    attack = method.attack(encoder(), 64).train()
    before = state_hash(attack.encoder)

    class Unread(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            assert key == "images", f"the attack read {key}"
            return super().__getitem__(key)

    method.loss(attack, Unread(images=images(), labels=torch.zeros(4)))["loss"].backward()
    assert all(each.grad is not None for each in attack.generator.parameters())
    assert all(each.grad is None for each in attack.encoder.parameters())
    assert state_hash(attack.encoder) == before
    assert not any(each.training for each in attack.encoder.modules())


@pytest.mark.parametrize("eps", [1 / 255, 10 / 255])
def test_the_change_is_one_for_all_images_and_within_budget(eps: float):
    method = light(eps=eps)
    torch.manual_seed(0)
    attack = method.attack(encoder(), 64)
    with torch.no_grad():
        attack.generator.mix.weight.mul_(100)
    made = method.finish(attack)
    grey = torch.full((5, 3, 64, 64), 0.5)
    change = made(grey) - grey
    assert float(change.abs().max()) <= eps + 1e-7
    assert float(made.delta.abs().max()) == pytest.approx(eps)
    assert float(change.var(0).max()) == 0.0
    assert torch.allclose(made(grey), attack(grey), atol=1e-6)
    black = made(torch.zeros(1, 3, 64, 64))
    assert float(black.min()) == 0.0


def test_a_patch_is_eleven_pixels_of_sixty_four_and_leaves_the_rest_bit_by_bit():
    method = light(kind="patch")
    made = method.finish(method.attack(encoder(), 64))
    mask = patch_mask(64, 0.03)
    assert int(mask.sum()) == 11 * 11
    rows = mask[0].any(1).nonzero()[:, 0]
    assert (int(rows.min()), int(rows.max())) == (64 - 14 - 11, 64 - 14 - 1)
    x = images(3)
    inside = mask.bool().expand_as(x)
    assert torch.equal(made(x)[~inside], x[~inside])
    assert torch.equal(made(x)[0][inside[0]], made(x)[1][inside[1]]), "the patch is not the same on both"


def test_batches_of_any_size_go_through_one_generator():
    method = light()
    attack = method.attack(encoder(), 64)
    for count in (2, 3, 7):
        assert torch.isfinite(method.loss(attack, {"images": images(count)})["loss"])
    with pytest.raises(DataError, match="a batch of 1 image"):
        method.loss(attack, {"images": images(1)})


def test_what_it_refuses():
    with pytest.raises(UsageError, match=r"eps=10: images are in \[0, 1\] here, give 10/255 = 0.0392"):
        light(eps=10.0).attack(encoder(), 64)
    with pytest.raises(UsageError, match="eps=0: expected above 0"):
        light(eps=0.0).attack(encoder(), 64)
    with pytest.raises(UsageError, match=r"area=0.9: a patch of 60 x 60 pixels, 14 from the border, does not fit"):
        light(kind="patch", area=0.9).attack(encoder(), 64)
    method = light()
    attack = method.attack(encoder(), 64)
    with pytest.raises(DataError, match="divide by 255"):
        method.loss(attack, {"images": images() * 255})
    with pytest.raises(DataError, match="look normalised"):
        method.loss(attack, {"images": (images() - 0.5) / 0.2})
    with pytest.raises(UsageError, match="in training mode"):
        Encoder(Flat(), PLAIN)
    with pytest.raises(UsageError, match=r"answered \(2, 3, 64, 64\): expected features \[B, D\]"):
        Encoder(nn.Identity().eval(), PLAIN)(images(2))


def test_the_encoder_is_a_copy_that_normalises():
    network = Flat().eval()
    eyes = Encoder(network, PLAIN)
    x = images()
    expected = network((x - torch.tensor(PLAIN.mean).reshape(3, 1, 1)) / torch.tensor(PLAIN.std).reshape(3, 1, 1))
    assert torch.allclose(eyes(x), expected, atol=1e-6)
    assert all(each.requires_grad for each in network.parameters()), "the network that came was frozen"
    x.requires_grad_()
    eyes.train()(x).sum().backward()
    assert x.grad is not None
    assert not eyes.training


def test_a_real_backbone_is_fooled_more_after_learning():
    torch.manual_seed(0)
    backbone = load_backbone("test_efficientnet", pretrained=False, size=64).eval()
    method = light(eps=16 / 255, lr=1e-2)
    attack = method.attack(Encoder(backbone, backbone.preprocessing), 64).train()
    optimizer = torch.optim.Adam([each for each in attack.parameters() if each.requires_grad], 1e-2)
    x = images(8)
    first = method.loss(attack, {"images": x})["seen"].detach()
    for _ in range(8):
        optimizer.zero_grad()
        method.loss(attack, {"images": x})["loss"].backward()
        optimizer.step()
    assert method.loss(attack, {"images": x})["seen"].detach() < first
