"""Facts about this machine and about a model, as lines of text: for the command line, and for a host's doctor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .assets import available_models
from .conditions import ConditionFacts
from .config import ZigMaConfig
from .latent_format import LatentFormat
from .selective_scan.dispatch import explain_backends, select_backend

__all__ = [
    "architecture_lines",
    "bad_tensors",
    "chosen_backend",
    "environment_lines",
    "metadata_lines",
    "size_line",
    "weights_line",
]

PACKAGES = ("torch", "einops", "numpy", "pillow", "safetensors", "tqdm")


def environment_lines() -> Iterator[str]:
    """Versions, devices, scan backends with their reasons, shipped models."""
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} is missing: pip install {package}"
    devices = ["cpu"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    devices += ["mps"] * torch.backends.mps.is_available()
    yield f"devices: {', '.join(devices)}; {torch.get_num_threads()} threads"
    yield "scan backends, fastest first:"
    yield from (f"  {name}: {state}" for name, state in explain_backends().items())
    for name, path in available_models().items():
        yield f"model {name}: {path}"


def chosen_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """Which scan backend runs for tensors like these, or why the one asked for cannot."""
    try:
        name = select_backend(None, torch.empty(0, device=device, dtype=dtype))
    except (ValueError, RuntimeError) as error:
        return f"none: {error}"
    return f"{name}: {explain_backends()[name]}"


def size_line(name: str, state: Mapping[str, Tensor] | None) -> str:
    """How large a part of a model is and what it is stored in; None is a part that is not there."""
    if not state:
        return f"{name}: none in this file"
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}))
    count, size = (sum(f(t) for t in state.values()) for f in (Tensor.numel, lambda t: t.numel() * t.element_size()))
    return f"{name}: {count:,} parameters in {len(state)} tensors, {size / 1e6:.1f} MB, {dtypes}"


def architecture_lines(
    config: ZigMaConfig, latent: LatentFormat, token_orders: Sequence[Tensor] | None, condition: ConditionFacts
) -> Iterator[str]:
    """Sizes, input, condition, token orders, and what the model works on."""
    yield f"width {config.embed_dim}, depth {config.depth}, patch size {config.patch_size}, state {config.d_state}"
    height, width = config.img_dim
    frames = f"{config.video_frames} frames of " if config.video_frames else ""
    yield f"input: {frames}{config.in_channels} x {height} x {width}, {config.grid[0]} x {config.grid[1]} tokens"
    yield f"condition: {condition.describe(config)}"
    own = "in the file, one for each layer" if token_orders is not None else config.scan_type
    switches = [name for name in ("legacy_permutation", "corrected_time_order", "share_ssm") if getattr(config, name)]
    yield f"mixer: {config.mixer}; token orders: {own}" + "".join(f", {name}" for name in switches)
    yield "works on: " + ("pixels" if latent.pixel_space else f"latents, 1/{latent.downscale} of the picture's sides")


def weights_line(metadata: Mapping[str, str]) -> str:
    """Which of a training's two sets of weights these are, as far as the file says."""
    known = {"ema": "the training's running mean (EMA)", "model": "the training's last state (raw)"}
    return "weights: " + known.get(metadata.get("zigma.weights", ""), "one set, the file does not say which")


def metadata_lines(metadata: Mapping[str, str]) -> Iterator[str]:
    """What a file says beside its tensors, each cut to a line's length."""
    for key, value in sorted(metadata.items()):
        yield f"{key} = {value if len(str(value)) <= 200 else str(value)[:197] + '...'}"


def bad_tensors(state: Mapping[str, Tensor]) -> list[str]:
    """Tensors with numbers that are none, with how many: a model with one of these draws black or noise."""
    found = []
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        tensor = tensor.float()  # 8-bit kinds do not know these questions
        nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        if nan or infinite:
            found.append(f"{key} ({nan} NaN, {infinite} infinite of {tensor.numel()})")
    return found
