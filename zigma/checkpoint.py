"""Model files: one .safetensors that carries the denoiser and whatever belongs to it; and whatever else is published.

    ZigMa's weights      the published keys, bare
    token orders         "token_orders.<k>", int32 (l,); which layer uses which stands in "zigma.token_orders"
    text encoder         "text_encoder.*"
    autoencoder          "vae.*", TAESD layout

Metadata, JSON strings: "zigma.config", "zigma.latent", "zigma.condition", "zigma.text_encoder", "zigma.token_orders",
and free ones such as "zigma.sampling" (the settings the file recommends).

Files without that metadata are read too, .safetensors and .pt: their architecture follows from the shapes and from the
arguments that a published .pt states (published.py), and what neither tells is asked for. No pickle is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .autoencoder import Autoencoder, autoencoder_from_state_dict
from .conditions import ConditionFacts
from .config import ZigMaConfig
from .foreign_files import ForeignFile, ForeignFileError, recognise, recognise_bytes
from .host_files import DESCRIPTION, from_host_layout
from .latent_format import LatentFormat
from .mixer import FLOAT32_PARAMETERS, at_least_float32
from .model import ZigMa
from .model_file import ORDERS_PREFIX, TEXT_PREFIX, VAE_PREFIX, write_checkpoint
from .published import SD_LATENT_SCALE, UntoldError, derive_config, read_torch_checkpoint, strip_prefixes
from .text import TextEncoderConfig, WordTextEncoder

__all__ = [
    "Bundle",
    "CheckpointError",
    "CheckpointFile",
    "LatentFormat",
    "load_bundle",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Written by `save_checkpoint` from the objects themselves; a caller's metadata may not contradict them.
RESERVED = ("zigma.config", "zigma.latent", "zigma.condition", "zigma.text_encoder", "zigma.token_orders")


class CheckpointError(ValueError):
    """A file that is no usable model: its path, what is wrong, what to do."""

    def __init__(self, path: str | os.PathLike, cause: str, remedy: str) -> None:
        super().__init__(f"{path}: {cause}: {remedy}")


@dataclasses.dataclass
class Bundle:
    """A model ready for use, with what its file carries beside it."""

    model: ZigMa
    text_encoder: WordTextEncoder | None
    autoencoder: Autoencoder | None
    latent: LatentFormat
    metadata: dict[str, str]
    condition: ConditionFacts = dataclasses.field(default_factory=ConditionFacts)


@dataclasses.dataclass
class CheckpointFile:
    """What a file holds, as tensors, checked against each other; no module is built for it."""

    path: Path
    config: ZigMaConfig
    state_dict: dict[str, Tensor]
    text_state: dict[str, Tensor] | None
    text_config: TextEncoderConfig | None
    vae_state: dict[str, Tensor] | None
    latent: LatentFormat
    token_orders: list[Tensor] | None
    metadata: dict[str, str]
    condition: ConditionFacts = dataclasses.field(default_factory=ConditionFacts)


def read_checkpoint(
    path: str | os.PathLike, weights: str = "ema", token_orders: Sequence[Tensor] | None = None, **arguments: Any
) -> CheckpointFile:
    """Read and check a model file.

    Args:
        path: .safetensors; or .pt, .pth, .ckpt, .bin as torch.save wrote it, of which nothing is executed.
        weights: "ema" or "model", for files that hold both; one without that choice means both.
        token_orders: of a file whose own are not in it (published random ones).
        arguments: of the published constructor, for files that do not describe their model: what neither their shapes
            nor their stated arguments tell (scan_type, img_dim, video_frames), and legacy_permutation or
            corrected_time_order.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or its parts do not fit each other.
        ValueError: for other `weights`.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"got weights={weights!r}, expected 'ema' or 'model'")
    path = Path(path)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise CheckpointError(path, what, "expected the path of a ZigMa model file")
    if path.suffix.lower() in TORCH_SUFFIXES:
        return _foreign_file(path, *_read_torch(path, weights), token_orders, arguments)
    tensors, metadata = _read_tensors(path)
    if "zigma.config" not in metadata and DESCRIPTION not in tensors:
        return _foreign_file(path, tensors, {}, metadata, token_orders, arguments)
    if arguments or token_orders is not None:
        raise CheckpointError(
            path, f"it describes its model itself, but {', '.join(arguments) or 'token_orders'} was given too",
            "leave that out; token_orders can be given to each call of the model",
        )  # fmt: skip
    try:
        if DESCRIPTION in tensors:
            tensors, metadata = from_host_layout(tensors, metadata)
        config = ZigMaConfig.from_json(metadata["zigma.config"])
        stated = json.loads(metadata.get("zigma.latent", "null"))
        latent = LatentFormat(**stated) if stated else LatentFormat(channels=config.in_channels)
        text = TextEncoderConfig.from_json(metadata["zigma.text_encoder"]) if "zigma.text_encoder" in metadata else None
        layers = json.loads(metadata.get("zigma.token_orders", "null"))
        condition = ConditionFacts.read(metadata, config, own_text_encoder=text is not None)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(path, f"its metadata is wrong ({error})", "get the file again") from error
    if latent.channels != config.in_channels:
        raise CheckpointError(
            path, f"its latent format has {latent.channels} channels and its model {config.in_channels}",
            "write the file again with the latent format of this model",
        )  # fmt: skip
    orders = _take(tensors, ORDERS_PREFIX)
    text_state, vae_state = _take(tensors, TEXT_PREFIX), _take(tensors, VAE_PREFIX)
    _check_state(path, "model", tensors, ZigMa(config, device="meta"))
    if text is not None:
        _check_state(path, "text encoder", text_state, WordTextEncoder(text, device="meta"))
    elif text_state:
        raise CheckpointError(path, "it has a text encoder, but no 'zigma.text_encoder'", "write the file again")
    return CheckpointFile(
        path, config, tensors, text_state or None, text, vae_state or None, latent,
        _layer_orders(path, config, orders, layers), metadata, condition,
    )  # fmt: skip


def _read_torch(path: Path, weights: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    try:
        tensors, stated, facts = read_torch_checkpoint(path, weights)
    except ForeignFileError as error:
        raise _other_kind(path, error.file) from error
    except (ValueError, OSError) as error:
        raise CheckpointError(
            path, f"it is refused, because {error}",
            "nothing in it was executed; get the file from its authors, as .safetensors if there is one",
        ) from error  # fmt: skip
    return tensors, stated, {f"zigma.{key}": str(value) for key, value in facts.items()}


def _foreign_file(
    path: Path, tensors: dict[str, Tensor], stated: dict[str, Any], metadata: dict[str, str],
    token_orders: Sequence[Tensor] | None, arguments: dict[str, Any],
) -> CheckpointFile:  # fmt: skip
    """A file that does not describe its model as ours do."""
    try:
        tensors = strip_prefixes(tensors)
        config = derive_config(tensors, stated, arguments)
    except UntoldError as error:
        raise CheckpointError(path, str(error), error.remedy(path)) from error
    except ValueError as error:
        raise CheckpointError(path, str(error), "choose the file of a ZigMa model") from error
    model = ZigMa(config, device="meta")
    _check_state(path, "model", tensors, model)
    if token_orders is not None:
        try:
            token_orders = ZigMa(config, token_orders, device="meta").token_orders
        except ValueError as error:
            raise CheckpointError(path, str(error), "give orders for this model") from error
    elif model.schedule.random:
        _layer_orders(path, config, {}, None)
    # The released models work on latents of the Stable Diffusion VAE; 3 channels are taken for pictures.
    latent = LatentFormat(config.in_channels, scale=SD_LATENT_SCALE if config.in_channels == 4 else 1.0,
                          downscale=1 if config.in_channels == 3 else 8)  # fmt: skip
    condition = ConditionFacts.of_a_silent_file(config, own_text_encoder=False)
    return CheckpointFile(path, config, tensors, None, None, None, latent, token_orders, metadata, condition)


def load_bundle(
    path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None,
    weights: str = "ema", token_orders: Sequence[Tensor] | None = None, **arguments: Any,
) -> Bundle:  # fmt: skip
    """The model of a file with its text encoder and autoencoder, in evaluation mode.

    Args:
        path, weights, token_orders, arguments: as in `read_checkpoint`.
        device, dtype: of all parameters; None is float32, whatever the file keeps, and "keep" is what it keeps.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    file = read_checkpoint(path, weights, token_orders, **arguments)
    model = _filled(ZigMa(file.config, file.token_orders, device="meta"), file.state_dict, device, dtype)
    text = autoencoder = None
    if file.text_config is not None:
        text = _filled(WordTextEncoder(file.text_config, device="meta"), file.text_state, device, dtype)
    if file.vae_state is not None:
        try:
            autoencoder = autoencoder_from_state_dict(file.vae_state).to(device, _dtype(dtype))
        except ValueError as error:
            raise CheckpointError(path, f"its autoencoder is unusable ({error})", "get the file again") from error
        autoencoder.eval().requires_grad_(False)
    return Bundle(model, text, autoencoder, file.latent, file.metadata, file.condition)


def load_checkpoint(
    path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None,
    weights: str = "ema", token_orders: Sequence[Tensor] | None = None, **arguments: Any,
) -> ZigMa:  # fmt: skip
    """The denoiser of a model file, in evaluation mode.

    >>> model = load_checkpoint("landscape1024_0210000.pt")                              # its own args say the rest
    >>> model = load_checkpoint("weights.safetensors", scan_type="zigzagN8", img_dim=128)

    Args:
        path, weights, token_orders, arguments: as in `read_checkpoint`.
        device, dtype: as in `load_bundle`.

    Raises:
        CheckpointError: as `read_checkpoint`. ValueError: for other `weights`.
    """
    file = read_checkpoint(path, weights, token_orders, **arguments)
    return _filled(ZigMa(file.config, file.token_orders, device="meta"), file.state_dict, device, dtype)


def save_checkpoint(
    model: ZigMa, path: str | os.PathLike, metadata: Mapping[str, str] | None = None, *,
    text_encoder: WordTextEncoder | None = None, autoencoder: Autoencoder | None = None,
    latent: LatentFormat | None = None, condition: ConditionFacts | None = None, dtype: torch.dtype | None = None,
    precise: bool = True,
) -> None:  # fmt: skip
    """Write a model file; a file of that name is replaced only when the new one is complete.

    Args:
        model: with the token orders it was given, if any.
        path: ends in .safetensors.
        metadata: further strings, such as "zigma.sampling".
        text_encoder, autoencoder, latent, condition: what belongs to the model.
        dtype: of the floating-point tensors in the file; None keeps theirs.
        precise: A and D keep theirs all the same: a rounded A is another decay, at every step again.

    Raises:
        ValueError: another extension, metadata that is not strings or takes a name that the parts themselves write, a
            condition that the model cannot have.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"got the file name {path.name}, expected one that ends in .safetensors")
    given = dict(metadata or {})
    wrong = [key for key, value in given.items() if key in RESERVED or not isinstance(value, str)]
    if wrong:
        raise ValueError(
            f"got the metadata {', '.join(wrong)}, expected strings under other names than {', '.join(RESERVED)}"
        )
    latent = latent or LatentFormat(channels=model.config.in_channels)
    if condition is not None:
        condition.check(model.config)
        given["zigma.condition"] = condition.to_json()
    text_state, vae_state = (None if part is None else part.state_dict() for part in (text_encoder, autoencoder))
    file = CheckpointFile(
        path, model.config, model.state_dict(), text_state, None if text_encoder is None else text_encoder.config,
        vae_state, latent, model.token_orders, metadata={},
    )  # fmt: skip
    write_checkpoint(file, path, dtype, given, kept=FLOAT32_PARAMETERS if precise else ())


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix.lower() != ".safetensors":
        found, expected = recognise_bytes(path), f"expected .safetensors or one of {', '.join(TORCH_SUFFIXES)}"
        what, remedy = (f" and {found.what}", f"{found.remedy}; {expected}") if found else ("", expected)
        raise CheckpointError(path, f"its name ends in {path.suffix!r}{what}", remedy)
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
            if "zigma.config" not in metadata and (found := recognise(names)):
                raise _other_kind(path, found)
            return {key: file.get_tensor(key) for key in names}, metadata
    except (SafetensorError, OSError) as error:
        found = recognise_bytes(path) or ForeignFile(str(error), "get the file again")
        raise CheckpointError(path, f"it cannot be read as safetensors ({found.what})", found.remedy) from error


def _other_kind(path: Path, file: ForeignFile) -> CheckpointError:
    return CheckpointError(path, f"it seems to be {file.what} and not a ZigMa model", file.remedy)


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Move the entries of a prefix out of `tensors`, without the prefix."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _check_state(path: Path, part: str, state: Mapping[str, Tensor], module: nn.Module) -> None:
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in state.items()}
    for kind, keys in (("lacks", expected.keys() - got.keys()), ("has unknown", got.keys() - expected.keys())):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise CheckpointError(path, f"its {part} {kind} {len(keys)} tensors ({names})", "get the file again")
    for key, shape in expected.items():
        if got[key] != shape:
            raise CheckpointError(
                path, f"{key} of its {part} has shape {got[key]}, where {shape} was expected", "get the file again"
            )


def _layer_orders(
    path: Path, config: ZigMaConfig, orders: dict[str, Tensor], layers: list[int] | None
) -> list[Tensor] | None:
    if layers is None:
        if config.scan_type.startswith("random"):
            raise CheckpointError(
                path, f"its token orders are drawn at random ({config.scan_type}) and not in the file",
                "give them as token_orders, or write the file again with save_checkpoint",
            )  # fmt: skip
        return None
    named = {int(key): value.long() for key, value in orders.items() if key.isdigit()}
    try:
        missing = [k for k in layers if k not in named]
        if missing:
            raise ValueError(f"there is no {ORDERS_PREFIX}{missing[0]}")
        return ZigMa(config, [named[k] for k in layers], device="meta").token_orders
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, f"its token orders are unusable ({error})", "write the file again") from error


def _filled(module: nn.Module, state: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype | str | None):
    """A module from the meta device with these weights, ready for sampling. Empties `state`, to hold nothing twice."""
    dtype = _dtype(dtype)
    dtypes = {key: dtype for key in state}
    if dtype is not None:
        dtypes |= {key: at_least_float32(dtype) for key in state if key.rpartition(".")[2] in FLOAT32_PARAMETERS}
    module.load_state_dict({key: state.pop(key).to(device, dtypes[key]) for key in list(state)}, assign=True)
    return module.eval().requires_grad_(False)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """What `Tensor.to` takes: None leaves a tensor's own."""
    if dtype == "keep":
        return None
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"got the dtype {dtype!r}, expected one of torch's, such as torch.bfloat16, 'keep' or None")
    return dtype or torch.float32
