import itertools

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

import foveal.architectures  # noqa: F401
from foveal.architectures._spectrum import irfft2_pair, rfft2_pair
from foveal.architectures.hornet import GlobalFilter, GnConv, HorFPN, checkpoint_filter_fn
from foveal.core.errors import BackboneError
from foveal.features.graph import to_onnx

TINY = ("hornet_tiny_gf", {"dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1)})


def test_the_papers_large_counts_hold_the_head_of_imagenet_22k():
    with torch.device("meta"):
        model = timm.create_model("hornet_large_7x7", num_classes=10_450)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 209


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_the_parts_of_the_input_projection_make_twice_the_width(order: int):
    mixer = GnConv(48, order)
    assert mixer.dims[0] + sum(mixer.dims) == 2 * 48
    assert mixer.dims[-1] == 48
    assert mixer.proj_in.out_channels == 96


def naive(mixer: GnConv, x: Tensor) -> Tensor:
    """The recursion, one place at a time."""
    batch, _, height, width = x.shape
    n, dims = len(mixer.dims), mixer.dims

    def pointwise(conv: nn.Conv2d, vector: Tensor) -> Tensor:
        return conv.weight[:, :, 0, 0] @ vector + conv.bias

    out = torch.zeros_like(x)
    for b in range(batch):
        projected = {
            (i, j): pointwise(mixer.proj_in, x[b, :, i, j]) for i, j in itertools.product(range(height), range(width))
        }
        for i, j in projected:
            q = mixer.dwconv.bias.clone()
            for u, v in itertools.product(range(-3, 4), repeat=2):
                if (i + u, j + v) in projected:
                    q = q + mixer.dwconv.weight[:, 0, u + 3, v + 3] * projected[i + u, j + v][dims[0] :]
            gates = (q / 3).split(dims)
            state = projected[i, j][: dims[0]] * gates[0]
            for k in range(1, n):
                state = pointwise(mixer.pws[k - 1], state) * gates[k]
            out[b, :, i, j] = pointwise(mixer.proj_out, state)
    return out


@pytest.mark.parametrize("order", [1, 3])
def test_gnconv_is_the_naive_recursion_gradients_too(order: int):
    torch.manual_seed(0)
    mixer = GnConv(8, order).double()
    x = torch.randn(2, 8, 4, 5, dtype=torch.double, requires_grad=True)
    ours = torch.autograd.grad(mixer(x).square().sum(), [x, *mixer.parameters()])
    theirs = torch.autograd.grad(naive(mixer, x).square().sum(), [x, *mixer.parameters()])
    torch.testing.assert_close(mixer(x), naive(mixer, x))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_without_biases_it_is_homogeneous_of_degree_order_plus_one(order: int):
    torch.manual_seed(1)
    mixer = GnConv(32, order).double()
    for name, parameter in mixer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    x = torch.randn(1, 32, 6, 6, dtype=torch.double)
    torch.testing.assert_close(mixer(2.5 * x), 2.5 ** (order + 1) * mixer(x))


def test_order_one_is_a_gated_depthwise_convolution():
    mixer, x = GnConv(6, 1), torch.randn(2, 6, 9, 9)
    p, q = mixer.proj_in(x).chunk(2, dim=1)
    torch.testing.assert_close(mixer(x), mixer.proj_out(p * mixer.dwconv(q) / 3))


def test_an_all_ones_spectrum_passes_its_half_and_channels_interleave():
    layer = GlobalFilter(6, 9, 6)
    with torch.no_grad():
        layer.complex_weight.copy_(torch.tensor([1.0, 0.0]).expand_as(layer.complex_weight))
        layer.dw.weight.zero_()
        layer.dw.weight[:, 0, 1, 1] = 1
    layer.post_norm = nn.Identity()
    x = torch.randn(2, 6, 9, 11)
    normed = layer.pre_norm(x)
    expected = torch.stack([normed[:, :3], normed[:, 3:]], 2).flatten(1, 2)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_a_spectrum_of_the_maps_size_is_left_as_it_is_and_another_is_resized():
    layer = GlobalFilter(8, 5, 4)
    assert torch.equal(layer.resized(5, 4), layer.complex_weight)
    larger = layer.resized(9, 7)
    assert larger.shape == (4, 9, 7, 2)
    for row, column in ((0, 0), (-1, -1), (0, -1)):  # corners are kept
        torch.testing.assert_close(larger[:, row, column], layer.complex_weight[:, row, column])


def test_the_spectrum_is_taken_in_float32_from_half_precision():
    layer = GlobalFilter(8, 7, 4)
    x = torch.randn(1, 4, 7, 7)
    half = layer.filter(x.half())
    assert half.dtype == torch.half
    torch.testing.assert_close(half.float(), layer.filter(x.half().float()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (8, 5), (6, 10), (1, 4)])
def test_dft_matrices_equal_the_fast_transform(height: int, width: int):
    x = torch.randn(2, 3, height, width)
    fast, dense = rfft2_pair(x, dense=False), rfft2_pair(x, dense=True)
    for a, b in zip(fast, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    filtered = [part * torch.randn_like(part) for part in fast]  # no longer the spectrum of a real map
    ours = irfft2_pair(*filtered, (height, width), dense=True)
    torch.testing.assert_close(irfft2_pair(*filtered, (height, width), dense=False), ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(irfft2_pair(*fast, (height, width), dense=True), x, atol=1e-5, rtol=1e-5)


def test_the_spectral_variant_exports(tmp_path):
    torch.manual_seed(0)
    sizes = {"dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1), "num_classes": 5}
    model = timm.create_model("hornet_tiny_gf", **sizes).eval()
    for block in (module for module in model.modules() if hasattr(module, "ls1")):
        nn.init.ones_(block.ls1.gamma)
    x = torch.randn(2, 3, 64, 64)
    to_onnx(model, (x[:1],), tmp_path / "m.onnx", ["x"], ["y"], {"x": {0: "N"}, "y": {0: "N"}})
    (answer,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_the_neck_keeps_every_size():
    maps = [torch.randn(1, width, side, side + 1) for width, side in ((8, 16), (12, 8), (20, 4))]
    out = HorFPN((8, 12, 20), 16, order=3)(maps)
    assert [tuple(each.shape) for each in out] == [(1, 16, 16, 17), (1, 16, 8, 9), (1, 16, 4, 5)]


def test_published_names_are_ours_after_the_filter():
    name, sizes = TINY
    model = timm.create_model(name, **sizes)
    published = {}
    for ours, tensor in model.state_dict().items():
        theirs = ours.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".")
        for stage in "123":
            theirs = theirs.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        for a, b in (("ls1.gamma", "gamma1"), ("ls2.gamma", "gamma2"), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2")):
            theirs = theirs.replace(a, b)
        published[theirs.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = tensor
    assert "stages.2.0.gnconv.pws.1.weight" in published
    mapped = checkpoint_filter_fn({"model": published}, model)
    assert mapped.keys() == model.state_dict().keys()
    assert all(torch.equal(mapped[key], value) for key, value in model.state_dict().items())
    with torch.device("meta"):
        wide = timm.create_model(name, num_classes=10_450, **sizes)
    with pytest.raises(BackboneError, match=r"head has 10,450 rows, the model 1,000 classes"):
        checkpoint_filter_fn(wide.state_dict(), model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GnConv(24, 5), r"order 5 on 24 channels.* = 16"),
        (lambda: GnConv(8, 0), "order 0"),
        (lambda: GnConv(8, 2, kernel_size=6), "kernel 6"),
        (lambda: GlobalFilter(7), "7 channels are odd"),
        (lambda: timm.create_model("hornet_tiny_7x7", dims=(24, 48, 96)), r"dims \(24, 48, 96\)"),
        (lambda: timm.create_model(TINY[0], **TINY[1])(torch.zeros(1, 3, 16, 64)), "16x64"),
    ],
)
def test_bad_input(build, message: str):
    with pytest.raises(BackboneError, match=message):
        build()
