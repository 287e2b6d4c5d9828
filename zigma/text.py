"""A small word-level text encoder, trained together with the model it conditions.

A prompt becomes at most `length` words, each looked up in a vocabulary that the model file carries; one transformer
layer lets the words see each other. Positions without a word hold a learned padding vector, so that the empty prompt
has features of its own: trained on dropped captions, they are the null condition of classifier-free guidance
(Ho and Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["TextEncoderConfig", "WordTextEncoder", "split_words"]

log = logging.getLogger(__name__)

PADDING = 0  # the id of "no word"; words count from 1


def split_words(text: str) -> list[str]:
    """Lower-case words of letters, with their marks, and digits, of any script; an emoji counts as its name.

    Apostrophes vanish, everything else separates.

    >>> split_words("Smiling Face with Heart-Shaped Eyes!")
    ['smiling', 'face', 'with', 'heart', 'shaped', 'eyes']
    >>> split_words("Cat's façade 🦊")
    ['cats', 'façade', 'fox', 'face']
    """
    text = unicodedata.normalize("NFC", "".join(map(_spelt, text)).lower())
    words = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()
    return [word for word in words if any(map(str.isalnum, word))]  # a mark on nothing is no word


def _spelt(character: str) -> str:
    if character in "'’":
        return ""
    if character >= "\u2600" and unicodedata.category(character) == "So":  # where emoji begin
        return f" {unicodedata.name(character, '')} "
    return character


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """What a WordTextEncoder is.

    Attributes:
        vocabulary: the known words; word i has the id i + 1.
        length: text tokens of every prompt, words and padding together.
        width: channels of a text token (the model's d_context).
        heads: of the transformer layer.
    """

    vocabulary: tuple[str, ...]
    length: int = 16
    width: int = 128
    heads: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        if self.length < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(
                f"got a text encoder of length {self.length}, width {self.width} and {self.heads} heads, expected at "
                "least one token and a width that the heads divide"
            )
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("the vocabulary names a word twice: every word may stand in it once")

    def to_json(self) -> str:
        """One JSON object, as a file's metadata keeps it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TextEncoderConfig:
        """What `to_json` wrote; ValueError for anything else."""
        try:
            return cls(**json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"the text encoder's description cannot be read ({error})") from error


class WordTextEncoder(nn.Module):
    """Prompts -> text features (b, length, width).

    Args:
        config: vocabulary and sizes.
        operations, device, dtype: where the layers come from, and of the parameters.
    """

    def __init__(self, config: TextEncoderConfig, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        self.config = config
        self.ids = {word: index for index, word in enumerate(config.vocabulary, 1)}
        width, options = config.width, {"device": device, "dtype": dtype}
        self.words = operations.Embedding(len(config.vocabulary) + 1, width, **options)
        self.positions = operations.Embedding(config.length, width, **options)
        self.norm1 = operations.LayerNorm(width, **options)
        self.qkv = operations.Linear(width, 3 * width, **options)
        self.attention_out = operations.Linear(width, width, **options)
        self.norm2 = operations.LayerNorm(width, **options)
        self.mlp = nn.Sequential(
            operations.Linear(width, 4 * width, **options), nn.GELU(), operations.Linear(4 * width, width, **options)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Word ids (b, length) -> features (b, length, width)."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.positions(place)
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b m (three h c) -> three b h m c", three=3, h=self.config.heads)
        mixed = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1).to(v.dtype) @ v
        x = x + self.attention_out(rearrange(mixed, "b h m c -> b m (h c)"))
        return x + self.mlp(self.norm2(x))

    def tokenize(self, prompt: str) -> Tensor:
        """A prompt as LongTensor (length,): known words in their order, then padding. Unknown words are left out."""
        ids = [self.ids[word] for word in split_words(prompt) if word in self.ids][: self.config.length]
        return F.pad(torch.tensor(ids, dtype=torch.long), (0, self.config.length - len(ids)), value=PADDING)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary lacks, each once, in order."""
        return list(dict.fromkeys(word for word in split_words(prompt) if word not in self.ids))

    def warn(self, prompts: Sequence[str]) -> None:
        """Log what of these prompts the encoder cannot see: unknown words, and words beyond its length."""
        unknown = list(dict.fromkeys(word for prompt in prompts for word in self.unknown_words(prompt)))
        if unknown:
            log.warning(
                "left out of the prompt, because this model's vocabulary of %d words lacks them: %s",
                len(self.ids), ", ".join(unknown),
            )  # fmt: skip
        for prompt in prompts:
            known = [word for word in split_words(prompt) if word in self.ids]
            if len(known) > self.config.length:
                log.warning(
                    "only the first %d words of a prompt are read; left out: %s",
                    self.config.length, " ".join(known[self.config.length :]),
                )  # fmt: skip

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Features (b, length, width) of prompts, for sampling; warns once of what was left out of them."""
        self.warn(prompts)
        tokens = torch.stack([self.tokenize(prompt) for prompt in prompts])
        return self(tokens.to(self.words.weight.device))


class ClipTextEncoder:
    """The frozen CLIP text model that the released text models were trained with, through transformers.

    Radford et al. 2021, arXiv 2103.00020: the last hidden states, prompts padded and cut to 77 tokens, no mask.

    Args:
        source: what transformers' from_pretrained takes: a folder, or a name such as "openai/clip-vit-large-patch14",
            which it downloads when asked for.
        device: where it computes.

    Raises:
        ImportError: transformers is not installed. OSError: it finds no such model.
    """

    def __init__(self, source: str | os.PathLike, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError as error:
            raise ImportError(
                "CLIP needs the package transformers, which is not installed: pip install transformers, or give "
                "precomputed text features"
            ) from error
        self.tokenizer = CLIPTokenizer.from_pretrained(source)
        self.model = CLIPTextModel.from_pretrained(source).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Features (b, 77, width) of prompts, in float32."""
        length = self.model.config.max_position_embeddings
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.model(ids.to(self.model.device)).last_hidden_state.float()


def read_features(path: str | os.PathLike) -> Tensor:
    """Text features (n, tokens, width) in float32 from a file: a .safetensors with one tensor, or with "features"; or
    a .npy, of which nothing is unpickled. Published data sets keep several captions, (n, captions, tokens, width): the
    first of each is taken.

    Raises:
        ValueError: no such numbers in it. OSError: there is no such file.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        features = torch.from_numpy(numpy.load(path, allow_pickle=False))
    elif path.suffix.lower() == ".safetensors":
        tensors = load_file(path)
        features = tensors.get("features", next(iter(tensors.values())) if len(tensors) == 1 else None)
    else:
        raise ValueError(f"got text features in {path.name}, expected a .safetensors or a .npy")
    if features is not None and features.dim() == 4:
        features = features[:, 0]
    if features is None or features.dim() != 3 or not features.is_floating_point():
        raise ValueError(f"{path} holds no text features: expected one tensor (n, tokens, width) called 'features'")
    return features.float()
