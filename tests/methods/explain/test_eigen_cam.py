"""eigen-cam: the SVD by other means, the sign, and what must not change the map."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from foveal.backbones.adapter import load_backbone
from foveal.backbones.wrapper import OpenModel
from foveal.core.errors import BackboneError, DataError, UsageError
from foveal.core.method import Classifier
from foveal.core.preprocessing import Preprocessing
from foveal.methods.explain.eigen_cam import EigenCam, Options, principal, unit_range

PLAIN = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def features(n: int = 49, C: int = 20, seed: int = 0, signed: bool = False) -> Tensor:
    """Positions that share a pattern, plus noise; non-negative as after a ReLU."""
    rng = torch.Generator().manual_seed(seed)
    found = torch.rand(n, 1, generator=rng, dtype=torch.float64) * torch.rand(1, C, generator=rng, dtype=torch.float64)
    found = found + 0.3 * torch.randn(n, C, generator=rng, dtype=torch.float64)
    return found if signed else found.clamp_min(0)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "C"), [(49, 20), (16, 64)])
def test_the_map_is_sigma_u_of_numpy_scipy_and_torch(n: int, C: int, center: bool):
    O = features(n, C)
    ours, share = principal(O[None], center)
    given = O - O.mean(0) if center else O
    for svd in (np.linalg.svd, scipy.linalg.svd, torch.linalg.svd):
        U, S, Vh = (torch.as_tensor(each) for each in svd(given if svd is torch.linalg.svd else given.numpy()))
        theirs = S[0] * U[:, 0]
        assert min((ours[0] - theirs).abs().max(), (ours[0] + theirs).abs().max()) < 1e-10 * theirs.abs().max()
        assert torch.allclose(given @ Vh[0], theirs, atol=1e-10)
        assert share[0] == pytest.approx(float(S[0] ** 2 / S.square().sum()))


def test_both_gram_matrices_give_the_same_map():
    tall = features(30, 29)
    wide = torch.cat([tall, torch.zeros(30, 3, dtype=torch.float64)], 1)  # 32 channels: the other route
    for center in (False, True):
        assert torch.allclose(principal(tall[None], center)[0], principal(wide[None], center)[0], atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_non_negative_features_give_a_non_negative_map(seed: int):
    first, _ = principal(features(seed=seed)[None])
    assert (first >= -1e-9).all()
    assert first.max() > 0


@pytest.mark.parametrize("signed", [False, True])
def test_permuted_and_rotated_channels_leave_the_map(signed: bool):
    O = features(signed=signed)
    Q = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))).Q
    expected, share = principal(O[None])
    for other in (O[:, torch.randperm(20, generator=torch.Generator().manual_seed(5))], O @ Q, -O):
        found, same = principal(other[None])
        assert torch.allclose(found, expected, atol=1e-9)
        assert torch.allclose(same, share)


def test_scale_leaves_the_normalised_map():
    def normalised(O: Tensor) -> Tensor:
        return unit_range(principal(O[None])[0].unflatten(1, (7, 7)))

    for scale in (1e-4, 3.0, 1e5):
        assert torch.allclose(normalised(features()), normalised(scale * features()), atol=1e-9)


def test_rank_one_returns_its_spatial_factor():
    space = torch.rand(49, dtype=torch.float64)
    channels = torch.rand(20, dtype=torch.float64)
    found, share = principal((space[:, None] * channels)[None])
    assert torch.allclose(found[0], space * channels.norm(), atol=1e-9)
    assert share[0] == pytest.approx(1)


def test_signed_maps_follow_the_lengths_and_warn_when_undecided():
    rng = torch.Generator().manual_seed(0)
    strength = torch.tensor([3.0, 2.5, 0.1, -0.2, 0.1, -0.1, 0.2, -0.3], dtype=torch.float64)
    O = strength[:, None] * torch.randn(1, 6, dtype=torch.float64, generator=rng)
    for turned in (O, -O):
        assert principal(turned[None])[0][0, 0] > 0, "the long features are lit"
    balanced = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64) * torch.ones(1, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="sign undecided"):
        principal(balanced[None])


def test_a_batch_is_its_images_one_by_one():
    batch = torch.stack([features(seed=seed) for seed in range(5)])
    together, shares = principal(batch)
    for row, O in enumerate(batch):
        alone, share = principal(O[None])
        assert torch.allclose(together[row], alone[0], atol=1e-9)
        assert torch.allclose(shares[row], share[0])


def test_equal_features_everywhere_are_flat():
    same = torch.ones(1, 9, 4, dtype=torch.float64)
    assert principal(same, center=True)[1][0] == 0
    assert (unit_range(principal(same)[0].unflatten(1, (3, 3))) == 0).all()


class Net(nn.Module):
    """Two convolutions and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, 4, 1)
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.second(self.first(x))).flatten(1))


def images(count: int = 3, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


TARGET = torch.zeros(3, dtype=torch.int64)


def test_the_map_of_a_network_is_that_of_its_layer():
    net = Net().eval()
    maps = EigenCam(Options(layer="second")).explain(OpenModel(net, PLAIN), images(), TARGET)
    normalised = (images() - torch.tensor(PLAIN.mean).reshape(3, 1, 1)) / torch.tensor(PLAIN.std).reshape(3, 1, 1)
    with torch.no_grad():
        A = net.second(net.first(normalised))
    for row in range(3):
        U, S, _ = np.linalg.svd(A[row].flatten(1).T.numpy())
        expected = torch.from_numpy(np.abs(S[0] * U[:, 0])).reshape(1, 1, 8, 8)
        up = torch.nn.functional.interpolate(expected, (32, 32), mode="bilinear")[0, 0]
        up = (up - up.min()) / (up.max() - up.min())
        assert torch.allclose(maps[row], up, atol=1e-5)


def test_no_gradient_is_made_and_the_head_does_not_matter():
    net = Net().eval().requires_grad_(False)
    method, model = EigenCam(Options(layer="second")), OpenModel(net, PLAIN)
    with torch.no_grad():
        before = method.explain(model, images(), TARGET)
    nn.init.normal_(net.head.weight)
    after = method.explain(model, images(), TARGET + 4)
    assert torch.equal(before, after)
    assert not after.requires_grad


def test_as_pytorch_grad_cam_centred():
    """Its formula, written out: reshape, centre, SVD, project on the first right vector; equal up to the sign."""
    O = features(signed=True)
    centred = (O - O.mean(0)).numpy()
    _, _, VT = np.linalg.svd(centred, full_matrices=True)
    projected = torch.from_numpy(centred @ VT[0])
    ours = principal(O[None], center=True)[0][0]
    assert min((ours - projected).abs().max(), (ours + projected).abs().max()) < 1e-9


def test_default_layer_and_grid_of_each_kind_of_backbone():
    for name, layer, shape in (
        ("test_efficientnet", "bn2", (256, 2, 2)),
        ("test_vit", "norm", (64, 4, 4)),
        ("test_coatnet", "norm", (128, 2, 2)),
    ):
        backbone = load_backbone(name, pretrained=False, size=64)
        model = OpenModel(Classifier(backbone, nn.Linear(backbone.width, 3)).eval(), backbone.preprocessing)
        assert model.layer() == f"backbone.model.{layer}"
        maps = model.feature_map(images(2, 64))
        assert maps.shape[1:] == shape
        with torch.no_grad():
            given = backbone.model.forward_features(model.normalised(images(2, 64)))
        theirs = given[:, -16:].mT.unflatten(2, (4, 4)) if given.ndim == 3 else given
        assert torch.allclose(maps, theirs, atol=1e-5)


def test_bad_input_is_refused_with_what_to_do():
    model = OpenModel(Net().eval(), PLAIN)

    def explain(layer: str, given: OpenModel = model) -> None:
        EigenCam(Options(layer=layer)).explain(given, images(), TARGET)

    with pytest.raises(UsageError, match=r"'head' answers \(3, 5\): expected maps"):
        explain("head")
    with pytest.raises(BackboneError, match=r"no spatial extent .* choose an earlier layer"):
        explain("pool")
    with pytest.raises(UsageError, match="no layer 'third': there are first, second, pool, head"):
        explain("third")
    with pytest.raises(UsageError, match="which layer"):
        explain("")
    broken = Net().eval()
    broken.second.register_forward_hook(lambda *_: torch.full((3, 16, 8, 8), torch.nan))
    broken.head = nn.Linear(16, 5).eval()
    with pytest.raises((DataError, UsageError), match="NaN"):
        explain("second", OpenModel(broken, PLAIN))
    model.module.train()
    with pytest.raises(UsageError, match="training mode"):
        explain("second")
