"""What a ZigMa is: one frozen dataclass, from which the whole architecture follows.

The argument names are those of the published implementation (arXiv 2403.13802), so that its configurations can be
read as they are; device and dtype are not among them, for they are no part of an architecture.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

__all__ = ["PRESETS", "ZigMaConfig"]

# name -> (embed_dim, depth): the published sizes. "B/2" is B with patch_size 2.
PRESETS = {"S": (368, 24), "B": (768, 24), "M": (768, 48), "L": (1024, 48), "H": (1536, 48)}

# Arguments of the published constructor that say nothing about the architecture: kernels, devices, logging.
_PUBLISHED_BUT_MEANINGLESS = {
    "device", "dtype", "fused_add_norm", "use_jit", "m_init", "residual_in_fp32", "initializer_cfg",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ZigMaConfig:
    """The architecture of one ZigMa.

    Attributes:
        in_channels: channels of the latent; the velocity has as many.
        embed_dim: width of a token (D).
        depth: number of blocks.
        img_dim: sides of the latent the model was made for, (height, width); an int means a square.
        patch_size: side of a patch, in latent pixels.
        scan_type: which token orders the layers read in: "zigzagN1" ... "zigzagN8" (layer i uses zigzag i mod N).
            Orders given to the model itself stand above it.
        use_pe: position embedding: 0 none, 2 learned (zeros at the start).
        has_text: text conditioning by cross-attention; y is (b, n, d_context) and stands above num_classes.
        d_context: width of the text features.
        n_context_token: how many text features a picture has (a fact about the data; no parameter depends on it).
        num_classes: > 0 for class conditioning; y is (b,) labels.
        rms_norm: RMSNorm before each mixer.
        norm_epsilon: epsilon of those norms.
        drop_path_rate: stochastic depth, in training only.
        d_state, d_conv, expand, dt_rank: sizes of the Mamba mixer; dt_rank None means ceil(embed_dim / 16).
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
    use_pe: int = 0
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
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        sides = (self.img_dim, self.img_dim) if isinstance(self.img_dim, int) else tuple(self.img_dim)
        object.__setattr__(self, "img_dim", sides)
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", math.ceil(self.embed_dim / 16))
        for field in ("in_channels", "embed_dim", "depth", "patch_size", "d_state", "d_conv", "expand", "dt_rank"):
            if getattr(self, field) < 1:
                raise ValueError(f"ZigMaConfig.{field} is {getattr(self, field)}, but it has to be at least 1")
        if len(sides) != 2 or min(sides) < 1 or any(side % self.patch_size for side in sides):
            raise ValueError(
                f"ZigMaConfig.img_dim is {sides}, but it has to be a height and a width divisible by the patch size "
                f"{self.patch_size}"
            )
        if self.use_pe not in (0, 2):
            raise ValueError(
                f"ZigMaConfig.use_pe is {self.use_pe}, but this version knows 0 (none) and 2 (learned embedding)"
            )
        if not self.rms_norm:
            raise ValueError("ZigMaConfig.rms_norm is False, but this version knows only RMSNorm: set it to True")
        if self.has_text and self.d_context < 1:
            raise ValueError(
                f"ZigMaConfig.d_context is {self.d_context}, but a model with has_text needs the width of its text "
                "features there (768 for CLIP ViT-L)"
            )
        if not re.fullmatch(r"zigzagN[1-8]", self.scan_type):
            raise ValueError(
                f"ZigMaConfig.scan_type is {self.scan_type!r}, but this version knows zigzagN1 ... zigzagN8; for other "
                "orders keep one of these and pass token_orders to the model"
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
        `ssm_cfg` is opened into d_state, d_conv, expand, dt_rank.

        Raises:
            ValueError: for an argument that the published model does not have, or one that this version cannot honour.
        """
        if legacy_permutation or corrected_time_order:
            raise ValueError(
                "legacy_permutation and corrected_time_order are not supported by this version: leave them False"
            )
        arguments = {key: value for key, value in arguments.items() if key not in _PUBLISHED_BUT_MEANINGLESS}
        ssm = dict(arguments.pop("ssm_cfg", None) or {})
        if ssm.get("dt_rank") == "auto":
            ssm.pop("dt_rank")
        if arguments.pop("video_frames", 0) or arguments.pop("tpe", False):
            raise ValueError("video_frames or tpe is set, but this version builds image models only: leave them unset")
        known = {field.name for field in dataclasses.fields(cls)}
        strange = sorted((set(arguments) | set(ssm)) - known)
        if strange:
            raise ValueError(f"unknown argument {', '.join(strange)}: expected {', '.join(sorted(known))}")
        return cls(**{"scan_type": "v2", **arguments, **ssm})

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
        known = {field.name for field in dataclasses.fields(cls)}
        strange = sorted(set(fields) - known)
        if strange:
            raise ValueError(f"the configuration has unknown fields {', '.join(strange)}: a newer version wrote it")
        return cls(**fields)
