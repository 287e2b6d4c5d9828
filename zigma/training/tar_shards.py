"""WebDataset shards, read in place: the members of a sample stand in a .tar under one key with several endings.

The key of a member is its path up to the first dot of the file name, the rest is its ending, as in the webdataset
package. Endings that are understood, and those of ZigMa's published shards among them:

    picture   jpg, png, webp, ..., or image.jpg, image.png
    caption   txt, caption.txt, caption.json, json ("text", "caption", "captions", "prompt")
    label     cls, cls_id.cls, json ("label"); its name: cls_name.json, cls_name.txt

Published latents (latent.npy, img_feature256.npy) and features are not read: nothing tells which autoencoder made them.
An uncompressed .tar is indexed once, so that every picture can be read by itself and in any order.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from .caption_files import Notes, caption_lines, decode_text, natural_key
from .data_sources import Found, Sample, Stored, caption_values, number_labels
from .picture_files import EXTENSIONS

__all__ = ["expand_braces", "read_shards"]

_CAPTION_TEXTS = ("txt", "caption.txt", "text", "caption", "caption.caption", "prompt.txt")
_LABELS = ("cls", "cls_id.cls", "label.cls", "cls.txt")
_LABEL_NAMES = ("cls_name.json", "cls_name.txt")
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


def expand_braces(pattern: str) -> list[str]:
    """The paths of a pattern with {000..012} or {a,b}.

    >>> expand_braces("s-{08..10}.tar")
    ['s-08.tar', 's-09.tar', 's-10.tar']
    """
    parts: list[list[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{([0-9]+)\.\.([0-9]+)\}", text)
        if span:
            first, last = span.groups()
            numbers = range(int(first), int(last) + 1)
            parts.append([str(number).zfill(len(first) if first.startswith("0") else 0) for number in numbers])
        elif text.startswith("{") and "," in text:
            parts.append(text[1:-1].split(","))
        else:
            parts.append([text])
    return ["".join(choice) for choice in itertools.product(*parts)]


def read_shards(paths: Sequence[Path], root: Path, notes: Notes) -> Found:
    """The samples of shards, by shard and then in natural order of their keys.

    Args:
        paths: uncompressed .tar files.
        root: names are relative to it.
        notes: what is left out goes here.

    Raises:
        ValueError: a label that is no whole number.
    """
    samples: list[Sample] = []
    labels: list[int | str | None] = []
    names: dict[int, str] = {}
    unreadable: list[tuple[str, str]] = []
    for path in paths:
        shard = path.relative_to(root).as_posix()
        members, reason = _members(path, notes)
        if reason:
            unreadable.append((shard, reason))
        for key in sorted(members, key=natural_key):
            name, parts = f"{shard}/{key}", members[key]
            picture = _picture_ending(name, parts, notes)
            if picture is None:
                unreadable.append((name, f"it has no picture, only {', '.join(sorted(parts))}"))
                continue
            captions, label = _description(name, parts, names, notes)
            samples.append(Sample(name, captions, files=(parts[picture],)))
            labels.append(label)
            _say_unused(parts, picture, notes)
    samples, label_names = number_labels(samples, labels, notes)
    if all(isinstance(label, int) for label in labels if label is not None):
        label_names = tuple(names.get(place, name) for place, name in enumerate(label_names))
    looked_for = "samples with a picture (jpg, png, webp, image.jpg) and txt, json or cls beside it"
    return Found(samples, looked_for, label_names, unreadable)


def _members(path: Path, notes: Notes) -> tuple[dict[str, dict[str, Stored]], str]:
    """key -> ending -> bytes; and why the rest of the shard cannot be read, or ""."""
    members: dict[str, dict[str, Stored]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                split = _MEMBER.match(member.name.removeprefix("./"))
                hidden = any(part.startswith((".", "__")) for part in member.name.removeprefix("./").split("/"))
                if not member.isreg() or split is None or hidden:
                    continue
                if member.offset_data + member.size > size:
                    return members, f"it is cut off inside {member.name}"
                parts, ending = members.setdefault(split.group(1), {}), split.group(2).lower()
                if ending in parts:
                    notes.add("members that come twice in a shard, of which the last is taken", member.name)
                parts[ending] = Stored(path, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        if _beginning(path) in (b"\x1f\x8b", b"BZ", b"\xfd7"):
            return members, "it is a compressed .tar, in which no picture can be read by itself: unpack it once"
        return members, f"it is no .tar, or damaged from some place on ({error})"
    return members, ""


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(2)
    except OSError:
        return b""


def _picture_ending(name: str, parts: dict[str, Stored], notes: Notes) -> str | None:
    """Which member is the picture: a plain ending first, then "image.*", then any."""
    endings = sorted(ending for ending in parts if f".{ending.rsplit('.', 1)[-1]}" in EXTENSIONS)
    endings.sort(key=lambda ending: ("." in ending, not ending.startswith("image.")))
    if len(endings) > 1:
        notes.add(f"samples with several pictures, of which {endings[0]!r} is taken and not {endings[1]!r}", name)
    return endings[0] if endings else None


def _description(
    name: str, parts: dict[str, Stored], names: dict[int, str], notes: Notes
) -> tuple[tuple[str, ...], int | str | None]:
    """Captions and label of a sample; a label's name is added to `names`."""

    def text(ending: str) -> str:
        return decode_text(parts[ending].read(), f"{name}.{ending}", notes)

    captions: list[str] = []
    label: int | str | None = None
    for ending in _CAPTION_TEXTS:
        if ending in parts:
            captions += caption_lines(text(ending))
    for ending in ("json", "caption.json"):
        if ending not in parts:
            continue
        try:
            value = json.loads(text(ending))
        except ValueError:
            notes.add("damaged JSON, left out", f"{name}.{ending}")
            continue
        row = value if isinstance(value, dict) else {"caption": value}
        captions += caption_values(row, f"{name}.{ending}", notes)
        label = row.get("label") if label is None else label
    for ending in _LABELS:
        if ending in parts:
            stated = text(ending).strip()
            if not re.fullmatch(r"[0-9]+", stated):
                raise ValueError(f"got {stated[:40]!r} in {name}.{ending}, expected the whole number of a class")
            label = int(stated)
    for ending in _LABEL_NAMES:
        if ending in parts and isinstance(label, int):
            stated = text(ending).strip()
            names[label] = stated.strip('"') if not ending.endswith("json") else _name_in_json(stated)
    return tuple(dict.fromkeys(captions)), label


def _name_in_json(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, dict) and value:
        value = next(iter(value.values()))
    return str(value)


def _say_unused(parts: dict[str, Stored], picture: str, notes: Notes) -> None:
    used = {picture, "json", "caption.json", *_CAPTION_TEXTS, *_LABELS, *_LABEL_NAMES}
    for ending in sorted(set(parts) - used):
        if f".{ending.rsplit('.', 1)[-1]}" not in EXTENSIONS:
            notes.add(f"members that end in {ending!r} are not read")
