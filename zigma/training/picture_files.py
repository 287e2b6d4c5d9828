"""Picture files of every usual kind as upright 8-bit RGB on white, or one sentence that says why not.

Decoders raise whatever they like on a broken file; here everything comes out as a `PictureError` with the file's name.
"""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["EXTENSIONS", "LARGEST", "PictureError", "fit", "is_picture", "picture_size", "read_picture"]

log = logging.getLogger(__name__)

EXTENSIONS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2",
)  # fmt: skip
LARGEST = 200_000_000  # pixels; decoded, such a picture takes 0.6 GB

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_headers = threading.Lock()


class PictureError(ValueError):
    """A picture that cannot be used. The message is "name: reason"; both are attributes too."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        return type(self), (self.name, self.reason)


def is_picture(name: str | Path) -> bool:
    """Whether a file of this name is taken for a picture."""
    return Path(name).suffix.lower() in EXTENSIONS


def read_picture(source: Path | bytes, name: str, notes: list[str] | None = None) -> Image.Image:
    """A picture as it is meant to be seen, in RGB.

    Rotated as its EXIF says; transparency on white; 16-bit grey scaled to 8 bit; CMYK converted; the first frame of an
    animation.

    Args:
        source: a file, or its bytes.
        name: how messages call it.
        notes: sentences about what was left out of it (frames, an unreadable rotation) are appended here; without a
            list they go to the log.

    Raises:
        PictureError: it is no picture, is cut off or damaged, too large to decode, or a single pixel wide or high.
    """
    said: list[str] = []
    with _opened(source, name) as opened:
        frames = _frames(opened)
        if frames > 1:
            said.append(f"{name}: has {frames} frames, of which the first is taken")
        opened.load()
        picture = _upright(opened, _orientation(opened, name, said))
        picture = _on_white(picture, name)
    if notes is None:
        for sentence in said:
            log.info("%s", sentence)
    else:
        notes.extend(said)
    return picture


def picture_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """(height, width) of the upright picture, from the header alone: the rest of the file may still be damaged.

    Raises:
        PictureError: as `read_picture`, for what a header tells.
    """
    with _opened(source, name) as opened:
        sideways = _orientation(opened, name, []) in (5, 6, 7, 8)
        return opened.size if sideways else opened.size[::-1]


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """The file with its header read; whatever fails inside the block is a PictureError."""
    try:
        if isinstance(source, bytes) and not source:
            raise PictureError(name, "the file is empty")
        with _reading_a_header():
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with opened:
            _check_sides(opened, name)
            yield opened
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(name, "there is no such file") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(name, "it is no picture, or the beginning of the file is damaged") from error
    except MemoryError as error:
        raise PictureError(name, "it does not fit into memory") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        raise PictureError(name, f"it cannot be decoded ({str(error).strip() or type(error).__name__})") from error


@contextmanager
def _reading_a_header() -> Iterator[None]:
    """Pillow without its own limit of pixels, which is lower, and without warnings.

    Both are the process's, not the thread's, so that only one thread at a time may change them.
    """
    with _headers, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_sides(opened: Image.Image, name: str) -> None:
    width, height = opened.size
    if width * height > LARGEST:
        raise PictureError(
            name, f"it has {width} x {height} pixels, more than the {LARGEST // 1_000_000} million that are decoded: "
            "make it smaller first",
        )  # fmt: skip
    if min(width, height) < 2:
        raise PictureError(name, f"it is too small ({width} x {height} pixels)")


def _frames(opened: Image.Image) -> int:
    # A phone's MPO holds a preview beside the picture, which is no animation.
    if opened.format == "MPO" or not getattr(opened, "is_animated", False):
        return 1
    count = opened.n_frames
    opened.seek(0)
    return count


def _orientation(opened: Image.Image, name: str, said: list[str]) -> int:
    """1 to 8 as EXIF counts; 1 (upright) where the file says nothing usable."""
    try:
        with _reading_a_header():
            value = opened.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # a damaged EXIF block does not make the pixels unusable
        said.append(f"{name}: its EXIF cannot be read ({error}), so that it is taken as upright")
        return 1
    return value if value in _UPRIGHT else 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _on_white(picture: Image.Image, name: str) -> Image.Image:
    """Any mode -> RGB."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return _deep_grey(picture, name).convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    elif picture.mode == "RGB":
        return picture.copy()
    return picture.convert("RGB")


def _deep_grey(picture: Image.Image, name: str) -> Image.Image:
    """16-bit grey, or floating-point grey from 0 to 1, as 8 bit; Pillow's own conversion would clip at 255.

    Raises:
        PictureError: numbers of another range, of which nobody knows what white is.
    """
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    top = 1.0 if picture.mode == "F" else 65535.0
    if not (low >= 0 and high <= top):  # also where they are no numbers
        raise PictureError(
            name, f"its pixels go from {low:g} to {high:g}, expected grey from 0 to {top:g}: save it with 8 or 16 bits"
        )
    levels = np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        levels = np.where(values == transparent, np.uint8(255), levels)
    return Image.fromarray(levels)


def fit(picture: Image.Image, size: tuple[int, int], crop: float = 0.5, flip: bool = False) -> Tensor:
    """Scale a picture so that it covers a size, and cut off what stands out, in one resampling (Lanczos).

    Args:
        picture: RGB.
        size: (height, width) of the result.
        crop: which part stays, from 0 (left or top end) to 1 (right or bottom end).
        flip: mirror the result.

    Returns:
        uint8 (3, height, width).
    """
    height, width = size
    if min(size) < 1:
        raise ValueError(f"got the size {height} x {width}, expected at least one pixel each way")
    if not 0 <= crop <= 1:
        raise ValueError(f"got the crop {crop}, expected a place between 0 and 1")
    scale = max(height / picture.height, width / picture.width)
    kept_width, kept_height = min(width / scale, picture.width), min(height / scale, picture.height)
    left, top = (picture.width - kept_width) * crop, (picture.height - kept_height) * crop
    box = (left, top, min(left + kept_width, picture.width), min(top + kept_height, picture.height))
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return (pixels.flip(-1) if flip else pixels).contiguous()
