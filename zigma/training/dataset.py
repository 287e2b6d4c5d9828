"""Training data of any kind as one list of samples, each opened once before training so that none fails later.

    dataset = read_dataset(Path("pictures"))
    dataset.samples[0].captions, dataset.picture(0)
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from ..text import split_words
from .caption_files import Notes, natural_key
from .data_sources import (
    METADATA,
    Found,
    Sample,
    captioned_pictures,
    class_folders,
    clip_folders,
    described_by_jsonl,
    tell_kind,
    walk,
)  # fmt: skip
from .emoji import read_packed
from .picture_files import EXTENSIONS, PictureError, picture_size, read_picture
from .tar_shards import expand_braces, read_shards

__all__ = ["KINDS", "Dataset", "Sample", "read_dataset"]

KINDS = ("captions", "classes", "jsonl", "webdataset", "frames", "packed")


@dataclasses.dataclass
class Dataset:
    """Samples in natural order of their names, whatever the file system says.

    Attributes:
        samples: those that can be used.
        label_names: of class data, in the order of the labels.
        unreadable: (name, reason) of what was left out.
        notes: sentences about what was found, taken or ignored.
        duplicates: names of samples with identical bytes, group by group (found only where every file was read).
        kind: one of KINDS.
    """

    samples: list[Sample]
    label_names: tuple[str, ...] = ()
    unreadable: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    duplicates: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    kind: str = "captions"
    images: torch.Tensor | None = dataclasses.field(default=None, repr=False)  # of a packed file, uint8 (n, 3, h, w)
    digests: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def clips(self) -> bool:
        """Whether the samples are clips."""
        return any(sample.frames for sample in self.samples)

    def picture(self, index: int) -> Image.Image:
        """The picture, upright, in RGB; of a clip its first frame.

        Raises:
            PictureError: the file has changed or gone since it was checked.
        """
        sample = self.samples[index]
        if sample.row is not None:
            return Image.fromarray(self.images[sample.row].permute(1, 2, 0).contiguous().numpy())
        return read_picture(*_bytes_of(sample, 0), [])

    def clip(self, index: int) -> list[Image.Image]:
        """The frames of a clip, in order; a picture is a clip of one."""
        sample = self.samples[index]
        if not sample.frames:
            return [self.picture(index)]
        return [read_picture(*_bytes_of(sample, number), []) for number in range(sample.frames)]

    def file_digest(self, index: int) -> str:
        """SHA-256 of the bytes of the picture's file; of a clip, of its frames' digests."""
        sample = self.samples[index]
        if sample.name not in self.digests:
            if sample.row is not None:
                parts = [hashlib.sha256(self.images[sample.row].contiguous().numpy().tobytes()).hexdigest()]
            else:
                parts = [hashlib.sha256(_bytes_of(sample, n)[0]).hexdigest() for n in range(len(sample.files))]
            self.digests[sample.name] = _joined(parts)
        return self.digests[sample.name]

    def captioned_by_name(self) -> Dataset:
        """The same data, samples without a caption captioned by the words of their files' names."""

        def named(sample: Sample) -> Sample:
            words = " ".join(split_words(Path(sample.name).stem))
            return sample if sample.captions else dataclasses.replace(sample, captions=(words,) if words else ())

        return dataclasses.replace(self, samples=[named(sample) for sample in self.samples])

    def subset(self, indices: Iterable[int]) -> Dataset:
        """The same data with only these samples."""
        return dataclasses.replace(self, samples=[self.samples[index] for index in indices])


def read_dataset(
    path: Path, kind: str = "auto", *, caption_extension: str = ".txt", deep: bool = True,
    categories: Iterable[str] = (), progress: Callable[[int, int], None] | None = None,
) -> Dataset:  # fmt: skip
    """The training data at a path.

    Args:
        path: a folder, a .tar, a pattern of .tar files such as "data/{000..012}.tar", a metadata.jsonl, or a packed
            .safetensors.
        kind: one of KINDS, or "auto": told by what is there, with a note that says which and why.
        caption_extension: of the caption files.
        deep: decode every picture once, so that damaged ones are known before training, and find duplicates; else only
            headers are read.
        categories: of a packed file, only these; none for all.
        progress: called with (samples checked, samples in all).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: nothing usable is there; says what was looked for and, of broken files, the first reasons.
    """
    path, notes = Path(path), Notes()
    if kind not in ("auto", *KINDS):
        raise ValueError(f"got the kind of data {kind!r}, expected auto, {', '.join(KINDS)}")
    if not caption_extension.startswith("."):
        caption_extension = f".{caption_extension}"
    kind, found, images = _find(path, kind, caption_extension, notes)
    if categories:
        found.samples = _in_categories(found.samples, kind, tuple(categories), path)
    if not found.samples:
        raise ValueError(_nothing(path, kind, found))
    dataset = Dataset([], found.label_names, found.unreadable, kind=kind, images=images)
    _check(dataset, found.samples, deep, notes, progress)
    dataset.notes = notes.lines()
    if not dataset.samples:
        raise ValueError(_nothing(path, kind, found))
    return dataset


def _find(path: Path, kind: str, caption_extension: str, notes: Notes) -> tuple[str, Found, torch.Tensor | None]:
    """The kind, what there is of it, and the pictures of a packed file."""
    if path.is_dir():
        if kind == "packed":
            raise ValueError(f"{path} is a folder, but the kind 'packed' is a .safetensors file: give that file")
        files = walk(path, notes)
        kind = tell_kind(path, files, caption_extension, notes) if kind == "auto" else kind
        return kind, _find_in_folder(path, kind, files, caption_extension, notes), None
    suffix = path.suffix.lower()
    if suffix == ".tar":
        kind = _agree(path, kind, "webdataset")
        paths = [Path(name) for name in expand_braces(str(path))]
        missing = [str(shard) for shard in paths if not shard.is_file()]
        if missing:
            raise FileNotFoundError(f"there is no {missing[0]} ({len(missing)} of {len(paths)} shards are missing)")
        root = Path(os.path.commonpath([shard.parent for shard in paths]))
        return kind, read_shards(paths, root, notes), None
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}: expected a folder of pictures or .tar shards")
    if path.name == METADATA:
        files = walk(path.parent, notes)
        return _agree(path, kind, "jsonl"), described_by_jsonl(path.parent, files, notes), None
    if suffix == ".safetensors":
        packed = read_packed(path)
        samples = [
            Sample(
                f"{path.name}/{row}", tuple(item.get("captions", ())), style=item.get("style", ""), row=row,
                size=tuple(packed.images.shape[2:]), category=item.get("category", ""),
            )
            for row, item in enumerate(packed.items)
        ]  # fmt: skip
        return _agree(path, kind, "packed"), Found(samples, "pictures in a packed file"), packed.images
    raise ValueError(
        f"{path} is no training data: expected a folder of pictures, .tar shards, a {METADATA} or a packed .safetensors"
    )


def _agree(path: Path, kind: str, own: str) -> str:
    if kind not in ("auto", own):
        raise ValueError(f"got the kind {kind!r} for {path}, which can only be {own!r}: leave the kind out")
    return own


def _find_in_folder(path: Path, kind: str, files: list[str], caption_extension: str, notes: Notes) -> Found:
    if kind == "webdataset":
        shards = [path / name for name in files if name.lower().endswith(".tar")]
        return read_shards(shards, path, notes)
    if kind == "jsonl":
        return described_by_jsonl(path, files, notes)
    of_kind = {"captions": captioned_pictures, "classes": class_folders, "frames": clip_folders}[kind]
    return of_kind(path, files, caption_extension, notes)


def _in_categories(samples: list[Sample], kind: str, categories: tuple[str, ...], path: Path) -> list[Sample]:
    if kind != "packed":
        raise ValueError(f"got categories with {path}, but only a packed file has them: leave them out")
    known = sorted({sample.category for sample in samples})
    strange = sorted(set(categories) - set(known))
    if strange:
        raise ValueError(f"got the categories {', '.join(strange)}, but {path} has {', '.join(known)}")
    return [sample for sample in samples if sample.category in categories]


def _nothing(path: Path, kind: str, found: Found) -> str:
    looked_for = f"{found.looked_for} ({', '.join(EXTENSIONS)})" if kind in ("captions", "classes", "frames") else ""
    sentence = f"{path} has nothing to train on: looked for {looked_for or found.looked_for}"
    if found.unreadable:
        broken = "; ".join(f"{name}: {reason}" for name, reason in found.unreadable[:3])
        rest = len(found.unreadable) - 3
        more = "; ..." if rest > 0 else ""
        sentence += f", and none of the {len(found.unreadable)} found can be used ({broken}{more})"
    return sentence


def _bytes_of(sample: Sample, number: int) -> tuple[bytes, str]:
    """The bytes of the picture or of a frame, and its name for messages."""
    stored = sample.files[number]
    name = f"{sample.name}/{stored.path.name}" if sample.frames else sample.name
    try:
        return stored.read(), name
    except OSError as error:
        raise PictureError(name, f"the file cannot be read ({error.strerror or error})") from error


def _joined(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@dataclasses.dataclass
class _Checked:
    """What a look into a sample's files told: it as it is now, or why it cannot be used."""

    sample: Sample
    digest: str = ""
    reason: str = ""
    said: tuple[tuple[str, str], ...] = ()  # (name, finding)


def _look(sample: Sample, deep: bool) -> _Checked:
    sizes: dict[tuple[int, int], str] = {}
    digests: list[str] = []
    said: list[tuple[str, str]] = []
    try:
        for number in range(len(sample.files)):
            data, name = _bytes_of(sample, number)
            if not deep:
                sizes.setdefault(picture_size(data, name), name)
                continue
            sentences: list[str] = []
            picture = read_picture(data, name, sentences)
            said += [(name, sentence.removeprefix(f"{name}: ")) for sentence in sentences]
            digests.append(hashlib.sha256(data).hexdigest())
            sizes.setdefault((picture.height, picture.width), name)
    except PictureError as error:
        where = f"its frame {error.name.removeprefix(sample.name + '/')}: " if sample.frames else ""
        return _Checked(sample, reason=where + error.reason)
    if len(sizes) > 1:
        (first, a), (second, b) = list(sizes.items())[:2]
        return _Checked(
            sample, reason=f"its frames differ in size: {a} has {first[1]} x {first[0]}, {b} {second[1]} x {second[0]}"
        )
    checked = dataclasses.replace(sample, size=next(iter(sizes)))
    return _Checked(checked, _joined(digests) if deep else "", said=tuple(said))


def _check(
    dataset: Dataset, samples: list[Sample], deep: bool, notes: Notes, progress: Callable[[int, int], None] | None
) -> None:
    """Fill the dataset with the samples whose files can be used."""
    same: dict[str, list[str]] = defaultdict(list)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        looked = (
            map(_Checked, samples) if dataset.kind == "packed"
            else pool.map(lambda sample: _look(sample, deep), samples)
        )  # fmt: skip
        for count, checked in enumerate(looked, 1):
            name = checked.sample.name
            if checked.reason:
                dataset.unreadable.append((name, checked.reason))
            else:
                dataset.samples.append(checked.sample)
                if checked.digest:
                    dataset.digests[name] = checked.digest
                if deep:
                    same[dataset.file_digest(len(dataset.samples) - 1)].append(name)
            for place, finding in checked.said:
                notes.add(finding, place)
            if progress is not None:
                progress(count, len(samples))
    finally:  # of an interrupted look, what has not begun is never opened
        pool.shutdown(cancel_futures=True)
    dataset.unreadable.sort(key=lambda entry: natural_key(entry[0]))
    dataset.duplicates = [tuple(names) for names in same.values() if len(names) > 1]
