"""IMAGE tensors of the host as Pillow's pictures, and back."""

from __future__ import annotations

import torch
from PIL import Image

from ..zigma.sheet import to_pictures

__all__ = ["as_image", "as_pictures"]


def as_pictures(images: torch.Tensor) -> list[Image.Image]:
    """IMAGE (b, h, w, 3 or more) in [0, 1] -> `b` RGB pictures; further channels, such as alpha, are left out."""
    return to_pictures(images[..., :3].movedim(-1, 1) * 2 - 1)


def as_image(picture: Image.Image) -> torch.Tensor:
    """A picture -> IMAGE (1, h, w, 3) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).float() / 255


def caption_lines(text: str, count: int, one_for_all: bool = False) -> list[str]:
    """The captions of `count` pictures, one in each line: all empty where there is no text, the last ones empty where
    the text ends in empty lines. Whoever asks looks at how many they are.

    one_for_all: a single caption is that of every picture.
    """
    lines = text.rstrip().split("\n")
    missing = count - len(lines)
    if len(lines) == 1 and (one_for_all or not text.strip()):
        return lines * count
    return lines + [""] * missing if 0 < missing <= text.count("\n") - (len(lines) - 1) else lines
