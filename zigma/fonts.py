"""A font for a text: Pillow's own, or one of this machine for letters that it lacks."""

from __future__ import annotations

import functools
import logging
import unicodedata

from PIL import ImageFont, features

__all__ = ["font_for"]

log = logging.getLogger(__name__)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

# File names under which systems keep fonts with many letters; Pillow looks in the folders of the system.
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "arial.ttf", "Arial.ttf", "Arial Unicode.ttf",  # Hebrew, Arabic, Cyrillic, Greek
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",  # Linux
    "msyh.ttc", "YuGothR.ttc", "msgothic.ttc", "malgun.ttf", "simsun.ttc",  # Windows
    "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc",  # macOS
    "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "FreeSans.ttf",
)  # fmt: skip


def font_for(text: str, size: int) -> Font:
    """Pillow's font of `size` pixels, or the first system font that has more of the letters of `text`.

    One warning names letters that no font has, which come out as boxes, and a text from right to left where this
    Pillow cannot set one.
    """
    letters = {letter for letter in text if not letter.isspace() and unicodedata.category(letter)[0] != "C"}
    font = _own_font(size)
    if isinstance(font, ImageFont.ImageFont):  # before Pillow 10.1; it knows Latin-1 alone
        lacking = {letter for letter in letters if ord(letter) > 255}
    else:
        lacking = _lacking(font, letters)
    if lacking:
        found = [(other, _lacking(other, letters)) for other in _system_fonts(size)]
        font, lacking = min([(font, lacking), *found], key=lambda pair: len(pair[1]))
    if lacking:
        shown = "".join(sorted(lacking)[:20])
        log.warning("no font for %s: these letters are drawn as boxes; install one, such as Noto Sans CJK", shown)
    if not features.check("raqm") and any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in letters):
        log.warning("this Pillow cannot set text from right to left, which comes out reversed: install libraqm")
    return font


def _own_font(size: int) -> Font:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one small bitmap font
        return ImageFont.load_default()


@functools.lru_cache(maxsize=4)
def _system_fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    found = []
    for name in SYSTEM_FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return tuple(found)


def _lacking(font: ImageFont.FreeTypeFont, letters: set[str]) -> set[str]:
    """The letters that a font draws as it draws a code point that is no letter."""

    def drawn(letter: str) -> tuple:
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    box = drawn("\U0010ffff")
    return {letter for letter in letters if drawn(letter) == box}
