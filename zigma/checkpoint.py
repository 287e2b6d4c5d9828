"""Model files: one .safetensors that carries the denoiser and whatever belongs to it.

    ZigMa's weights      the published keys, bare
    token orders         "token_orders.<k>", int32 (l,); which layer uses which stands in "zigma.token_orders"
    text encoder         "text_encoder.*"
    autoencoder          "vae.*", TAESD layout

Metadata, JSON strings: "zigma.config", "zigma.latent", "zigma.text_encoder", "zigma.token_orders", and free ones such
as "zigma.sampling" (the settings the file recommends). Nothing is unpickled here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .autoencoder import TinyAutoencoder
from .config import ZigMaConfig
from .model import ZigMa
from .scan_orders import is_order
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

TEXT_PREFIX, VAE_PREFIX, ORDERS_PREFIX = "text_encoder.", "vae.", "token_orders."
# Written by `save_checkpoint` from the objects themselves; a caller's metadata may not contradict them.
RESERVED = ("zigma.config", "zigma.latent", "zigma.text_encoder", "zigma.token_orders")


class CheckpointError(ValueError):
    """A file that is no usable model: its path, what is wrong, what to do."""

    def __init__(self, path: str | os.PathLike, cause: str, remedy: str) -> None:
        super().__init__(f"{path}: {cause}: {remedy}")


@dataclasses.dataclass(frozen=True)
class LatentFormat:
    """What the denoiser's input is: latent of the model = (latent of the VAE - shift) * scale.

    Attributes:
        channels: of the latent; 3 in pixel space.
        downscale: sides of the picture / sides of the latent; 1 is pixel space.
        scale, shift: one number, or one for each channel.
        rgb_factors, rgb_bias: RGB in [-1, 1] ~ latent of the model @ factors (channels x 3) + bias, for previews.
    """

    channels: int
    downscale: int = 8
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0
    rgb_factors: tuple[tuple[float, ...], ...] | None = None
    rgb_bias: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "shift", "rgb_bias"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
                expected = 3 if name == "rgb_bias" else self.channels
                if len(value) != expected:
                    raise ValueError(f"the latent format's {name} has {len(value)} numbers, expected {expected}")
        if self.rgb_factors is not None:
            object.__setattr__(self, "rgb_factors", tuple(tuple(row) for row in self.rgb_factors))
            if len(self.rgb_factors) != self.channels or any(len(row) != 3 for row in self.rgb_factors):
                raise ValueError(f"the latent format's rgb_factors have to be {self.channels} rows of 3 numbers")

    @property
    def pixel_space(self) -> bool:
        """Whether the model works on pictures themselves, in [-1, 1]."""
        return self.downscale == 1

    def _per_channel(self, value: float | tuple[float, ...], like: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)

    def to_model(self, latents: Tensor) -> Tensor:
        """Latents of the VAE (b, c, h, w) -> latents of the model."""
        return (latents - self._per_channel(self.shift, latents)) * self._per_channel(self.scale, latents)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Latents of the model (b, c, h, w) -> latents of the VAE."""
        return latents / self._per_channel(self.scale, latents) + self._per_channel(self.shift, latents)


@dataclasses.dataclass
class Bundle:
    """A model ready for use, with what its file carries beside it."""

    model: ZigMa
    text_encoder: WordTextEncoder | None
    autoencoder: TinyAutoencoder | None
    latent: LatentFormat
    metadata: dict[str, str]


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


def read_checkpoint(path: str | os.PathLike) -> CheckpointFile:
    """Read and check a model file.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or its parts do not fit each other.
    """
    path = Path(path)
    tensors, metadata = _read_tensors(path)
    if "zigma.config" not in metadata:
        raise CheckpointError(
            path, f"its metadata has no 'zigma.config' beside {len(tensors)} tensors",
            "expected a ZigMa model that save_checkpoint wrote",
        )  # fmt: skip
    try:
        config = ZigMaConfig.from_json(metadata["zigma.config"])
        stated = json.loads(metadata.get("zigma.latent", "null"))
        latent = LatentFormat(**stated) if stated else LatentFormat(channels=config.in_channels)
        text = TextEncoderConfig.from_json(metadata["zigma.text_encoder"]) if "zigma.text_encoder" in metadata else None
        layers = json.loads(metadata.get("zigma.token_orders", "null"))
    except (ValueError, TypeError) as error:
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
        _layer_orders(path, config, orders, layers), metadata,
    )  # fmt: skip


def load_bundle(
    path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Bundle:
    """The model of a file with its text encoder and autoencoder, in evaluation mode.

    Args:
        path: a model file.
        device, dtype: of all parameters; None widens what the file keeps in half precision to float32.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    file = read_checkpoint(path)
    model = _filled(ZigMa(file.config, file.token_orders, device="meta"), file.state_dict, device, dtype)
    text = autoencoder = None
    if file.text_config is not None:
        text = _filled(WordTextEncoder(file.text_config, device="meta"), file.text_state, device, dtype)
    if file.vae_state is not None:
        try:
            autoencoder = TinyAutoencoder.from_state_dict(file.vae_state).to(device, dtype or torch.float32)
        except ValueError as error:
            raise CheckpointError(path, f"its autoencoder is unusable ({error})", "get the file again") from error
        autoencoder.eval().requires_grad_(False)
    return Bundle(model, text, autoencoder, file.latent, file.metadata)


def load_checkpoint(
    path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, weights: str = "ema"
) -> ZigMa:
    """The denoiser of a model file, in evaluation mode.

    Args:
        path, device, dtype: as in `load_bundle`.
        weights: "ema" or "model", for files that hold both; a .safetensors holds one set, which both mean.

    Raises:
        CheckpointError: as `read_checkpoint`. ValueError: for other `weights`.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"got weights={weights!r}, expected 'ema' or 'model'")
    file = read_checkpoint(path)
    return _filled(ZigMa(file.config, file.token_orders, device="meta"), file.state_dict, device, dtype)


def save_checkpoint(
    model: ZigMa, path: str | os.PathLike, metadata: Mapping[str, str] | None = None, *,
    text_encoder: WordTextEncoder | None = None, autoencoder: TinyAutoencoder | None = None,
    latent: LatentFormat | None = None, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write a model file; a file of that name is replaced only when the new one is complete.

    Args:
        model: with the token orders it was given, if any.
        path: ends in .safetensors.
        metadata: further strings, such as "zigma.sampling".
        text_encoder, autoencoder, latent: what belongs to the model.
        dtype: of the floating-point tensors in the file; None keeps theirs.

    Raises:
        ValueError: another extension, metadata that is not strings or takes a name that the parts themselves write.
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
    tensors = dict(model.state_dict())
    given["zigma.config"] = model.config.to_json()
    given["zigma.latent"] = json.dumps(dataclasses.asdict(latent))
    if text_encoder is not None:
        tensors |= {TEXT_PREFIX + key: value for key, value in text_encoder.state_dict().items()}
        given["zigma.text_encoder"] = text_encoder.config.to_json()
    if autoencoder is not None:
        tensors |= {VAE_PREFIX + key: value for key, value in autoencoder.state_dict().items()}
    if dtype is not None:
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    if model.token_orders is not None:
        distinct = list({tuple(order.tolist()): None for order in model.token_orders})
        given["zigma.token_orders"] = json.dumps([distinct.index(tuple(o.tolist())) for o in model.token_orders])
        tensors |= {f"{ORDERS_PREFIX}{k}": torch.tensor(o, dtype=torch.int32) for k, o in enumerate(distinct)}
    # Copies, for safetensors refuses tensors that share memory.
    _write_atomically({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, path, given)


def _write_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's own mode lets nobody else read the file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise CheckpointError(path, what, "expected the path of a ZigMa model file")
    if path.suffix != ".safetensors":
        raise CheckpointError(path, f"its name ends in {path.suffix!r}", "expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"it cannot be read as safetensors ({error})", "get the file again") from error


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
    length = config.grid[0] * config.grid[1]
    named = {int(key): value.long() for key, value in orders.items() if key.isdigit()}
    if len(layers) != config.depth or not all(k in named and is_order(named[k], length) for k in layers):
        raise CheckpointError(
            path, f"its token orders are not {config.depth} permutations of {length} tokens", "write the file again"
        )
    return [named[k] for k in layers]


def _filled(module: nn.Module, state: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype | None):
    """A module from the meta device with these weights, ready for sampling."""
    dtype = dtype or torch.float32
    module.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    return module.eval().requires_grad_(False)
