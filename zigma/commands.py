"""What the command line says about files, orders and this machine, line by line; and what all commands check first."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from .checkpoint import Bundle
    from .conditions import ConditionFacts

# The imports that bring torch stand in the commands, so that --help and a misspelt option answer at once.


class UserError(Exception):
    """A mistake of the user, with the sentence that says what to do."""


def model_file(name: str) -> Path:
    """A file's path, or that of the shipped model of this name."""
    from .assets import available_models

    models = available_models()
    if name in models and not Path(name).is_file():
        return models[name]
    if not Path(name).is_file():
        raise UserError(f"no model file {name}: give a path, or the name of a shipped model ({', '.join(models)})")
    return Path(name)


def check_device(device: str) -> None:
    """Find out now that torch cannot use a device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA says so in an AssertionError
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}): try --device cpu") from error


def check_writable(path: Path, suffixes: tuple[str, ...]) -> None:
    """Find out before the work, not after it."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"got the output {path}, but expected a name that ends in {', '.join(suffixes)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path.parent} cannot be made ({error.strerror}): choose another") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"the output {path} cannot be written: choose a file in a folder that is yours")


def file_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the user tells about a file that does not describe itself, as `read_checkpoint` takes it."""
    given = {
        "scan_type": options.scan_type, "img_dim": options.img_dim, "video_frames": options.video_frames,
        "legacy_permutation": options.legacy_permutation or None,
        "corrected_time_order": options.corrected_time_order or None,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    if options.config is not None:
        from .config import read_published_yaml

        given = {**read_published_yaml(options.config, given), **given}
    return {"weights": options.weights, **given}


def inspect_command(options: argparse.Namespace) -> Iterator[str]:
    """What a file holds, read without building a module."""
    from .checkpoint import read_checkpoint
    from .diagnosis import architecture_lines, bad_tensors, metadata_lines, size_line

    file = read_checkpoint(model_file(options.file), **file_arguments(options))
    parts = {"denoiser": file.state_dict, "text encoder": file.text_state, "autoencoder": file.vae_state}
    yield f"{file.path}: {Path(file.path).stat().st_size / 1e6:.1f} MB"
    yield from (f"  {size_line(name, state)}" for name, state in parts.items())
    lines = architecture_lines(file.config, file.latent, file.token_orders, file.condition)
    yield from (f"  {line}" for line in lines)
    for name, state in parts.items():
        yield from (f"  damaged, in the {name}: {tensor}" for tensor in bad_tensors(state or {}))
    yield from (f"  {line}" for line in metadata_lines(file.metadata))


def convert_command(options: argparse.Namespace) -> Iterator[str]:
    """Any model file as one .safetensors that describes itself."""
    import torch

    from .autoencoder import load_autoencoder
    from .checkpoint import RESERVED, load_bundle, save_checkpoint

    check_writable(options.output, (".safetensors",))
    source = model_file(options.file)
    if options.output.exists() and options.output.samefile(source):
        raise UserError(f"the output {options.output} is the input itself: choose another name")
    # Without a dtype every tensor keeps the one it has: convert loses nothing.
    bundle = load_bundle(source, dtype="keep", **file_arguments(options))
    autoencoder = bundle.autoencoder if options.vae is None else load_autoencoder(options.vae)
    kept = {key: value for key, value in bundle.metadata.items() if key not in RESERVED}
    save_checkpoint(
        bundle.model, options.output, kept, text_encoder=bundle.text_encoder, autoencoder=autoencoder,
        latent=bundle.latent, condition=_condition(bundle, options),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
    )  # fmt: skip
    yield f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB"


def _condition(bundle: Bundle, options: argparse.Namespace) -> ConditionFacts:
    """What the file says of its conditions, and what the user says beside it."""
    facts: dict[str, Any] = {}
    if options.label_names is not None:
        facts["label_names"] = options.label_names.read_text(encoding="utf-8").splitlines()
    if options.null_label is not None:
        facts["null"] = options.null_label
    return dataclasses.replace(bundle.condition, **facts)


def scan_order_command(options: argparse.Namespace) -> Iterator[str]:
    """The step at which each token is read, as the grid; or the path as a picture."""
    import torch

    from .order_drawing import draw_order
    from .order_table import format_table, longest_step, neighbour_distance
    from .scan_orders import available_orders, continuity, count_jumps, inverse_order, scan_order
    from .sheet import labelled_sheet, save_picture

    generator = torch.Generator().manual_seed(options.seed)
    kind, height, width = options.kind, options.height, options.width
    indices = [options.index] if options.index is not None else range(min(8, available_orders().get(kind, 1)))
    orders = [scan_order(kind, index, height=height, width=width, generator=generator) for index in indices]
    if options.over is not None and options.png is None:
        raise UserError("--over draws over a picture: say with --png into which file")
    if options.png:
        over = None if options.over is None else _read_picture(options.over)
        drawings = [draw_order(order, height, width, over=over, opacity=0.9 if over else 1.0) for order in orders]
        names = [f"{kind} {index}" for index in indices]
        yield save_picture(drawings[0] if len(drawings) == 1 else labelled_sheet(drawings, names), options.png)
        lines = [["order", "jumps", "continuity", "longest step", "neighbours"]]
        for name, order in zip(names, orders, strict=True):
            measures = (f"{continuity(order, width):.2f}", f"{longest_step(order, width)}")
            apart = f"{neighbour_distance(order, width):.1f} apart"
            lines.append([name, str(count_jumps(order, width)), *measures, apart])
        yield from format_table(lines, left=1).splitlines()
        return
    digits = len(str(height * width - 1))
    for index, order in zip(indices, orders, strict=True):
        yield f"{kind} {index} on {height} x {width} tokens: the step at which each is read"
        for row in inverse_order(order).view(height, width).tolist():
            yield "  " + " ".join(f"{step:{digits}d}" for step in row)
        yield f"order: {' '.join(map(str, order.tolist()))}"
        yield f"jumps: {count_jumps(order, width)}"
        yield f"continuity: {continuity(order, width):.2f}"


def _read_picture(path: Path) -> Image.Image:
    from .training.picture_files import PictureError, read_picture

    try:
        return read_picture(path, str(path))  # upright, and on white
    except PictureError as error:
        raise UserError(f"give --over a picture: {path} cannot be read as one ({error.reason})") from error


def doctor_command(options: argparse.Namespace) -> Iterator[str]:
    """Versions, devices, backends, shipped models."""
    from .diagnosis import environment_lines

    yield from environment_lines()
