"""The kinds of training data that are told apart, each as a list of samples whose files are not opened yet.

    captions    a folder of pictures, beside each optionally a .txt of the same name, one caption a line
    classes     one folder for each class; the labels count the folder names in sorted order, as torchvision does
    jsonl       metadata.jsonl as Hugging Face's imagefolder: file_name, and text, caption, captions or label
    webdataset  .tar shards: see tar_shards.py
    frames      a folder for each clip, its frames in natural order; clip.txt beside it; or one more level, of classes
    packed      one .safetensors with `images` and `items`: see emoji.py
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .caption_files import Notes, caption_lines, decode_text, natural_key
from .picture_files import is_picture

__all__ = [
    "METADATA", "Found", "Sample", "Stored", "caption_values", "captioned_pictures", "class_folders", "clip_folders",
    "described_by_jsonl", "number_labels", "tell_kind", "walk",
]  # fmt: skip

METADATA = "metadata.jsonl"
_LARGEST_LABEL = 99_999
_FROM_FILE_BROWSERS = ("thumbs.db", "desktop.ini", "@eadir", "__macosx", "ehthumbs.db", "thumbnails")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Bytes on the disk: a whole file, or `length` of them from `offset` in a shard."""

    path: Path
    offset: int = 0
    length: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file is gone, or not readable.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read() if self.length is None else file.read(self.length)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One picture or clip, and what is said about it.

    Attributes:
        name: path relative to the data, or "shard.tar/key".
        captions: empty where there is none.
        label: index into the dataset's label names.
        style: a word that may follow a caption (packed file).
        size: (height, width) upright, before resizing.
        frames: of a clip; 0 for a picture.
        files: the picture, or the frames in order. row: of a packed file's tensor.
        category: of a packed file.
    """

    name: str
    captions: tuple[str, ...] = ()
    label: int | None = None
    style: str = ""
    size: tuple[int, int] = (0, 0)
    frames: int = 0
    files: tuple[Stored, ...] = ()
    row: int | None = None
    category: str = ""


@dataclasses.dataclass
class Found:
    """What a source consists of, before any picture is opened.

    Attributes:
        unreadable: (name, reason) of what is there and cannot be used.
        looked_for: what the kind expects, for the sentence about an empty source.
    """

    samples: list[Sample]
    looked_for: str
    label_names: tuple[str, ...] = ()
    unreadable: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def walk(folder: Path, notes: Notes) -> list[str]:
    """Every file below a folder as a path relative to it, with "/", in natural order; links are followed once.

    Hidden files and what file browsers leave behind are left out with a note.
    """
    found, ignored, visited = [], [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root)
        if here.resolve() in visited:  # a link that leads back up would have no end
            folders.clear()
            continue
        visited.add(here.resolve())
        for name in [*folders, *files]:
            if name.startswith(".") or name.lower() in _FROM_FILE_BROWSERS:
                ignored.append((here / name).relative_to(folder).as_posix())
        folders[:] = [name for name in folders if not (name.startswith(".") or name.lower() in _FROM_FILE_BROWSERS)]
        found += [(here / name).relative_to(folder).as_posix() for name in files]
    ignored.sort(key=natural_key)
    if ignored:
        notes.add("ignored, because they are hidden or made by a file browser", *ignored)
    return sorted(set(found) - set(ignored), key=natural_key)


def tell_kind(folder: Path, files: Sequence[str], caption_extension: str, notes: Notes) -> str:
    """The kind of a folder by what it contains; the note says by what."""
    pictures = [name for name in files if is_picture(name)]
    top = [name for name in pictures if "/" not in name]
    stems = {_stem(name) for name in pictures}
    described = [n for n in files if _is_caption(n, caption_extension) and _stem(n) in stems]
    if any(PurePosixPath(name).name == METADATA for name in files):
        kind, why = "jsonl", f"there is a {METADATA}"
    elif not pictures and any(name.lower().endswith(".tar") for name in files):
        kind, why = "webdataset", "there are .tar shards"
    elif top or described or not pictures:
        kind, why = "captions", "there are pictures outside folders" if top else "there are captions beside pictures"
    elif _look_like_clips(pictures, files, caption_extension):
        kind, why = "frames", "the folders hold frames; if they are classes, give 'classes'"
    else:
        kind, why = "classes", "all pictures are in folders, without captions; if these are clips, give 'frames'"
    if pictures:
        notes.add(f"taken as {kind!r}, because {why}")
    return kind


def _look_like_clips(pictures: Sequence[str], files: Sequence[str], caption_extension: str) -> bool:
    folders = {PurePosixPath(name).parent.as_posix() for name in pictures}
    if any(_is_caption(name, caption_extension) and _stem(name) in folders for name in files):
        return True
    return all(PurePosixPath(name).name.lower().startswith("frame") for name in pictures)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _is_caption(name: str, extension: str) -> bool:
    return name.lower().endswith(extension.lower())


def _captions_of(folder: Path, stem: str, by_stem: dict[str, str], notes: Notes) -> tuple[str, ...]:
    if stem not in by_stem:
        return ()
    name = by_stem[stem]
    captions = caption_lines(decode_text((folder / name).read_bytes(), name, notes))
    if not captions:
        notes.add("caption files without a word", name)
    return captions


def _left_over(names: Iterable[str], notes: Notes) -> None:
    rest = list(names)
    if rest:
        notes.add("left out, because they are neither pictures of a kind that is read nor captions", *rest)


def captioned_pictures(folder: Path, files: Sequence[str], caption_extension: str, notes: Notes) -> Found:
    """Kind "captions"."""
    pictures = [name for name in files if is_picture(name)]
    texts = {_stem(name): name for name in files if _is_caption(name, caption_extension)}
    sharing = defaultdict(list)
    for name in pictures:
        sharing[_stem(name)].append(name)
    for stem, names in sharing.items():
        if len(names) > 1:
            shared = f"share the caption file {texts[stem]}" if stem in texts else "differ in their endings only"
            notes.add(f"pictures that {shared}", *names)
    orphans = [name for stem, name in texts.items() if stem not in sharing]
    if orphans:
        notes.add("caption files without a picture of that name", *orphans)
    _left_over((name for name in files if not is_picture(name) and name not in texts.values()), notes)
    captions = {stem: _captions_of(folder, stem, texts, notes) for stem in sharing}
    samples = [Sample(name, captions[_stem(name)], files=(Stored(folder / name),)) for name in pictures]
    return Found(samples, f"pictures, with captions in {caption_extension} files of the same names")


def class_folders(folder: Path, files: Sequence[str], caption_extension: str, notes: Notes) -> Found:
    """Kind "classes"."""
    found = captioned_pictures(folder, files, caption_extension, notes)
    outside = [sample.name for sample in found.samples if "/" not in sample.name]
    names = tuple(sorted({sample.name.split("/")[0] for sample in found.samples if "/" in sample.name}))
    empty = sorted(
        entry.name for entry in folder.iterdir()
        if entry.is_dir() and entry.name not in names and not entry.name.startswith(".")
        and entry.name.lower() not in _FROM_FILE_BROWSERS
    )  # fmt: skip
    if empty:
        notes.add("folders without pictures, which are no classes", *empty)
    number = {name: label for label, name in enumerate(names)}
    samples = [
        dataclasses.replace(sample, label=number[sample.name.split("/")[0]])
        for sample in found.samples if "/" in sample.name
    ]  # fmt: skip
    unreadable = [(name, "it is in no class folder") for name in outside]
    return Found(samples, "a folder of pictures for each class", names, unreadable)


def clip_folders(folder: Path, files: Sequence[str], caption_extension: str, notes: Notes) -> Found:
    """Kind "frames": clips in folders of their own, or in such folders inside class folders."""
    clips = defaultdict(list)
    outside = []
    for name in files:
        if is_picture(name):
            place = PurePosixPath(name).parent.as_posix()
            (outside if place == "." else clips[place]).append(name)
    texts = {_stem(name): name for name in files if _is_caption(name, caption_extension)}
    inside = {
        name: f"{name}/{stem}" for name in clips for stem in ("captions", "caption") if f"{name}/{stem}" in texts
    }  # fmt: skip
    used = {texts[stem] for stem in [*inside.values(), *clips] if stem in texts}
    _left_over((name for name in files if not is_picture(name) and name not in used), notes)
    nested = bool(clips) and all("/" in name for name in clips)
    names = tuple(sorted({name.split("/")[0] for name in clips})) if nested else ()
    samples = [
        Sample(
            name, _captions_of(folder, inside.get(name, name), texts, notes), frames=len(frames),
            label=names.index(name.split("/")[0]) if nested else None,
            files=tuple(Stored(folder / frame) for frame in frames),
        )
        for name, frames in sorted(clips.items(), key=lambda item: natural_key(item[0]))
    ]  # fmt: skip
    unreadable = [(name, "it is in no clip's folder") for name in outside]
    return Found(samples, "a folder of frames for each clip", names, unreadable)


def described_by_jsonl(folder: Path, files: Sequence[str], notes: Notes) -> Found:
    """Kind "jsonl": each metadata.jsonl describes files relative to its own folder."""
    rows: dict[str, list[dict]] = defaultdict(list)
    unreadable: list[tuple[str, str]] = []
    for listing in [name for name in files if PurePosixPath(name).name == METADATA]:
        text = decode_text((folder / listing).read_bytes(), listing, notes)
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                unreadable.append((f"{listing} line {number}", 'it is no JSON object with a "file_name"'))
                continue
            rows[(PurePosixPath(listing).parent / row["file_name"].replace("\\", "/")).as_posix()].append(row)
    unmentioned = [name for name in files if is_picture(name) and name not in rows]
    if unmentioned:
        notes.add(f"left out, because no {METADATA} mentions them", *unmentioned)
    samples, labels = [], []
    for name in sorted(rows, key=natural_key):
        if len(rows[name]) > 1:
            notes.add("mentioned more than once, with all captions kept", name)
        if not (folder / name).is_file():
            unreadable.append((name, f"{METADATA} mentions it, but there is no such file"))
            continue
        captions = tuple(dict.fromkeys(text for row in rows[name] for text in caption_values(row, name, notes)))
        samples.append(Sample(name, captions, files=(Stored(folder / name),)))
        labels.append(next((row["label"] for row in rows[name] if row.get("label") is not None), None))
    samples, names = number_labels(samples, labels, notes)
    looked_for = f'a {METADATA} with lines such as {{"file_name": "a.png", "text": "a cat"}}'
    return Found(samples, looked_for, names, unreadable)


def caption_values(row: dict[str, Any], name: str, notes: Notes) -> tuple[str, ...]:
    """The captions of a JSON object: "text", "caption", "captions" or "prompt", a text or a list of them."""
    captions: list[str] = []
    for key in ("text", "caption", "captions", "prompt"):
        value = row.get(key)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        for text in texts:
            if isinstance(text, str):
                captions += caption_lines(text)
            else:
                notes.add(f"captions under {key!r} that are no text and are left out", name)
    return tuple(dict.fromkeys(captions))


def number_labels(
    samples: Sequence[Sample], labels: Sequence[int | str | None], notes: Notes
) -> tuple[list[Sample], tuple[str, ...]]:
    """Samples with their labels as indices, and the names of the indices.

    Whole numbers stay the indices that they are, unless they are so large that they have to be names; texts are
    numbered in sorted order.
    """
    given = [label for label in labels if label is not None]
    if not given:
        return list(samples), ()
    for sample, label in zip(samples, labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            raise ValueError(f"got the label {label!r} for {sample.name}, expected a text or a whole number")
    without = [s.name for s, x in zip(samples, labels, strict=True) if x is None]
    if all(isinstance(label, int) and 0 <= label <= _LARGEST_LABEL for label in given):
        names = tuple(str(label) for label in range(max(given) + 1))
    else:
        names = tuple(sorted({str(label) for label in given}, key=natural_key))
    if without:
        notes.add("without a label, where others have one", *without)
    index = {name: place for place, name in enumerate(names)}
    numbered = [
        sample if label is None else dataclasses.replace(sample, label=index[str(label)])
        for sample, label in zip(samples, labels, strict=True)
    ]  # fmt: skip
    return numbered, names
