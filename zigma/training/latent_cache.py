"""Latents and text features, computed once and kept on the disk, and never used for what they were not made of.

    cache/
        7c2f0a.../              one folder for each autoencoder (or text encoder), by its digest
            3d/3d8a....safetensors

An entry's name is its fingerprint: the SHA-256 of the encoder's digest, the file's digest and the variant (pixel size,
crops, flips, dtype). The entry states it again beside a checksum of its numbers, and both are compared on every read,
so that a cut, damaged or renamed file is found out and made anew.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..atomic_file import write_safetensors
from .caption_files import flipped_caption
from .dataset import Dataset
from .picture_files import fit

__all__ = [
    "EncodedSet", "LatentCache", "Prepared", "autoencoder_digest", "encode_dataset", "encode_texts", "flipped_caption",
]  # fmt: skip

log = logging.getLogger(__name__)

FORMAT = 1  # of entries: a change here makes all older ones unknown
PIXELS = "pixels"
_SAID_SINGLY = 5

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """How a picture is brought to the size that it is trained at.

    Attributes:
        size: (height, width) in pixels.
        flips: the mirrored picture too.
        crops: 1 for the middle; more: so many, evenly placed along the longer side, both ends among them.
    """

    size: tuple[int, int]
    flips: bool = False
    crops: int = 1

    def __post_init__(self) -> None:
        if min(self.size) < 1 or self.crops < 1:
            raise ValueError(f"got the size {self.size} and {self.crops} crops, expected at least 1 of each")

    def variants(self, picture: tuple[int, int]) -> list[tuple[float, bool]]:
        """(place of the crop, mirrored) of every variant of a picture of (height, width); one crop if none differs."""
        scale = max(self.size[0] / picture[0], self.size[1] / picture[1])
        overhang = max(picture[0] * scale - self.size[0], picture[1] * scale - self.size[1])
        count = self.crops if overhang >= 1 else 1
        places = [0.5] if count == 1 else [number / (count - 1) for number in range(count)]
        return [(place, flip) for place in places for flip in ((False, True) if self.flips else (False,))]

    @property
    def name(self) -> str:
        """Of the variant, in a fingerprint."""
        return f"{self.size[0]}x{self.size[1]} crops {self.crops} flips {int(self.flips)}"


def autoencoder_digest(module: nn.Module | None) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's state; "pixels" for None."""
    if module is None:
        return PIXELS
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _checksum(value: Tensor) -> str:
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}\n".encode() + _bytes(value)).hexdigest()


class LatentCache:
    """Tensors by what they were made of.

    Args:
        folder: of the cache, made when something is put there; None keeps nothing.
        autoencoder_digest: of the encoder whose output this is; entries of another one are never returned.
    """

    def __init__(self, folder: Path | None, autoencoder_digest: str) -> None:
        self.digest = autoencoder_digest
        self.root = None if folder is None else Path(folder)
        self.folder = None if folder is None else self.root / hashlib.sha256(self.digest.encode()).hexdigest()[:16]
        self.damaged = 0
        self._writable = True
        if self.root is not None and self.root.is_dir() and not self.folder.is_dir():
            others = [entry for entry in self.root.iterdir() if entry.is_dir() and len(entry.name) == 16]
            if others:
                log.info("%s is of another encoder and is not used: everything is encoded anew", self.root)

    def fingerprint(self, file_digest: str, variant: str) -> str:
        """SHA-256 of all that decides an entry."""
        return hashlib.sha256(json.dumps([FORMAT, self.digest, file_digest, variant]).encode()).hexdigest()

    def path(self, file_digest: str, variant: str) -> Path | None:
        """Where the entry is or would be."""
        fingerprint = self.fingerprint(file_digest, variant)
        return None if self.folder is None else self.folder / fingerprint[:2] / f"{fingerprint}.safetensors"

    def get(self, file_digest: str, variant: str) -> Tensor | None:
        """The tensor as it was put; None where there is none, or none that can be trusted (which the log says)."""
        path = self.path(file_digest, variant)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                stated = file.metadata() or {}
                value = file.get_tensor("value").clone()  # not the mapped file, which may be replaced
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            return self._distrust(path, f"cannot be read ({error})")
        if stated.get("fingerprint") != self.fingerprint(file_digest, variant):
            return self._distrust(path, "was made from something else")
        if stated.get("sha256") != _checksum(value):
            return self._distrust(path, "is damaged: its checksum differs")
        return value

    def _distrust(self, path: Path, reason: str) -> None:
        self.damaged += 1
        if self.damaged <= _SAID_SINGLY:
            log.warning("the cache entry %s %s: encoding it again", path, reason)
        elif self.damaged == _SAID_SINGLY + 1:
            log.warning("more cache entries are damaged: they are encoded again without a line for each")

    def put(self, file_digest: str, variant: str, value: Tensor) -> None:
        """Keep a tensor; where the disk will not take it, the log says so once and training goes on without."""
        path = self.path(file_digest, variant)
        if path is None or not self._writable:
            return
        value = value.detach().cpu().contiguous()
        metadata = {
            "fingerprint": self.fingerprint(file_digest, variant), "sha256": _checksum(value),
            "variant": variant, "file": file_digest,
        }  # fmt: skip
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors({"value": value}, path, metadata)
        except OSError as error:
            self._writable = False
            log.warning(
                "the cache %s cannot be written (%s): going on without it, so that the next start encodes again",
                self.root, error.strerror or error,
            )  # fmt: skip


@dataclasses.dataclass
class EncodedSet:
    """What a run trains on.

    Attributes:
        latents: of each sample its variants, each (c, h, w), or (f, c, h, w) of a clip; float32, on the CPU, as the
            autoencoder gives them (pixels in [-1, 1] without one).
        flipped: whether each variant is mirrored.
        buckets: of each sample, an index into `bucket_sizes`; latents of one bucket have one shape.
        bucket_sizes: (height, width) in pixels, sorted.
    """

    latents: list[list[Tensor]]
    flipped: list[list[bool]]
    buckets: list[int]
    bucket_sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.latents)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all variants, (c,) each, float32."""
        count, total, squares = 0, 0.0, 0.0
        for value in (value for variants in self.latents for value in variants):
            flat = value.double().movedim(-3, 0).flatten(1)
            count, total, squares = count + flat.shape[1], total + flat.sum(1), squares + flat.square().sum(1)
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float()


@torch.no_grad()
def encode_dataset(
    dataset: Dataset, autoencoder: nn.Module | None, sizes: Sequence[tuple[int, int]], *, flips: bool = False,
    crops: int = 1, cache: LatentCache | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, batch_size: int = 16, frames: int = 0, progress: Progress | None = None,
) -> EncodedSet:  # fmt: skip
    """Latents of every sample, from the cache where it has them.

    On a CPU pictures are encoded one at a time: a product's rounding may depend on the size of the batch, and a latent
    has to be the same whether its neighbours were in the cache or not.

    Args:
        dataset: of pictures or clips.
        autoencoder: with `.encode`; None trains on pixels. It is left as it is.
        sizes: (height, width) in pixels of each sample.
        flips, crops: see Prepared.
        cache: made with `autoencoder_digest(autoencoder)`; None keeps nothing.
        device, dtype: where and in what the autoencoder computes.
        batch_size: pictures in one pass, on a GPU.
        frames: of a clip, only so many, its first; 0 for all.
        progress: called with (samples done, samples in all).

    Raises:
        ValueError: sizes that do not fit the data or the autoencoder, a latent that is not finite, or the cache of
            another autoencoder. PictureError: a file has changed since it was checked.
    """
    if len(sizes) != len(dataset):
        raise ValueError(f"got {len(sizes)} sizes for {len(dataset)} samples, expected one for each")
    digest = autoencoder_digest(autoencoder)
    cache = LatentCache(None, digest) if cache is None else cache
    if cache.digest != digest:
        raise ValueError("got a cache of another autoencoder: make it with the digest of the one that encodes")
    device = torch.device(device)
    prepared = [Prepared(tuple(size), flips, crops) for size in sizes]
    keys = [(dataset.file_digest(i), _variant(dataset, i, prepared[i], dtype, frames)) for i in range(len(dataset))]
    stacked: list[Tensor | None] = [cache.get(*key) for key in keys]
    missing = [index for index, value in enumerate(stacked) if value is None]
    done = len(stacked) - len(missing)
    if progress is not None and done:
        progress(done, len(stacked))
    if missing:
        encode = _encoder(autoencoder, device, dtype)
        step = 1 if device.type == "cpu" else batch_size
        # By size, so that a batch holds pictures of one shape.
        missing.sort(key=lambda index: (sizes[index], index))
        for indices, values in _encoded(dataset, missing, prepared, frames, encode, step):
            for index, value in zip(indices, values, strict=True):
                if not value.isfinite().all():
                    raise ValueError(
                        f"the latent of {dataset.samples[index].name} is not finite in {dtype}: encode in float32"
                    )
                stacked[index] = value
                cache.put(*keys[index], value)
                done += 1
                if progress is not None:
                    progress(done, len(stacked))
        log.info("encoded %d of %d samples, the others were in the cache", len(missing), len(stacked))
    bucket_sizes = sorted({tuple(size) for size in sizes})
    flipped = [[flip for _, flip in prepared[i].variants(dataset.samples[i].size)] for i in range(len(dataset))]
    buckets = [bucket_sizes.index(tuple(size)) for size in sizes]
    return EncodedSet([list(value.unbind(0)) for value in stacked], flipped, buckets, bucket_sizes)


def _variant(dataset: Dataset, index: int, prepared: Prepared, dtype: torch.dtype, frames: int) -> str:
    cut = f" frames {_frame_count(dataset, index, frames)}" if dataset.samples[index].frames else ""
    return f"{prepared.name}{cut} {str(dtype).removeprefix('torch.')}"


def _frame_count(dataset: Dataset, index: int, frames: int) -> int:
    has = dataset.samples[index].frames
    if frames and has < frames:
        raise ValueError(f"{dataset.samples[index].name} has {has} frames, but {frames} are needed: leave it out")
    return frames or has


def _encoder(autoencoder: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """uint8 (b, 3, H, W) -> latents (b, c, h, w), float32 on the CPU."""
    if autoencoder is None:
        return lambda pixels: pixels.float() / 127.5 - 1
    first = next(autoencoder.parameters())
    if (first.device, first.dtype) != (device, dtype):
        autoencoder = copy.deepcopy(autoencoder).to(device=device, dtype=dtype)  # converting back would lose digits
    return lambda pixels: autoencoder.encode((pixels.to(device).float() / 127.5 - 1).to(dtype)).float().cpu()


def _encoded(
    dataset: Dataset, indices: list[int], prepared: list[Prepared], frames: int, encode: Callable[[Tensor], Tensor],
    step: int,
) -> Iterator[tuple[list[int], list[Tensor]]]:  # fmt: skip
    """Groups of samples with their stacked variants (v, c, h, w) or (v, f, c, h, w), in passes of `step` pictures."""

    def prepare(index: int) -> Tensor:
        return _pixels(dataset, index, prepared[index], frames)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for group in _groups(indices, prepared, max(step, 8)):
            pixels = list(pool.map(prepare, group))
            flat = torch.cat([part.flatten(0, -4) for part in pixels])
            latents = torch.cat([encode(part) for part in flat.split(step)])
            parts = latents.split([part.shape[:-3].numel() for part in pixels])
            yield group, [
                part.reshape(*own.shape[:-3], *part.shape[1:]).clone() for part, own in zip(parts, pixels, strict=True)
            ]


def _groups(indices: list[int], prepared: list[Prepared], length: int) -> Iterator[list[int]]:
    group: list[int] = []
    for index in indices:
        if group and (len(group) == length or prepared[index].size != prepared[group[0]].size):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _pixels(dataset: Dataset, index: int, prepared: Prepared, frames: int) -> Tensor:
    """uint8 (v, 3, h, w), or (v, f, 3, h, w) of a clip."""
    sample = dataset.samples[index]
    variants = prepared.variants(sample.size)

    def of(picture: Image.Image) -> Tensor:
        return torch.stack([fit(picture, prepared.size, place, flip) for place, flip in variants])

    if not sample.frames:
        return of(dataset.picture(index))
    count = _frame_count(dataset, index, frames)
    return torch.stack([of(picture) for picture in dataset.clip(index)[:count]], dim=1)


def encode_texts(
    texts: Iterable[str], encode: Callable[[list[str]], Tensor], *, cache: LatentCache | None = None,
    batch_size: int = 16, progress: Progress | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Features of each different text, from the cache where it has them.

    Args:
        texts: any of them may come often; it is encoded once.
        encode: texts -> (b, ...).
        cache: made with the text encoder's digest (`autoencoder_digest` of it, or another text that names it exactly).
        batch_size: texts in one pass.
        progress: called with (texts done, texts in all).

    Returns:
        text -> (...), on the CPU, in the encoder's dtype.
    """
    unique = list(dict.fromkeys(texts))
    cache = LatentCache(None, "none") if cache is None else cache
    keys = {text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in unique}
    known = {text: value for text in unique if (value := cache.get(keys[text], "text")) is not None}
    missing = [text for text in unique if text not in known]
    for start in range(0, len(missing), batch_size):
        part = missing[start : start + batch_size]
        with torch.no_grad():
            values = encode(part).detach().cpu()
        for text, value in zip(part, values, strict=True):
            known[text] = value.clone()
            cache.put(keys[text], "text", known[text])
        if progress is not None:
            progress(len(known), len(unique))
    return {text: known[text] for text in unique}
