"""Eigen-CAM on EfficientNet-Lite0: the pointing game on photos pasted on fabric and solar cells, beside the mean of the
channels, their length, the centre and a point at random; and how far the map moves under PGD noise that flips the
answer, beside Grad-CAM."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.backbones.adapter import imagenet_classifier
from foveal.backbones.recorder import recording
from foveal.backbones.wrapper import OpenModel
from foveal.core.seeds import generator
from foveal.data.images import to_pixels
from foveal.data.photos import pasted, photos
from foveal.evaluate.explanation import overlap, pointing_hits
from foveal.methods.explain.eigen_cam import EigenCam, Options, principal, unit_range

COMPOSITES, CROPS, STEPS, EPS = 60, 20, 10, 2 / 255


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255


def enlarged(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps[:, None], (size, size), mode="bilinear")[:, 0]


def pointing(model: OpenModel, count: int, size: int, seed: int) -> dict[str, float]:
    """Share of composites whose highest pixel lies on the photo."""
    pixels, where = pasted(count, size, seed)
    images, truth = tensor(pixels), torch.from_numpy(where)
    target = torch.zeros(count, dtype=torch.int64)
    features = model.feature_map(images)
    spot = torch.zeros(1, size, size)
    spot[:, size // 2, size // 2] = 1
    noise = torch.from_numpy(generator(seed, "point").random((count, size, size)))
    maps = {
        "eigen-cam": EigenCam().explain(model, images, target),
        "centred": EigenCam(Options(center=True)).explain(model, images, target),
        "mean-activation": enlarged(features.mean(1), size),
        "channel-norm": enlarged(features.norm(dim=1), size),
        "centre": spot.expand(count, -1, -1),
        "random": noise,
    }
    return {f"{name}.pointing": float(pointing_hits(each, truth).mean()) for name, each in maps.items()}


def grad_cam(model: OpenModel, images: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) of the class answered, [B, H, W] in 0..1."""
    x = images.clone().requires_grad_()
    with recording(model.module, [model.layer()], graph=True) as seen:
        scores = model(x)
    A = seen[model.layer()]
    (gradient,) = torch.autograd.grad(scores.amax(1).sum(), A)
    cam = (gradient.mean((2, 3), keepdim=True) * A).sum(1).relu().detach()
    return unit_range(enlarged(cam, images.shape[-1]))


def attacked(model: OpenModel, images: Tensor, steps: int, seed: int) -> Tensor:
    """PGD (Madry et al. 2018) within EPS of the images, away from what is answered."""
    answer = model(images).argmax(1).detach()
    rng = torch.Generator().manual_seed(seed)
    x = (images + EPS * (2 * torch.rand(images.shape, generator=rng) - 1)).clamp(0, 1)
    for _ in range(steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), answer), x)
        x = x.detach() + 2.5 * EPS / steps * gradient.sign()
        x = x.clamp(images - EPS, images + EPS).clamp(0, 1)
    return x.detach()


def crops(count: int, size: int, seed: int) -> Tensor:
    """Squares cut from photos at random."""
    rng, shown, found = generator(seed, "crops"), list(photos().values()), []
    for index in range(count):
        photo = shown[index % len(shown)]
        side = int(min(photo.size) * rng.uniform(0.7, 1.0))
        x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
        found.append(np.asarray(photo.crop((x, y, x + side, y + side)).resize((size, size))))
    return tensor(np.stack(found))


def moved(model: OpenModel, count: int, size: int, steps: int, seed: int) -> dict[str, float]:
    """Overlap of clean and attacked maps, above half of the maximum, over the images whose answer flipped."""
    clean = crops(count, size, seed)
    noisy = torch.cat([attacked(model, part, steps, seed) for part in clean.split(10)])
    flipped = model(clean).argmax(1) != model(noisy).argmax(1)
    target = torch.zeros(count, dtype=torch.int64)
    eigen = overlap(EigenCam().explain(model, clean, target), EigenCam().explain(model, noisy, target))
    gradient = overlap(grad_cam(model, clean), grad_cam(model, noisy))
    kept = flipped if flipped.any() else torch.ones_like(flipped)
    return {
        "flipped": float(flipped.float().mean()),
        "eigen-cam.overlap": float(eigen[kept].mean()),
        "grad-cam.overlap": float(gradient[kept].mean()),
    }


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    classifier = imagenet_classifier()
    p = classifier.backbone.preprocessing
    size = 96 if tiny else p.size
    model = OpenModel(classifier, p)
    chelsea = torch.from_numpy(to_pixels(photos(("chelsea",))["chelsea"], p).copy())[None]
    features = model.feature_map(tensor(chelsea.numpy())).flatten(2).mT
    plain, _ = principal(features)
    centred, share = principal(features, center=True)
    both = torch.stack([plain[0].abs(), centred[0]])
    return {
        **pointing(model, 6 if tiny else COMPOSITES, size, seed),
        **moved(model, 2 if tiny else CROPS, size, 2 if tiny else STEPS, seed),
        "chelsea.correlation": float(torch.corrcoef(both)[0, 1]),
        "chelsea.share": float(share),
    }
