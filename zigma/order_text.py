"""Token orders and schedules of layers as a user writes them: numbers, ranges, lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from .scan_orders import is_order

__all__ = ["parse_numbers", "parse_orders", "parse_schedule"]

SHOWN = 5  # numbers that a sentence names before it says "and more"


def parse_numbers(text: str, count: int, what: str) -> list[int]:
    """'0-3, 6' -> [0, 1, 2, 3, 6]; 'all' -> 0 ... count-1.

    Raises:
        ValueError: for other text, or numbers from `count` on.
    """
    if text.strip().lower() in ("all", ""):
        return list(range(count))
    numbers: list[int] = []
    for part in re.split(r"[,\s]+", text.strip(" ,\n")):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        if match is None:
            raise ValueError(f"got the {what} {text!r}, expected numbers and ranges such as '0-3, 6', or 'all'")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        wrong = max(first, last)
        if wrong >= count:  # before the range is made: it may be as long as a number has digits
            wrong = first if first >= count else count
            raise ValueError(f"got the {what} {text!r}, expected numbers from 0 to {count - 1}: there is no {wrong}")
        numbers += range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return numbers


def parse_orders(text: str, length: int, grid: str) -> list[torch.Tensor]:
    """Token orders written as numbers, with commas or spaces between them, or as a JSON list (of lists).

    Several orders are several lists, or else several lines or paragraphs of `length` numbers each. Fewer numbers in a
    line than `length` are a part of an order, which may be written over many lines.

    Args:
        text: what the user wrote.
        length: tokens that an order has to name, each once.
        grid: of these tokens, for sentences: "8 x 12 tokens".

    Returns:
        LongTensors (length,), one at least.

    Raises:
        ValueError: nothing written, something that is no number, another length, a number missing or twice.
    """
    if "[" in text:
        blocks = [block.replace("[", " ") for block in text.split("]")]
    else:
        blocks = []
        for paragraph in re.split(r"\n\s*\n", text):
            one = len(_words(paragraph)) == length
            blocks += [paragraph] if one else paragraph.splitlines()
    written = [words for words in map(_words, blocks) if words]
    if not written:
        raise ValueError(f"write the custom order as {length} numbers, one for each of {grid}: got an empty text")
    if len(written) > 1 and max(map(len, written)) <= length // 2:  # rows of one order, some number of them off
        written = [[word for words in written for word in words]]
    return [
        _order(words, length, grid, "custom order" if len(written) == 1 else f"custom order {number}")
        for number, words in enumerate(written)
    ]


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[,;\s]+", text) if word]


def _order(words: list[str], length: int, grid: str, name: str) -> torch.Tensor:
    strange = [word for word in words if not re.fullmatch(r"-?\d{1,18}", word)]
    if strange:
        raise ValueError(f"write whole numbers only in the {name}: got {strange[0][:40]!r}, expected 0 to {length - 1}")
    numbers = [int(word) for word in words]
    if len(numbers) != length:
        raise ValueError(
            f"write {length} numbers in the {name}, one for each of {grid}: got {len(numbers)}, expected {length}"
        )
    seen, twice, beyond = set(), [], []
    for number in numbers:
        if not 0 <= number < length:
            beyond.append(number)
        elif number in seen:
            twice.append(number)
        seen.add(number)
    missing = sorted(set(range(length)) - seen)
    faults = [
        f"{_some(faulty)} {what}"
        for faulty, what in ((missing, "missing"), (twice, "there more than once"), (beyond, "out of range"))
        if faulty
    ]
    order = torch.tensor([0] if beyond else numbers)
    if faults or not is_order(order, length):
        raise ValueError(f"write each number from 0 to {length - 1} once in the {name}: {', '.join(faults)}")
    return order


def _some(numbers: list[int]) -> str:
    shown = list(dict.fromkeys(numbers))
    text = ", ".join(map(str, shown[:SHOWN]))
    text += f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"{text} {'is' if len(shown) == 1 else 'are'}"


def parse_schedule(
    text: str, layers_of: Callable[[str], list[int]], kinds: Mapping[str, Callable[[str], list[int]]]
) -> list[tuple[list[int], str, list[int]]]:
    """A schedule, one line for each group of layers: '0-3: zigzag 0-7', '4: hilbert', '5: as trained'.

    What follows a # is a remark. A layer that several lines name takes the last, as with nodes in a row.

    Args:
        text: what the user wrote.
        layers_of: makes layers of what stands before the colon.
        kinds: name -> what makes variants of the text after the name, which may be empty.

    Returns:
        (layers, kind, variants) of each line.

    Raises:
        ValueError: naming the line, for what is no such line and for what the functions refuse.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        layers, colon, rest = line.partition(":")
        words = rest.split()
        kind = next((k for k in kinds if words[: len(k.split())] == k.split()), None)
        if not colon or not layers.strip() or not words:
            raise ValueError(f"write line {number} of the schedule as '0-3: zigzag 0-7': got {line!r}")
        if kind is None:
            raise ValueError(
                f"choose another order in line {number} of the schedule: got {rest.strip()!r}, expected one of "
                f"{', '.join(kinds)}"
            )
        try:
            found.append((layers_of(layers.strip()), kind, kinds[kind](" ".join(words[len(kind.split()) :]))))
        except ValueError as error:
            raise ValueError(f"line {number} of the schedule, {line!r}: {error}") from error
    return found
