"""Pictures that should be the same: on another machine and host they differ by rounding, and by no more."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy
from PIL import Image

LARGE, FACTOR = 800, 8  # pictures with a longer side are kept and compared at an eighth of it
DECIBELS = 40.0  # mean squared error of 2.55 levels of 255
PICTURES = Path(__file__).resolve().parents[1] / "data/workflows"


def frames_of(data: bytes | Path) -> list[Image.Image]:
    """Every frame, RGB, large ones reduced."""
    picture = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    frames = []
    for number in range(getattr(picture, "n_frames", 1)):
        picture.seek(number)
        frames.append(reduced(picture.convert("RGB")))
    return frames


def reduced(picture: Image.Image) -> Image.Image:
    """Small enough to be kept."""
    return picture.reduce(FACTOR) if max(picture.size) > LARGE else picture


def kept(name: str) -> list[Image.Image]:
    """The stored first picture of a workflow, or the frames of its video."""
    return frames_of(next(PICTURES.glob(f"{name}.*")))


def decibels(got: list[Image.Image], expected: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio over all frames; infinite for the same pictures."""
    assert [frame.size for frame in got] == [frame.size for frame in expected]
    pairs = (numpy.stack([numpy.asarray(f, dtype=numpy.float64) for f in frames]) for frames in (got, expected))
    error = float(numpy.square(numpy.subtract(*pairs)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
