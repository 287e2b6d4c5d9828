"""Captions as people's programs write them: any encoding, one a line; and what a mirrored picture's caption says."""

from __future__ import annotations

import codecs
import re
import unicodedata

__all__ = ["Notes", "caption_lines", "decode_text", "flipped_caption", "natural_key"]

# UTF-32's mark begins with UTF-16's and has to be tried first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


class Notes:
    """Sentences about many files, one for each kind of finding, which lists the names that it is about."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, finding: str, *names: str) -> None:
        """Say `finding` of these names too."""
        self._found.setdefault(finding, []).extend(names)

    def lines(self, at_most: int = 12) -> list[str]:
        """"finding: a, b, c", in the order in which the findings came up."""
        return [f"{finding}: {listed(names, at_most)}" if names else finding for finding, names in self._found.items()]


def listed(names: list[str], at_most: int = 12) -> str:
    """"a, b, c and 7 more"."""
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def decode_text(data: bytes, name: str, notes: Notes) -> str:
    """The text of a file: UTF-8, UTF-16 or UTF-32 by its byte order mark, UTF-8 without one, else Windows-1252.

    UTF-16 without a mark shows in the zeros beside its letters. Whatever is a guess gets a note.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError:
                notes.add(f"damaged {encoding.upper().removesuffix('-SIG')}, read with gaps", name)
                return data.decode(encoding, errors="replace")
    if b"\0" in data and len(data) % 2 == 0:
        encoding = "utf-16-be" if data[::2].count(0) > data[1::2].count(0) else "utf-16-le"
        notes.add("zeros between its letters, read as UTF-16 (save it as UTF-8)", name)
        return data.decode(encoding, errors="replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        notes.add("not UTF-8, read as Windows-1252 (save it as UTF-8 if its letters look wrong)", name)
        return data.decode("cp1252", errors="replace")


def caption_lines(text: str) -> tuple[str, ...]:
    """The captions of a text, one a line; empty lines are none, and white space and NULs shrink to single spaces."""
    lines = (" ".join(line.replace("\0", " ").split()) for line in text.splitlines())
    return tuple(dict.fromkeys(line for line in lines if line))


def natural_key(name: str) -> tuple:
    """Sorts a2 before a10, and alike on every file system.

    >>> sorted(["b", "a10", "a2"], key=natural_key)
    ['a2', 'a10', 'b']
    """
    parts = re.split(r"([0-9]+)", unicodedata.normalize("NFC", name).casefold())
    keys = [(1, int(part), "") if place % 2 else (2, 0, part) for place, part in enumerate(parts)]
    return (*keys, (0, 0, name))


_SIDES = {"left": "right", "right": "left"}
_SIDE_WORDS = re.compile(
    r"(?<![^\W\d_])(left|right)(?=(?:most|wards?|hand|handed|side|ish)?(?![^\W\d_]))", flags=re.IGNORECASE
)


def flipped_caption(text: str) -> str:
    """The caption of a mirrored picture: "left" and "right" change places, in any case of letters.

    >>> flipped_caption("A left-hand glove, LEFT of the bright light")
    'A right-hand glove, RIGHT of the bright light'
    """

    def other(match: re.Match) -> str:
        word = match.group(0)
        swapped = _SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE_WORDS.sub(other, text)
