"""Packing an emoji set into one file that trains a small text-to-image model in minutes per epoch.

The pictures come from two npm packages, `emoji-datasource-twitter` (Twemoji, CC-BY 4.0) and
`emoji-datasource-google` (Noto Emoji, Apache-2.0): 64x64 RGBA PNGs, composited on white here, with the captions of
their `emoji.json` (MIT).

    npm pack emoji-datasource-twitter@16.0.0 && npm pack emoji-datasource-google@16.0.0     # then unpack both
    python -m zigma.training.emoji --twitter twitter --google google --out emoji.safetensors

The packed file: `images` (n, 3, 64, 64) uint8, and in the metadata a JSON list `items` of
{"captions": [name, aliases...], "style": "twemoji" | "noto", "category": ...}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ..text import split_words

__all__ = ["CATEGORIES", "PackedPictures", "clean_caption", "pack_emoji", "read_packed"]

log = logging.getLogger(__name__)

CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
STYLES = {"twitter": "twemoji", "google": "noto"}


@dataclasses.dataclass
class PackedPictures:
    """Pictures with their captions: images (n, 3, h, w) uint8, items[i] the facts about image i."""

    images: torch.Tensor
    items: list[dict]

    @property
    def captions(self) -> list[str]:
        """The first caption of each picture."""
        return [item["captions"][0] for item in self.items]

    def select(self, categories: Iterable[str]) -> PackedPictures:
        """Only the pictures of these categories."""
        wanted = set(categories)
        keep = [i for i, item in enumerate(self.items) if item["category"] in wanted]
        return PackedPictures(self.images[keep], [self.items[i] for i in keep])


def clean_caption(name: str) -> str:
    """Lower case, letters and digits only, single spaces: what a word-level tokenizer splits without loss.

    >>> clean_caption("SMILING FACE WITH HEART-SHAPED EYES")
    'smiling face with heart shaped eyes'
    """
    return " ".join(split_words(name))


def _entries(folder: Path) -> list[dict]:
    path = folder / "emoji.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected an unpacked emoji-datasource package there; "
            f"get it with 'npm pack emoji-datasource-{folder.name}@16.0.0' and unpack it"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _aliases(entries: list[dict]) -> dict[str, str]:
    """unified code -> a second caption from the short name, where it says something else and nothing ambiguous.

    Short names with digits or shared with another picture's name would teach two pictures under one caption
    (short name "cat" belongs to CAT FACE, while CAT is "cat2").
    """
    names = {clean_caption(entry["name"]) for entry in entries}
    shorts = Counter(clean_caption(entry["short_name"]) for entry in entries)
    aliases = {}
    for entry in entries:
        short = clean_caption(entry["short_name"])
        if short and short not in names and shorts[short] == 1 and not re.search(r"\d", short):
            aliases[entry["unified"]] = short
    return aliases


def _on_white(path: Path) -> torch.Tensor:
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    rgb = Image.alpha_composite(white, picture).convert("RGB")
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def pack_emoji(twitter: Path, google: Path, categories: Iterable[str] | None = None) -> PackedPictures:
    """Read both packages; pictures that a package lacks are left out with a log line.

    Args:
        twitter, google: folders with `emoji.json` and `img/<set>/64/*.png`.
        categories: only these; None for all of them.

    Raises:
        FileNotFoundError: a folder is no such package.
    """
    images, items, absent = [], [], 0
    wanted = None if categories is None else set(categories)
    for name, folder in (("twitter", Path(twitter)), ("google", Path(google))):
        entries = sorted(_entries(folder), key=lambda entry: entry["sort_order"])
        entries = [e for e in entries if wanted is None or e["category"] in wanted]
        aliases = _aliases(entries)
        seen: Counter[str] = Counter()
        for entry in entries:
            path = folder / "img" / name / "64" / entry["image"]
            caption = clean_caption(entry["name"])
            if seen[caption]:  # "frowning face" stands for two pictures: the short name tells them apart
                caption = clean_caption(entry["short_name"])
            seen[caption] += 1
            if not path.is_file():
                absent += 1
                continue
            images.append(_on_white(path))
            captions = [caption] + [a for a in [aliases.get(entry["unified"])] if a and a != caption]
            items.append({"captions": captions, "style": STYLES[name], "category": entry["category"]})
    if absent:
        log.warning("%d pictures named in emoji.json are not in the packages and were left out", absent)
    return PackedPictures(torch.stack(images), items)


def write_packed(pictures: PackedPictures, path: Path) -> None:
    """One safetensors file: `images`, and the items in its metadata."""
    save_file({"images": pictures.images.contiguous()}, path, metadata={"items": json.dumps(pictures.items)})


def read_packed(path: Path) -> PackedPictures:
    """What `write_packed` wrote.

    Raises:
        FileNotFoundError, ValueError: with what is missing and how the file is made.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed pictures at {path}: make the file with 'python -m zigma.training.emoji'")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "items" not in metadata or "images" not in file.keys():  # noqa: SIM118 - not a dict
            raise ValueError(f"{path} has no 'images' with 'items': make it with 'python -m zigma.training.emoji'")
        return PackedPictures(file.get_tensor("images"), json.loads(metadata["items"]))


def main() -> None:
    """Command line: pack the two folders into one file."""
    parser = argparse.ArgumentParser(description="Pack two emoji-datasource packages into one safetensors file.")
    parser.add_argument("--twitter", type=Path, required=True)
    parser.add_argument("--google", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pictures = pack_emoji(arguments.twitter, arguments.google)
    write_packed(pictures, arguments.out)
    chosen = pictures.select(CATEGORIES)
    log.info("%s: %d pictures, %d of them in %s", arguments.out, len(pictures.items), len(chosen.items), CATEGORIES)


if __name__ == "__main__":
    main()
