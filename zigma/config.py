"""What a ZigMa is: one frozen dataclass, from which the whole architecture follows.

The argument names are those of the published implementation (arXiv 2403.13802), so that its configurations can be
read as they are; device and dtype are not among them, for they are no part of an architecture.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .scan_orders import LayerSchedule

__all__ = ["PRESETS", "ZigMaConfig", "published_arguments", "read_published_yaml"]

# name -> (embed_dim, depth): the published sizes. "B/2" is B with patch_size 2.
PRESETS = {"S": (368, 24), "B": (768, 24), "M": (768, 48), "L": (1024, 48), "H": (1536, 48)}

# Arguments of the published constructor that say nothing about the architecture: kernels, devices, logging.
_PUBLISHED_BUT_MEANINGLESS = {"device", "dtype", "fused_add_norm", "use_jit", "m_init", "residual_in_fp32"}
# What its Mamba initialisation takes; the first concerns embeddings, which a ZigMa initialises itself.
_INITIALIZER_ARGUMENTS = {"initializer_range", "rescale_prenorm_residual", "n_residuals_per_layer"}
# What a field's annotation admits. A published file may write a switch as 0 or 1.
_KINDS = {"int": Integral, "int | None": (Integral, type(None)), "float": Real, "bool": Integral, "str": str}


@dataclasses.dataclass(frozen=True)
class ZigMaConfig:
    """The architecture of one ZigMa.

    Attributes:
        in_channels: channels of the latent; the velocity has as many.
        embed_dim: width of a token (D).
        depth: number of blocks.
        img_dim: sides of the latent the model was made for, (height, width); an int means a square.
        patch_size: side of a patch, in latent pixels.
        scan_type: which token orders the layers read in, see `scan_orders.LayerSchedule`: "zigzagN8", "hilbertN8",
            "randomN8", "v2" (bidirectional), "video_sst" ...; orders given to the model itself stand above it.
        video_frames: > 0 for video; x is (b, f, c, h, w).
        use_pe: position embedding: 0 none, 1 fixed sines and cosines (images only), 2 learned (zeros at the start).
        tpe: a learned embedding of each frame, beside use_pe.
        has_text: text conditioning by cross-attention; y is (b, n, d_context) and stands above num_classes.
        d_context: width of the text features.
        n_context_token: how many text features a picture has (a fact about the data; no parameter depends on it).
        num_classes: > 0 for class conditioning; y is (b,) labels.
        rms_norm: RMSNorm before each mixer; False is LayerNorm.
        norm_epsilon: epsilon of those norms.
        drop_path_rate: stochastic depth, in training only.
        d_state, d_conv, expand, dt_rank: sizes of the Mamba mixer; dt_rank None means ceil(embed_dim / 16).
        conv_bias, bias: whether its convolution, and its projections in and out, have a bias.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: the initial step sizes, log-uniform from dt_min to dt_max and
            at least the floor; dt_init "random" or "constant" fills dt_proj.weight with dt_scale / sqrt(dt_rank).
        rescale_prenorm_residual, n_residuals_per_layer: whether out_proj starts divided by sqrt(n * depth).
        legacy_permutation: put tokens back by the order again instead of its inverse, as published code of April and
            May 2024 did; for weights trained with that.
        corrected_time_order: put frames back where they came from. Published temporal layers swap their two inverses,
            so that False, the default, writes frame f to frame T-1-f, as published video weights expect.
        mixer: "mamba", or "attention" for the baseline of a diffusion transformer in the same frame.
        share_ssm: all layers share one set of SSM parameters (convolution, x_proj, dt_proj, A and D: what the published
            bidirectional mixer has once per direction), each over its own order; in_proj and out_proj stay theirs.
        use_checkpoint: recompute each block's activations in the backward pass instead of keeping them.

    Raises:
        ValueError: for a combination that no ZigMa can have, naming the field.
    """

    in_channels: int
    embed_dim: int
    depth: int
    img_dim: tuple[int, int]
    patch_size: int = 1
    scan_type: str = "zigzagN8"
    video_frames: int = 0
    use_pe: int = 0
    tpe: bool = False
    has_text: bool = False
    d_context: int = 0
    n_context_token: int = 0
    num_classes: int = -1
    rms_norm: bool = True
    norm_epsilon: float = 1e-5
    drop_path_rate: float = 0.1
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    conv_bias: bool = True
    bias: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    rescale_prenorm_residual: bool = True
    n_residuals_per_layer: int = 1
    legacy_permutation: bool = False
    corrected_time_order: bool = False
    mixer: str = "mamba"
    share_ssm: bool = False
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        self._check_kinds()
        sides = (self.img_dim, self.img_dim) if isinstance(self.img_dim, Integral) else self.img_dim
        if not isinstance(sides, Sequence) or not all(isinstance(side, Integral) for side in sides):
            raise ValueError(f"ZigMaConfig.img_dim is {sides!r}, expected a whole number or two: height, width")
        sides = tuple(sides)
        object.__setattr__(self, "img_dim", sides)
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", math.ceil(self.embed_dim / 16))
        for field in ("in_channels", "embed_dim", "depth", "patch_size", "d_state", "d_conv", "expand", "dt_rank",
                      "n_residuals_per_layer"):
            if getattr(self, field) < 1:
                raise ValueError(f"ZigMaConfig.{field} is {getattr(self, field)}, but it has to be at least 1")
        if len(sides) != 2 or min(sides) < 1 or any(side % self.patch_size for side in sides):
            raise ValueError(
                f"ZigMaConfig.img_dim is {sides}, but it has to be a height and a width divisible by the patch size "
                f"{self.patch_size}"
            )
        if self.video_frames < 0:
            raise ValueError(f"ZigMaConfig.video_frames is {self.video_frames}, expected 0 for images or a length")
        self._check_embeddings()
        self._check_mixer()
        self._check_ranges()
        # Raises for a name that means nothing, and for video orders without frames or frames without video orders.
        LayerSchedule(self.scan_type, self.depth, video=self.video_frames > 0)
        if self.legacy_permutation and (self.video_frames or self.scan_type == "v2"):
            raise ValueError(
                f"ZigMaConfig.legacy_permutation is True with scan_type {self.scan_type!r}, but only image models "
                "whose layers are permuted were ever trained so: leave it False"
            )
        if self.has_text and self.d_context < 1:
            raise ValueError(
                f"ZigMaConfig.d_context is {self.d_context}, but a model with has_text needs the width of its text "
                "features there (768 for CLIP ViT-L)"
            )

    def _check_kinds(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), _KINDS.get(field.type, object)
            if not isinstance(value, kind) or (isinstance(value, bool) and field.type in ("int", "float")):
                raise ValueError(f"ZigMaConfig.{field.name} is {value!r}, expected {field.type}")

    def _check_embeddings(self) -> None:
        if self.use_pe == 3:
            raise ValueError(
                "ZigMaConfig.use_pe is 3, which the published code builds as a list of zeros that is neither trained "
                "nor saved, so that it equals no embedding: set it to 0"
            )
        if self.use_pe not in (0, 1, 2):
            raise ValueError(
                f"ZigMaConfig.use_pe is {self.use_pe}, expected 0 (none), 1 (sines and cosines) or 2 (learned)"
            )
        if self.use_pe == 1 and self.video_frames:
            raise ValueError("ZigMaConfig.use_pe is 1, which is made for images only: set it to 0 or 2 for video")
        if self.use_pe == 1 and self.embed_dim % 4:
            raise ValueError(
                f"ZigMaConfig.embed_dim is {self.embed_dim}, but use_pe=1 needs a width divisible by 4: a sine and a "
                "cosine for each axis"
            )
        if self.tpe and not self.video_frames:
            raise ValueError("ZigMaConfig.tpe is True, but there are no frames to embed: set video_frames")

    def _check_mixer(self) -> None:
        if self.mixer not in ("mamba", "attention"):
            raise ValueError(f"ZigMaConfig.mixer is {self.mixer!r}, expected 'mamba' or 'attention'")
        if self.mixer == "attention" and (self.share_ssm or self.scan_type == "v2"):
            raise ValueError(
                "ZigMaConfig.mixer is 'attention' with share_ssm or scan_type 'v2', which concern state-space layers: "
                "leave share_ssm False and choose another scan_type"
            )
        if self.dt_init not in ("random", "constant"):
            raise ValueError(f"ZigMaConfig.dt_init is {self.dt_init!r}, expected 'random' or 'constant'")

    def _check_ranges(self) -> None:
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"ZigMaConfig.drop_path_rate is {self.drop_path_rate}, expected a part from 0 to below 1")
        if not self.norm_epsilon > 0:
            raise ValueError(f"ZigMaConfig.norm_epsilon is {self.norm_epsilon}, but it has to be above 0")
        if not 0 < self.dt_min <= self.dt_max or not self.dt_init_floor > 0:
            raise ValueError(
                f"ZigMaConfig.dt_min, dt_max and dt_init_floor are {self.dt_min}, {self.dt_max} and "
                f"{self.dt_init_floor}, expected step sizes above 0 and dt_min at most dt_max"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of tokens."""
        return self.img_dim[0] // self.patch_size, self.img_dim[1] // self.patch_size

    @property
    def d_inner(self) -> int:
        """Channels inside the mixer (E)."""
        return self.expand * self.embed_dim

    @property
    def conditioning(self) -> str:
        """What y is: "text", "class" or "none"."""
        if self.has_text:
            return "text"
        return "class" if self.num_classes > 0 else "none"

    @classmethod
    def preset(cls, name: str, **fields: Any) -> ZigMaConfig:
        """A published size by name, "S/1" ... "H/4": embed_dim, depth and patch_size; `fields` gives the rest.

        >>> ZigMaConfig.preset("B/2", in_channels=4, img_dim=32).embed_dim
        768
        """
        match = re.fullmatch(r"([A-Z])[/_](\d+)", name)
        if match is None or match.group(1) not in PRESETS:
            raise ValueError(f"no preset is called {name!r}: expected {'/'.join(PRESETS)} and a patch size, like 'B/2'")
        width, depth = PRESETS[match.group(1)]
        return cls(**{"embed_dim": width, "depth": depth, "patch_size": int(match.group(2)), **fields})

    @classmethod
    def from_published(
        cls, *, legacy_permutation: bool = False, corrected_time_order: bool = False, **arguments: Any
    ) -> ZigMaConfig:
        """The configuration that the published constructor would build from the same arguments.

        Arguments that mean nothing to the architecture (device, dtype, kernel choices) are accepted and left out;
        `ssm_cfg` and `initializer_cfg` are opened into the fields of those names.

        Raises:
            ValueError: for an argument that the published model does not have, or one that this version cannot honour.
        """
        arguments = {key: value for key, value in arguments.items() if key not in _PUBLISHED_BUT_MEANINGLESS}
        ssm = dict(arguments.pop("ssm_cfg", None) or {})
        if ssm.get("dt_rank") == "auto":
            ssm.pop("dt_rank")
        initializer = dict(arguments.pop("initializer_cfg", None) or {})
        arguments = {"scan_type": "v2", **arguments, **ssm}
        strange = sorted(set(initializer) - _INITIALIZER_ARGUMENTS)
        initializer.pop("initializer_range", None)
        known = {field.name for field in dataclasses.fields(cls)}
        strange += sorted(set(arguments) - known)
        if strange:
            raise ValueError(f"unknown argument {', '.join(strange)}: expected {', '.join(sorted(known))}")
        return cls(
            legacy_permutation=legacy_permutation, corrected_time_order=corrected_time_order, **arguments, **initializer
        )

    @classmethod
    def from_published_yaml(cls, path: str | os.PathLike, **arguments: Any) -> ZigMaConfig:
        """The configuration of a published model file such as config/model/zigzag8_b1_pe2.yaml.

        Args:
            path: a YAML file with `params:`, at the top or under `model:`.
            arguments: stand above the file's, for what is not in it: the COCO model's has_text and d_context, or
                video_frames where the file refers to another one ("${data.video_frames}").

        Raises:
            ValueError: no such mapping in it, or an argument left as a reference; ImportError without PyYAML.
        """
        return cls.from_published(**{**read_published_yaml(path, arguments), **arguments})

    def to_json(self) -> str:
        """The configuration as one JSON object, as a file's metadata keeps it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ZigMaConfig:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: for text that is no such object, or has a field that this version does not know.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the configuration is not JSON ({error}): the file is damaged or not ours") from error
        if not isinstance(fields, dict):
            raise ValueError(f"the configuration is {text[:40]!r}, expected a JSON object: the file is not ours")
        known = {field.name for field in dataclasses.fields(cls)}
        strange = sorted(set(fields) - known)
        if strange:
            raise ValueError(f"the configuration has unknown fields {', '.join(strange)}: a newer version wrote it")
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if missing := sorted(required - set(fields)):
            raise ValueError(f"the configuration has no {', '.join(missing)}: the file is damaged or not ours")
        return cls(**fields)


def read_published_yaml(path: str | os.PathLike, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`published_arguments` of a YAML file.

    Raises:
        ValueError: as `published_arguments`, and for a file that is no YAML. ImportError without PyYAML.
    """
    import yaml

    try:
        stated = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({str(error).splitlines()[0]}): expected a published model") from error
    return published_arguments(stated, str(path), given)


def published_arguments(stated: Any, source: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The constructor arguments in a published configuration: its `params`, at the top or under `model`.

    Args:
        stated: the mapping, as YAML or a checkpoint's `args` hold it.
        source: what to call it in an error.
        given: arguments that need not be in it, because they stand above it.

    Raises:
        ValueError: there are no such params, or one refers to another file ("${data.video_frames}").
    """
    root = stated
    for inner in ("model", "params"):
        if isinstance(stated, Mapping) and isinstance(stated.get(inner), Mapping):
            stated = stated[inner]
    if not isinstance(stated, Mapping) or "embed_dim" not in stated:
        raise ValueError(f"{source} has no 'params' with an 'embed_dim': expected the configuration of a ZigMa")
    arguments = dict(stated)
    for key in given or ():
        arguments.pop(key, None)
    for key, value in arguments.items():
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if reference is not None:
            arguments[key] = _looked_up(root, reference.group(1))
        if arguments[key] is None and reference is not None:
            raise ValueError(f"{source} leaves {key} to another file ({value}): give {key} beside it")
    return arguments


def _looked_up(root: Any, name: str) -> Any:
    """The value at "a.b.c" of nested mappings, or None."""
    for part in name.split("."):
        root = root.get(part) if isinstance(root, Mapping) else None
    return root
