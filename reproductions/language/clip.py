"""Words and images without a download: classifier rows from names, photos told apart by words, and CLIP on digits.

Rows: 100 of ImageNet's 1,000 classes are held out of the ridge map from names to Lite0's classifier rows, and each
held-out name looks for its row among the 100; beside it a plain linear ridge on 'a photo of ...'. Both choose their
strength by leaving out classes of the other 900. Photos: those that scikit-image and scikit-learn ship, each labelled
with what it shows among the labels of all. Few-shot: whether these words raise gda-clip. Digits: two MLP towers learn
canvases of two digits with exact captions, tested on other people's handwriting.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.backbones.adapter import DEFAULT, imagenet_classifier, load_backbone
from foveal.backbones.causal_text import CausalText
from foveal.backbones.class_rows import Ridge, fit_ridge, imagenet_names, imagenet_ridge, known_texts, ranks_of_own
from foveal.backbones.text import TEMPLATES, embed, embed_names, sentence_encoder
from foveal.core.seeds import derive, generator, seed_everything
from foveal.data.captioned import WORDS, digit_pairs
from foveal.data.dataset import Dataset
from foveal.data.open import open_dataset, open_images
from foveal.data.samples import folder_of
from foveal.evaluate.pairs import retrieval, same_text
from foveal.features.extract import extract
from foveal.features.small import Labelled, fitted
from foveal.features.towers import encode_images, encode_texts
from foveal.methods.adapt.gda_clip import GdaClip
from foveal.methods.language.clip import Clip, Options
from foveal.train.events import balanced_accuracy
from foveal.train.loop import train
from foveal.train.pairs import PairFeed
from foveal.train.small import small_vit

EPOCHS = 32
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
PHOTOS = {
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "rocket.jpg": "a rocket",
    "astronaut.png": "an astronaut",
    "motorcycle_left.png": "a motorcycle",
    "camera.png": "a photographer",
    "horse.png": "a horse",
    "coins.png": "coins",
    "clock_motion.png": "a clock",
    "moon.png": "the moon",
    "brick.png": "a brick wall",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "page.png": "a page of a book",
    "text.png": "handwriting",
    "hubble_deep_field.jpg": "galaxies",
    "retina.jpg": "a retina",
    "ihc.png": "tissue under a microscope",
    "cell.png": "a cell under a microscope",
    "china.jpg": "a temple",
    "flower.jpg": "a flower",
}
SAMPLES = {
    "digits": tuple(f"the digit {word}" for word in WORDS),
    "elpv-type": ("a monocrystalline solar cell", "a polycrystalline solar cell"),
    "textile": ("a fabric with a global defect", "a fabric with a local defect", "a fabric without defect"),
}
PROMPTS = ("{}", "a photo of {}", "a close-up photo of {}", "a grey picture of {}", "{}, seen from above")


def reproduce(seed: int, tiny: bool) -> dict[str, float]:
    words, length = (few_classes(), 1.0) if tiny else imagenet_ridge(offline=True)
    rows = class_rows(seed, tiny) | words_alone(words, length, seed, tiny)
    return rows | few_shot(words, seed, tiny) | digit_canvases(seed, tiny)


def class_rows(seed: int, tiny: bool) -> dict[str, float]:
    """Retrieval of the classifier rows of held-out classes by their names."""
    names, meanings = imagenet_names()
    rows = F.normalize(cast(Tensor, imagenet_classifier(DEFAULT, offline=True).head.weight).detach())
    count, held = (20, 5) if tiny else (1000, 100)
    order = torch.from_numpy(generator(seed, "held-out classes").permutation(1000)[:count])
    names, meanings, rows = [names[k] for k in order], [meanings[k] for k in order], rows[order]
    tower, known = sentence_encoder(), slice(held, None)
    short = [name.split(",")[0] for name in names[:held]]
    plain = embed(tower, [f"a photo of {name}" for name in names])
    ridge = fit_ridge(known_texts(tower, names[known], meanings[known]), rows[known])
    linear = fit_ridge(plain[known], rows[known], None)
    predicted = {
        "class-rows": ridge(embed_names(tower, names[:held])),
        "class-rows.photo": ridge(plain[:held]),
        "class-rows.first-name": ridge(embed_names(tower, short)),
        "plain-ridge": linear(plain[:held]),
    }
    values = {"class-rows.strength": ridge.strength, "plain-ridge.strength": linear.strength}
    for name, found in predicted.items():
        ranks = ranks_of_own(found, rows[:held] - rows[known].mean(0))
        values[f"{name}.r_at_1"] = float((ranks <= 1).double().mean())
        values[f"{name}.r_at_5"] = float((ranks <= 5).double().mean())
    return values


def words_alone(ridge: Ridge, length: float, seed: int, tiny: bool) -> dict[str, float]:
    """Photos and sample data told apart by words, without a training image."""
    tower = sentence_encoder()

    def logits(dataset: Dataset, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        rows = length * F.normalize(ridge(embed_names(tower, labels, templates)))
        return features(dataset, tiny) @ rows.T

    folders = (
        Path(folder_of("skimage", "scikit-image", "photos"), "data"),
        Path(folder_of("sklearn", "scikit-learn", "photos"), "datasets", "images"),
    )
    paths = [next(folder / name for folder in folders if (folder / name).exists()) for name in PHOTOS]
    shown = open_images(paths)
    own = torch.tensor([[Path(name).name for name in shown.ids].index(name) for name in PHOTOS])
    found = logits(shown, list(PHOTOS.values()))[own]
    ranks = (found >= found.diagonal()[:, None]).sum(1)
    values = {
        "photos.accuracy": float((ranks == 1).double().mean()),
        "photos.top-3": float((ranks <= 3).double().mean()),
        "photos.chance": 1 / len(PHOTOS),
        "photos.mean-probability": float(found.softmax(1).amax(1).mean()),
    }
    for name, labels in SAMPLES.items():
        dataset = open_dataset(f"sample:{name}")
        dataset = dataset.subset(
            np.sort(generator(seed, "words", name).permutation(len(dataset))[: 30 if tiny else 400])
        )
        truth = torch.from_numpy(dataset.labels)
        values[f"{name}.balanced_accuracy"] = balanced_accuracy(logits(dataset, labels), truth)
        values[f"{name}.chance"] = 1 / len(labels)
        if name == "textile":
            single = [balanced_accuracy(logits(dataset, labels, (prompt,)), truth) for prompt in PROMPTS]
            values["textile.median-prompt"] = float(np.median(single))
            values["textile.ensemble"] = balanced_accuracy(logits(dataset, labels, PROMPTS), truth)
    return values


def features(dataset: Dataset, tiny: bool) -> Tensor:
    """Lite0's features [n, 1280]; `tiny`: as many grey pixels."""
    if not tiny:
        return torch.from_numpy(extract(dataset, load_backbone(DEFAULT, offline=True)).X[:])
    grey = [dataset.image(row).convert("L").resize((32, 40)) for row in range(len(dataset))]
    return torch.from_numpy(np.stack([np.asarray(image, np.float32).ravel() / 255 for image in grey]))


def few_classes() -> Ridge:
    """A ridge map of ten classes."""
    names, meanings = (texts[::100] for texts in imagenet_names())
    rows = F.normalize(cast(Tensor, imagenet_classifier(DEFAULT, offline=True).head.weight).detach()[::100])
    return fit_ridge(known_texts(sentence_encoder(), names, meanings), rows)


def few_shot(ridge: Ridge, seed: int, tiny: bool) -> dict[str, float]:
    """gda-clip with the words mixed in, 100 cos + alpha (x W + b), alpha or no words at all chosen on folds."""
    tower = sentence_encoder()
    scores: dict[str, list[float]] = {"few-shot.gda-clip": [], "few-shot.with-words": [], "few-shot.chose-words": []}
    for name, labels in SAMPLES.items():
        dataset = open_dataset(f"sample:{name}")
        if tiny:
            first = [np.flatnonzero(dataset.labels == label)[:8] for label in range(len(labels))]
            dataset = dataset.subset(np.concatenate(first))
        rows = Labelled(features(dataset, tiny), torch.from_numpy(dataset.labels), np.arange(len(dataset)))
        words = F.normalize(ridge(embed_names(tower, labels)))
        pool, test = rows.halves(seed)
        for shots in (4,) if tiny else (4, 16):
            drawn = pool.few(shots, seed)
            place = (drawn.y == drawn.y[:, None]).tril(-1).sum(1) % 2  # two folds, each with half of every class
            held_out = torch.zeros(len(drawn.y), len(labels))
            for fold in (0, 1):
                head = fitted(GdaClip(), drawn.take(np.flatnonzero(place != fold)), seed)
                held_out[place == fold] = head(drawn.X[place == fold]).detach()
            said = 100 * F.normalize(drawn.X) @ words.T
            grid = {alpha: balanced_accuracy(said + alpha * held_out, drawn.y) for alpha in ALPHAS}
            alpha = max(grid, key=lambda each: grid[each])
            chose = grid[alpha] > balanced_accuracy(held_out, drawn.y)
            head = fitted(GdaClip(), drawn, seed)
            plain = head(test.X).detach()
            mixed = 100 * F.normalize(test.X) @ words.T + alpha * plain if chose else plain
            scores["few-shot.gda-clip"].append(balanced_accuracy(plain, test.y))
            scores["few-shot.with-words"].append(balanced_accuracy(mixed, test.y))
            scores["few-shot.chose-words"].append(float(chose))
    return {name: float(np.mean(values)) for name, values in scores.items()}


def digit_canvases(seed: int, tiny: bool) -> dict[str, float]:
    """CLIP on two digits a canvas, its temperature learnt, and held at 1."""
    pairs = digit_pairs(*((48, 8, 16) if tiny else (1500, 100, 300)), seed)
    splits = pairs.images.splits
    assert splits is not None
    test = pairs.subset(splits == "test")
    texts = list(dict.fromkeys(one for own in test.texts for one in own))
    relevant = same_text(test.texts, texts)
    values: dict[str, float] = {}
    for name, extra in (
        ("digits.clip", {}),
        ("digits.temperature-1", {"temperature": 1.0, "learn_temperature": False}),
    ):
        options = Options(
            text="scratch", dim=64, crop=1.0, epochs=1 if tiny else EPOCHS, lr=2e-3, batch_size=64, **extra
        )
        method = Clip(options)
        seed_everything(derive(seed, "init"))
        image, text = small_vit(seed, size=32, patch=32, width=128, depth=2), CausalText(64, 2, context=32, heads=4)
        towers = method.attach(image, text)
        feed = PairFeed(pairs.subset(splits == "train"), image.preprocessing, text, method.crop())
        with tempfile.TemporaryDirectory() as work:
            result = train(method, towers, feed, seed, recipe=method.recipe(), device="cpu", work=Path(work))
        images = encode_images(result.model, test.images, image.preprocessing, device="cpu")
        similarity = (images @ encode_texts(result.model, texts, device="cpu").T).numpy()
        found = retrieval(similarity, relevant, resamples=0)
        values[f"{name}.r_at_1"] = found["r_at_1"]["value"]
        values[f"{name}.first_loss"] = result.history[0]["train_loss"]
        values[f"{name}.last_loss"] = result.history[-1]["train_loss"]
        values[f"{name}.times_chance"] = found["r_at_1"]["value"] / found["chance"]
    return values
