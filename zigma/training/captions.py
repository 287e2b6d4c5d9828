"""Conditions of a batch: which caption a picture gets, whether it gets any, and what the model is given for it.

Dropping captions trains the null condition, which classifier-free guidance leads away from (Ho and Salimans 2022,
arXiv 2207.12598, algorithm 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..text import WordTextEncoder
from .caption_files import flipped_caption
from .tables import TextTable

__all__ = ["Described", "Labels", "NoConditions", "Texts", "vocabulary_of"]

@dataclasses.dataclass(frozen=True)
class Described:
    """What is known of a picture: its captions, a word for its style, its label."""

    captions: tuple[str, ...] = ()
    style: str = ""
    label: int | None = None


class Texts:
    """Captions as `of` makes them: word ids for an encoder that learns too, features of a frozen one.

    Args:
        pictures: what is known of each.
        table: how often captions are dropped and styled, and the trigger word.
        of: text -> Tensor, without a batch axis; asked once for each text.
    """

    def __init__(self, pictures: Sequence[Described], table: TextTable, of: Callable[[str], Tensor]) -> None:
        self.pictures, self.table, self._of = pictures, table, of
        self._known: dict[str, Tensor] = {}

    @classmethod
    def of_words(cls, pictures: Sequence[Described], table: TextTable, encoder: WordTextEncoder) -> Texts:
        """Word ids (length,) of the small encoder."""
        return cls(pictures, table, encoder.tokenize)

    def texts(self, index: int, flipped: bool = False) -> list[str]:
        """Every text that a picture may be seen with."""
        picture = self.pictures[index]
        captions = [flipped_caption(caption) if flipped else caption for caption in picture.captions or ("",)]
        captions = [f"{self.table.trigger} {caption}".strip() for caption in captions]
        styled = [f"{caption} {picture.style}" for caption in captions] if picture.style else []
        return captions + styled

    def draw(self, chosen: Sequence[int], flipped: Sequence[bool], generator: torch.Generator) -> Tensor:
        """(b, ...) one of each picture's captions, with its style at times, or the null condition."""
        rolls = torch.rand(len(chosen), 3, generator=generator).tolist()
        rows = []
        for index, mirrored, (drop, style, which) in zip(chosen, flipped, rolls, strict=True):
            texts = self.texts(index, mirrored)
            count = max(len(self.pictures[index].captions), 1)
            styled = style < self.table.style_rate and len(texts) > count
            text = texts[count:][int(which * count)] if styled else texts[int(which * count)]
            rows.append(self.of("" if drop < self.table.dropout else text))
        return torch.stack(rows)

    def fixed(self, index: int, flipped: bool = False) -> Tensor:
        """(1, ...) the first caption: for validation."""
        return self.of(self.texts(index, flipped)[0])[None]

    def of(self, text: str) -> Tensor:
        """What the model is given for a text."""
        if text not in self._known:
            self._known[text] = self._of(text)
        return self._known[text]


class Labels:
    """Labels of a class model; `null` is the label in place of a dropped one, None where the model has none."""

    def __init__(self, pictures: Sequence[Described], table: TextTable, null: int | None) -> None:
        self.labels, self.table, self.null = [picture.label for picture in pictures], table, null

    def draw(self, chosen: Sequence[int], flipped: Sequence[bool], generator: torch.Generator) -> Tensor:
        """LongTensor (b,)."""
        rolls = torch.rand(len(chosen), generator=generator).tolist()
        dropped = 0.0 if self.null is None else self.table.dropout
        return torch.tensor(
            [self.null if roll < dropped else self.labels[index] for index, roll in zip(chosen, rolls, strict=True)]
        )

    def fixed(self, index: int, flipped: bool = False) -> Tensor:
        """(1,)"""
        return torch.tensor([self.labels[index]])


class NoConditions:
    """Of a model that takes none."""

    def draw(self, chosen: Sequence[int], flipped: Sequence[bool], generator: torch.Generator) -> None:
        """Nothing."""

    def fixed(self, index: int, flipped: bool = False) -> None:
        """Nothing."""


def vocabulary_of(pictures: Sequence[Described], table: TextTable, flips: bool = False) -> tuple[str, ...]:
    """Every word that the pictures' texts can have, sorted."""
    from ..text import split_words

    texts = Texts(pictures, table, lambda text: torch.empty(0))
    sides = (False, True) if flips else (False,)
    words = {
        word
        for index in range(len(pictures))
        for side in sides
        for text in texts.texts(index, side)
        for word in split_words(text)
    }
    return tuple(sorted(words))
