"""Pictures with captions for training: read from a packed file or a folder, encoded once, cached.

A folder holds pictures and beside each, optionally, a text file of the same name with one caption per line; a picture
without one is captioned by its file name. Every picture is scaled and cropped to a square of one size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save_file

from ..autoencoder import TinyAutoencoder, load_autoencoder
from ..checkpoint import LatentFormat
from ..text import split_words
from .emoji import PackedPictures, read_packed

__all__ = ["EncodedPictures", "encode_pictures", "read_autoencoder", "read_pictures", "vocabulary_of"]

log = logging.getLogger(__name__)

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def read_pictures(path: Path, size: int = 64, categories: Iterable[str] | None = None) -> PackedPictures:
    """The training pictures at `path`.

    Args:
        path: a packed file (.safetensors, as `python -m zigma.training.emoji` writes it) or a folder of pictures.
        size: sides that a folder's pictures are brought to; a packed file has its own.
        categories: of a packed file, only these; None for all.

    Raises:
        FileNotFoundError, ValueError: nothing usable is there.
    """
    path = Path(path)
    if path.is_dir():
        if categories:
            raise ValueError(f"got categories with the folder {path}, but only a packed file has them: leave them out")
        return _read_folder(path, size)
    pictures = read_packed(path)
    if categories:
        known = sorted({item["category"] for item in pictures.items})
        strange = sorted(set(categories) - set(known))
        if strange:
            raise ValueError(f"got the categories {', '.join(strange)}, but {path} has {', '.join(known)}")
        pictures = pictures.select(categories)
    return pictures


def _read_folder(folder: Path, size: int) -> PackedPictures:
    images, items, unreadable, named = [], [], [], 0
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS):
        try:
            images.append(_square(path, size))
        except (UnidentifiedImageError, OSError) as error:
            unreadable.append(f"{path.name} ({error})")
            continue
        text = path.with_suffix(".txt")
        captions = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
        captions = [" ".join(split_words(line)) for line in captions if split_words(line)]
        named += not captions
        items.append({"captions": captions or [" ".join(split_words(path.stem))], "style": "", "category": ""})
    if unreadable:
        log.warning("%d pictures cannot be read and are left out: %s", len(unreadable), "; ".join(unreadable[:3]))
    if not images:
        raise ValueError(f"{folder} has no pictures: expected files ending in {', '.join(sorted(EXTENSIONS))}")
    if named:
        log.warning("%d of %d pictures have no .txt beside them and are captioned by file name", named, len(items))
    return PackedPictures(torch.stack(images), items)


def _square(path: Path, size: int) -> torch.Tensor:
    """A picture on white, scaled and cropped in the middle to (3, size, size) uint8."""
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    picture = ImageOps.fit(Image.alpha_composite(white, picture).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def vocabulary_of(pictures: PackedPictures) -> tuple[str, ...]:
    """Every word of the captions and the names of the styles, sorted."""
    words = {word for item in pictures.items for caption in item["captions"] for word in split_words(caption)}
    return tuple(sorted(words | {item["style"] for item in pictures.items if item["style"]}))


@dataclasses.dataclass
class EncodedPictures:
    """What the denoiser trains on: latents (n, c, h, w) float32 as the model takes them, and the items of each."""

    latents: torch.Tensor
    items: list[dict]
    format: LatentFormat


@torch.no_grad()
def encode_pictures(
    pictures: PackedPictures, autoencoder: TinyAutoencoder | None, cache: Path | None = None
) -> EncodedPictures:
    """Latents of all pictures, normalised channel by channel; without an autoencoder the pictures themselves.

    Args:
        pictures: uint8.
        autoencoder: encoder of the latents; None means pixel space.
        cache: a .safetensors to keep the latents in. It is used again only for the same pictures and autoencoder.
    """
    if autoencoder is None:
        latents = pictures.images.float() / 127.5 - 1
        return EncodedPictures(latents, pictures.items, LatentFormat(channels=3, downscale=1))
    key = _fingerprint(pictures, autoencoder)
    latents = _read_cache(cache, key)
    if latents is None:
        parts = pictures.images.split(64)
        latents = torch.cat([autoencoder.encode(part.float() / 127.5 - 1) for part in parts])
        if cache is not None:
            save_file({"latents": latents}, cache, metadata={"fingerprint": key})
        log.info("encoded %d pictures to latents of %s", len(latents), " x ".join(map(str, latents.shape[1:])))
    shift, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    downscale = pictures.images.shape[-1] // latents.shape[-1]
    plain = LatentFormat(latents.shape[1], downscale, scale=tuple((1 / std).tolist()), shift=tuple(shift.tolist()))
    latents = plain.to_model(latents)
    factors, bias = _preview_factors(latents, pictures.images)
    return EncodedPictures(
        latents, pictures.items, dataclasses.replace(plain, rgb_factors=factors, rgb_bias=bias)
    )  # fmt: skip


def _preview_factors(latents: torch.Tensor, images: torch.Tensor) -> tuple[list[list[float]], list[float]]:
    """Least squares from latents to the mean colour of the pixels that each stands for."""
    colours = torch.nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, latents.shape[-2:])
    inputs = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, colours.permute(0, 2, 3, 1).reshape(-1, 3)).solution
    return solution[:-1].tolist(), solution[-1].tolist()


def _fingerprint(pictures: PackedPictures, autoencoder: TinyAutoencoder) -> str:
    digest = hashlib.sha256(pictures.images.numpy().tobytes())
    for value in autoencoder.state_dict().values():
        digest.update(value.float().numpy().tobytes())
    return digest.hexdigest()


def _read_cache(cache: Path | None, key: str) -> torch.Tensor | None:
    if cache is None or not cache.is_file():
        return None
    with safe_open(cache, framework="pt") as file:
        stated = (file.metadata() or {}).get("fingerprint")
        if stated == key:
            return file.get_tensor("latents")
    log.info("%s belongs to other pictures or another autoencoder: encoding again", cache)
    return None


def read_autoencoder(path: Path) -> TinyAutoencoder:
    """An autoencoder in TAESD layout, alone in its file or (as "vae.*") inside a model file; float32, frozen.

    Raises:
        ValueError, FileNotFoundError: no such file, or none in it.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            stated = json.loads((file.metadata() or {}).get("zigma.latent", "null"))
        if stated and stated["downscale"] == 1:
            raise ValueError(f"{path} is a model in pixel space and has no autoencoder: leave the autoencoder out")
    model = load_autoencoder(path)
    if not isinstance(model, TinyAutoencoder):
        raise ValueError(f"{path} is a Stable Diffusion VAE, but training takes one in TAESD layout")
    return model
