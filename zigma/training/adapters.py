"""Adapters on a ZigMa: few new parameters beside frozen weights, in files that the usual LoRA loaders read.

An adapter hooks onto the layers that it changes and is no part of the model: its modules, names and weights stay what
they are, and `remove` leaves nothing behind. Keys in a file: "diffusion_model.<layer>." and then "lora_up.weight",
"lora_down.weight", "alpha"; of LoKr "lokr_w1", "lokr_w2" (or "lokr_w2_a", "lokr_w2_b"), "alpha".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..atomic_file import write_safetensors
from ..config import ZigMaConfig
from ..foreign_files import recognise, recognise_bytes
from ..model import ZigMa
from .adapter_layers import LAYERS, AdapterLayer
from .adapter_targets import DEFAULT_TARGETS, target_layers

__all__ = ["DEFAULT_TARGETS", "AdapterSettings", "Adapters", "add_adapters", "load_adapters", "save_adapters"]

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."  # a host's name of the denoiser
METADATA = "zigma.adapter"
# What a model computes does not depend on these: its training did.
_OF_TRAINING = (
    "drop_path_rate", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "rescale_prenorm_residual",
    "n_residuals_per_layer", "use_checkpoint",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What adapters are, and where.

    Attributes:
        kind: "lora" or "lokr" (adapter_layers.py).
        rank: columns of the thin factors.
        alpha: the change is multiplied by alpha / rank: with alpha = rank another rank needs no other learning rate.
        factor: of LoKr, a bound to the smaller part of each side; -1 is none, which gives the fewest parameters.
        dropout: share of a layer's inputs that its adapter does not see, in training only.
        targets: glob patterns on the names of linear layers, such as "blocks.*.mixer.in_proj".

    Raises:
        ValueError: for values out of their range.
    """

    kind: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    factor: int = -1
    dropout: float = 0.0
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.kind not in LAYERS:
            raise ValueError(f"got the adapter kind {self.kind!r}, expected one of {', '.join(LAYERS)}")
        if not _is_number(self.rank, int) or self.rank < 1:
            raise ValueError(f"got the adapter rank {self.rank!r}, expected a whole number from 1, such as 16")
        if not _is_number(self.alpha, (int, float)) or not 0 < self.alpha < float("inf"):
            raise ValueError(f"got the adapter alpha {self.alpha!r}, expected a number above 0, such as the rank")
        if not _is_number(self.factor, int) or (self.factor != -1 and self.factor < 1):
            raise ValueError(f"got the LoKr factor {self.factor!r}, expected a whole number from 1, or -1 for no bound")
        if not _is_number(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"got the adapter dropout {self.dropout!r}, expected a share from 0 to below 1")
        if isinstance(self.targets, str) or not all(isinstance(target, str) for target in self.targets):
            raise ValueError(f"got the targets {self.targets!r}, expected a list of patterns such as '*.in_proj'")
        object.__setattr__(self, "targets", tuple(self.targets))


class Adapters:
    """The adapters of one model, made by `add_adapters` or `load_adapters`.

    Several on one model add up; take off first what was put on last.

    Attributes:
        strength: how much of the change is added: 1 as trained, 0 is the plain model bit for bit.
        settings: what they are.
        module: what holds the parameters, for whatever moves or wraps modules (a device, DDP).
    """

    def __init__(self, model: ZigMa, settings: AdapterSettings, generator: torch.Generator | None = None) -> None:
        self.settings, self.strength = settings, 1.0
        self._model, self._layers = model, target_layers(model, settings.targets)
        with torch.inference_mode(False):  # a host's nodes run in it, and its tensors cannot be trained
            self.module = nn.ModuleList(
                LAYERS[settings.kind](layer, settings, generator) for layer in self._layers.values()
            )
        self._handles: list = []
        self._trained: list[nn.Parameter] = []

    def _attach(self) -> Adapters:
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._model.requires_grad_(False)
        for layer, adapter in zip(self._layers.values(), self.module, strict=True):
            self._handles.append(layer.register_forward_hook(self._hook(adapter)))
        return self

    def on_another(self, model: ZigMa, state: Mapping[str, Tensor]) -> Adapters:
        """Equal ones with the parameters of a `state_dict`, on another model of the same architecture."""
        others = Adapters(model, self.settings, torch.Generator())
        others.strength = self.strength
        others.load_state_dict(state)
        return others._attach()

    def _hook(self, adapter: AdapterLayer):
        def add(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if self.strength == 0:
                return output
            return output + adapter(inputs[0], self.strength, layer.training).to(output.dtype)

        return add

    @property
    def names(self) -> list[str]:
        """The layers that have one."""
        return list(self._layers)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, in an order that the model and the settings fix."""
        return list(self.module.parameters())

    def to(self, *args, **options) -> Adapters:
        """Move the parameters as `nn.Module.to` does: the model's own `to` does not reach them."""
        self.module.to(*args, **options)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters and each layer's alpha under the keys of a file; parameters share their memory."""
        state = {}
        for name, adapter in zip(self._layers, self.module, strict=True):
            state |= {f"{PREFIX}{name}.{end}": factor.detach() for end, factor in adapter.factors().items()}
            state[f"{PREFIX}{name}.alpha"] = torch.tensor(float(adapter.alpha))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave, here or of an equal model with equal settings.

        Raises:
            ValueError: for another model's, other settings', or missing or extra keys; nothing is changed then.
        """
        own = self.state_dict()
        _check_state(state, own)
        for key, value in own.items():
            if key.endswith(".alpha") and not torch.isclose(state[key].float().cpu(), value):
                raise ValueError(
                    f"got {key} = {state[key].item():g}, expected {value.item():g} as the settings have it: use the "
                    "settings that they were trained with"
                )
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])

    def remove(self) -> None:
        """Take them off: the model is what it was, its parameters as trainable as before. These here stay usable."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._handles, self._trained = [], []

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with the changes at this strength in its weights.

        They are added in float32 and rounded to the dtype of the weight once. What is not changed is the model's own.
        """
        state = self._model.state_dict()
        for name, adapter in zip(self._layers, self.module, strict=True):
            weight = state[f"{name}.weight"]
            with torch.autocast(weight.device.type, enabled=False):
                delta = self.strength * adapter.delta().to(weight.device)
                state[f"{name}.weight"] = (weight.to(delta.dtype) + delta).to(weight.dtype)
        return state


def add_adapters(model: ZigMa, settings: AdapterSettings, generator: torch.Generator | None = None) -> Adapters:
    """Freeze a model and put adapters on it that change nothing yet.

    Args:
        model: on its device already; the parameters of the adapters are made there.
        settings: which, and where.
        generator: draws their initial values; None is torch's own.

    Raises:
        ValueError: for targets that mean no layer of this model, or one that cannot have an adapter.
    """
    adapters = Adapters(model, settings, generator)
    if settings.kind == "lokr" and settings.alpha != settings.rank:
        full = [name for name, adapter in zip(adapters.names, adapters.module, strict=True) if not adapter.low_rank]
        if full:
            log.warning(
                "alpha %g has no effect on %d of %d layers, such as %s: at rank %d their LoKr factors are whole, of "
                "scale 1 by convention", settings.alpha, len(full), len(adapters.names), full[0], settings.rank,
            )  # fmt: skip
    return adapters._attach()


def save_adapters(adapters: Adapters, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file that `load_adapters`, LoRA loaders of ComfyUI and the node ZigMa LoRA Loader read.

    Args:
        adapters: at any strength, which is not in the file.
        path: ends in .safetensors; a file of that name is replaced only when the new one is complete.
        metadata: further strings.

    Raises:
        ValueError: another extension, or metadata that is not strings or takes the name "zigma.adapter".
        OSError: the disk is full, the folder is missing or not writable.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"got the file name {path.name}, expected one that ends in .safetensors")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into: make it first")
    wrong = [key for key, value in (metadata or {}).items() if key == METADATA or not isinstance(value, str)]
    if wrong:
        raise ValueError(f"got the metadata {', '.join(wrong)}, expected strings under other names than {METADATA}")
    facts = {**dataclasses.asdict(adapters.settings), "model": _digest(adapters._model.config)}
    write_safetensors(adapters.state_dict(), path, {**(metadata or {}), METADATA: json.dumps(facts)})


def load_adapters(model: ZigMa, path: str | os.PathLike) -> Adapters:
    """Put the adapters of a file on the model that they were trained for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind or damaged, or belongs to another model, which is not touched then.
    """
    path = Path(path)
    state, facts = _read(path)
    digest = facts.pop("model", None)
    known = {field.name for field in dataclasses.fields(AdapterSettings)}
    strange = sorted(facts.keys() - known)
    if strange:
        raise ValueError(f"{path}: its settings have unknown fields {', '.join(strange)}: a newer version wrote it")
    try:
        settings = AdapterSettings(**facts)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its metadata is wrong ({error}): get the file again") from error
    try:
        adapters = Adapters(model, settings, torch.Generator())
    except ValueError as error:
        raise ValueError(f"{path}: it is an adapter of another model: {error}") from error
    try:
        adapters.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if digest != _digest(model.config):
        log.warning(
            "%s fits, but was trained for a model that differs in more than its weights (such as the token orders or "
            "the size of a picture): it may do other than it did there", path,
        )  # fmt: skip
    return adapters._attach()


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of an adapter's file, and what its metadata says."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file: expected an adapter that save_adapters wrote")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if METADATA in metadata:
                return {name: file.get_tensor(name) for name in names}, dict(json.loads(metadata[METADATA]))
    except (SafetensorError, OSError) as error:
        found = recognise_bytes(path)
        raise ValueError(
            f"{path}: it cannot be read as safetensors ({found.what if found else error}): "
            f"{found.remedy if found else 'get the file again'}"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its metadata is wrong ({error}): get the file again") from error
    found = recognise(names)
    what = "a model" if "zigma.config" in metadata else found.what if found else "a file of another kind"
    raise ValueError(
        f"{path}: it seems to be {what} without the settings of an adapter ({METADATA}): expected one that "
        "save_adapters wrote; others can be used in ComfyUI, where ZigMa LoRA Loader reads them"
    )


def _check_state(got: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Say what does not fit: first whole layers, then shapes, then single keys."""
    layers, expected = (list(dict.fromkeys(_layer_of(key) for key in state)) for state in (got, own))
    strange, lacking = [name for name in layers if name not in expected], set(expected) - set(layers)
    if strange:
        raise ValueError(
            f"it is an adapter of another model or of other targets: it changes {strange[0]}"
            + f" and {len(strange) - 1} more" * (len(strange) > 1)
            + f", which is not among the {len(expected)} layers to change here, such as {expected[0]}"
        )
    if lacking:
        raise ValueError(
            f"it is an adapter of another model or of other targets: it has nothing for {min(lacking)}"
            + f" and {len(lacking) - 1} more" * (len(lacking) > 1)
            + f" of the {len(expected)} layers to change here"
        )
    for key in own:
        if key in got and got[key].shape != own[key].shape:
            raise ValueError(
                f"it is an adapter of another model or rank: {key} has the shape {tuple(got[key].shape)}, expected "
                f"{tuple(own[key].shape)} here"
            )
    missing, extra = [key for key in own if key not in got], [key for key in got if key not in own]
    if missing or extra:
        lacks = f"it lacks {missing[0]}" if missing else f"it has the unknown {extra[0]}"
        raise ValueError(f"{lacks} ({len(missing)} keys missing, {len(extra)} too many): get the file again")


def _layer_of(key: str) -> str:
    """The layer of a stock key; another kind of key as it is."""
    for end in (".lora_up.weight", ".lora_down.weight", ".lokr_w1", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".alpha"):
        if key.startswith(PREFIX) and key.endswith(end):
            return key.removeprefix(PREFIX).removesuffix(end)
    return key


def _digest(config: ZigMaConfig) -> str:
    """SHA-256 of what a configuration says about the architecture."""
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key not in _OF_TRAINING}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _is_number(value, kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
