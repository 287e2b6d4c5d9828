"""Pictures for people: tensors as pictures, labelled sheets of them, files.

Pillow only, and its built-in font where that has the letters, so that a sheet looks the same on every machine.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .atomic_file import replacing
from .fonts import Font, font_for

__all__ = [
    "enlarge",
    "labelled_sheet",
    "picture_format",
    "save_animation",
    "save_picture",
    "to_pictures",
]

INK, FAINT_INK, HAIRLINE, PAPER = (38, 41, 46), (120, 124, 130), (226, 229, 233), (255, 255, 255)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
ANIMATIONS = (".webp", ".mp4")


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Images (b, 3, H, W) in [-1, 1], clamped, as `b` RGB pictures."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"got images of shape {tuple(images.shape)}, but expected (b, 3, height, width)")
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in levels]


def enlarge(picture: Image.Image, factor: int, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The picture `factor` times as large; NEAREST shows its pixels, LANCZOS is smooth."""
    if factor < 1:
        raise ValueError(f"got an enlargement of {factor}, but expected a whole number from 1")
    return picture if factor == 1 else picture.resize((picture.width * factor, picture.height * factor), resample)


def labelled_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    title: str = "",
    footnote: str = "",
    text_size: int = 13,
    gap: int = 18,
) -> Image.Image:
    """Pictures in rows on white paper, each with its caption below, wrapped to the picture's width.

    Args:
        pictures: at least one; a cell is as large as the largest of them.
        captions: one for each picture, may be empty; a line break in one is kept.
        columns: pictures in a row; None makes the sheet about one and a half times as wide as high.
        title, footnote: a line above and below, each left out when empty.
        text_size: of the captions, in pixels.
        gap: between pictures and round the sheet, in pixels.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"got {len(pictures)} pictures and {len(captions)} captions: expected one of each, or more")
    if columns is None:
        columns = min(len(pictures), math.ceil(math.sqrt(1.5 * len(pictures))))
    words = " ".join([title, footnote, *captions])
    font, title_font = font_for(words, text_size), font_for(title, round(1.5 * text_size))
    cell_w, cell_h = max(p.width for p in pictures), max(p.height for p in pictures)
    labels = [_wrap(caption, font, cell_w) for caption in captions]
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    line = round(1.35 * text_size)
    label_heights = [line * max(len(labels[i]) for i in row) for row in rows]

    width = columns * (cell_w + gap) + gap
    above, below = _wrap(title, title_font, width - 2 * gap), _wrap(footnote, font, width - 2 * gap)
    title_line = round(1.5 * line)
    head, foot = title_line * len(above) + gap * bool(above), line * len(below) + gap * bool(below)
    body = sum(cell_h + 6 + label_height + gap for label_height in label_heights)
    sheet = Image.new("RGB", (width, gap + head + body + foot), PAPER)
    draw = ImageDraw.Draw(sheet)

    for number, text in enumerate(above):
        draw.text((gap, gap + number * title_line), text, INK, title_font)
    y = gap + head
    for row, label_height in zip(rows, label_heights, strict=True):
        for column, i in enumerate(row):
            x = gap + column * (cell_w + gap)
            left, top = x + (cell_w - pictures[i].width) // 2, y + (cell_h - pictures[i].height) // 2
            draw.rectangle((x - 1, y - 1, x + cell_w, y + cell_h), outline=HAIRLINE)
            sheet.paste(pictures[i], (left, top))
            for number, text in enumerate(labels[i]):
                centred = x + (cell_w - font.getlength(text)) / 2
                draw.text((centred, y + cell_h + 6 + number * line), text, INK, font)
        y += cell_h + 6 + label_height + gap
    for number, text in enumerate(below):
        draw.text((gap, y + number * line), text, FAINT_INK, font)
    return sheet


def picture_format(path: Path) -> str:
    """The name by which Pillow knows the format that the path's suffix stands for.

    Raises:
        ValueError: for any other suffix than those of FORMATS.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"got the picture's name {str(path)!r}, but expected one that ends in {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write the picture whole or not at all, in the format that its suffix says, and make its folder if needed.

    Raises:
        ValueError: for any other suffix than those of FORMATS.
        OSError: when the folder or the file cannot be written.
    """
    path = Path(path)
    encoded = io.BytesIO()
    picture.save(encoded, picture_format(path))
    return _write(encoded, path)


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike[str], fps: int = 8) -> Path:
    """Write frames of one size as a video, whole or not at all, and make its folder if needed.

    Args:
        frames: at least one.
        path: ends in .webp (animated without loss, repeating) or .mp4 (H.264 where the package av has it; players want
            even sides, so that an odd one loses its last line).
        fps: frames a second.

    Raises:
        ValueError: no frames, or another suffix. ImportError: an .mp4 without the package av. OSError: as above.
    """
    path = Path(path)
    if not frames or path.suffix.lower() not in ANIMATIONS:
        raise ValueError(
            f"got {len(frames)} frames for {path.name}, but expected some, and a name that ends in "
            f"{', '.join(ANIMATIONS)}"
        )
    encoded = io.BytesIO()
    if path.suffix.lower() == ".mp4":
        _encode_mp4(frames, encoded, fps)
    else:
        rest = list(frames[1:])
        frames[0].save(encoded, "WEBP", save_all=True, append_images=rest, duration=1000 / fps, loop=0, lossless=True)
    return _write(encoded, path)


def _encode_mp4(frames: Sequence[Image.Image], target: io.BytesIO, fps: int) -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError("an .mp4 needs the package av: pip install av, or write a .webp") from error
    with av.open(target, "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = frames[0].width // 2 * 2, frames[0].height // 2 * 2
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "12"}
        for frame in frames:
            frame = frame.crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def _write(encoded: io.BytesIO, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(encoded.getvalue())
    return path


def _wrap(text: str, font: Font, width: float) -> list[str]:
    """The text in lines no wider than `width` pixels, broken between words, and within a word that is wider alone."""
    if isinstance(font, ImageFont.ImageFont):  # the bitmap font raises on what it lacks
        text = text.encode("latin-1", "replace").decode("latin-1")
    lines: list[str] = []
    for paragraph in text.splitlines():
        lines += _wrap_paragraph(paragraph, font, width)
    return lines


def _wrap_paragraph(text: str, font: Font, width: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
