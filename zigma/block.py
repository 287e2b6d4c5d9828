"""One layer of the model: norm, modulation, mixer, and cross-attention to a text. Names and shapes as in model.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import ZigMaConfig
from .layer_scans import LayerScan
from .mixer import SSM, Attention, CrossAttention, Mamba, at_least_float32, is_plain, read_weights
from .scratch import Scratch
from .selective_scan import Stream, add_norm, gather_rows

__all__ = ["Block", "Norms", "drop_path", "is_private"]


class Block(nn.Module):
    """One layer: normalise, modulate by the condition, mix in this layer's order; then cross-attend to the text.

    With the stream h and the residual r (as published; there is no MLP):

        r <- r + h,    u = norm(r),    h = u + gate * mixer(u (1 + scale) + shift)

    The inner skip adds the *normalised* tokens, and the residual r (float32) sums what the norms see. The sums are left
    to the norm that reads them next.
    """

    def __init__(self, config: ZigMaConfig, index: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        d, options = config.embed_dim, {"device": device, "dtype": dtype}
        # Layer 0 has nothing to drop; layers 1 ... depth-1 the steps before it of a ramp to the rate (published).
        self.drop = config.drop_path_rate * max(index - 1, 0) / max(config.depth - 1, 1)
        self._norms, self._linear = Norms.of(config, operations), operations.Linear
        self.norm = self._norms.kind(d, eps=config.norm_epsilon, **options)
        mixer = Mamba if config.mixer == "mamba" else Attention
        self.mixer = mixer(config, operations=operations, **options)
        parts = 6 if config.conditioning == "text" else 3
        self.adaLN_modulation = nn.Sequential(nn.Identity(), operations.Linear(d, parts * d, **options))
        self.msa = None
        if config.conditioning == "text":
            self.msa = CrossAttention(d, operations=operations, **options)

    def forward(
        self, stream: Stream, c: Tensor, keys_values: tuple[Tensor, Tensor] | None, scan: LayerScan,
        ssm: SSM | None = None, scratch: Scratch | None = None,
    ) -> Stream:  # fmt: skip
        """stream of (b, l, d), c = silu(condition) (b, d), text as keys and values; returns in this layer's order."""
        shift, scale, gate, *text = self.adaLN_modulation(c).unsqueeze(1).chunk(3 if self.msa is None else 6, dim=-1)
        total = at_least_float32(stream.base.dtype)
        places = scratch and scratch.of_norm(stream.base, total)
        residual, u, tokens = self._norms(
            self.norm, drop_path(stream, self.drop, self.training), total=total, modulation=(shift, scale),
            gather=scan.gather, places=places,
        )  # fmt: skip
        mixed = self._mix(tokens, scan, ssm, scratch)
        if self.msa is None:
            return Stream(u, mixed, gate, residual)
        shift, scale, gate_text = text
        h, _, tokens = add_norm(
            Stream(u, mixed, gate), eps=1e-6, layer_norm=True, modulation=(shift, scale), total=u.dtype,
            keep_norm=False, places=places and (places[1], None, places[2]),  # of u and tokens, if they lie there
        )  # fmt: skip
        return Stream(h, self.msa(tokens, keys_values, scratch), gate_text, residual)

    def _mix(self, tokens: Tensor, scan: LayerScan, ssm: SSM | None, scratch: Scratch | None = None) -> Tensor:
        """The mixer along each segment of the rows, as they lie; (b, l, d) -> (b, l, d)."""
        mixed = self.mixer(rearrange(tokens, "b (s l) d -> (b s) l d", s=scan.segments), None, ssm, scratch)
        mixed = rearrange(mixed, "(b s) l d -> b (s l) d", s=scan.segments)
        return mixed if scan.store is None else gather_rows(mixed, scan.store)


# The layer of each that is given the tokens.
ENTRANCES = {Mamba: "in_proj", Attention: "qkv", CrossAttention: "to_q"}


def is_private(block: nn.Module) -> bool:
    """Whether what a block is given and gives is seen by its own layers alone: none of them is hooked or replaced."""
    if not is_plain(block, Block):
        return False
    mixers = [mixer for mixer in (block.mixer, block.msa) if mixer is not None]
    return all(
        type(mixer) in ENTRANCES
        and is_plain(mixer, type(mixer))
        and is_plain(getattr(mixer, ENTRANCES[type(mixer)]), block._linear)
        for mixer in mixers
    )


@dataclass(frozen=True)
class Norms:
    """How a model's norms are made, and called together with what stands before and after them.

    Attributes:
        kind: their class, RMSNorm or LayerNorm.
        layer_norm: which of the two.
        read_weights: how their weights are read.
        eps: added to the mean square or variance.
    """

    kind: type[nn.Module]
    layer_norm: bool
    read_weights: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]]
    eps: float

    @classmethod
    def of(cls, config: ZigMaConfig, operations: Any) -> Norms:
        kind = operations.RMSNorm if config.rms_norm else operations.LayerNorm
        return cls(kind, not config.rms_norm, getattr(operations, "read_weights", read_weights), config.norm_epsilon)

    def __call__(
        self, norm: nn.Module, stream: Stream, *, total: torch.dtype | None = None,
        modulation: tuple[Tensor, Tensor] | None = None, gather: Tensor | None = None, places: tuple | None = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """`add_norm` with the weights of one of the norms; one that is hooked or replaced is called instead."""
        base, options = stream.base, {"eps": self.eps, "layer_norm": self.layer_norm, "gather": gather}
        precise = at_least_float32(base.dtype)
        if is_plain(norm, self.kind):
            weight, bias = self.read_weights(norm, base.new_empty(0, dtype=precise))
            return add_norm(stream, weight, bias, total=total, modulation=modulation, places=places, **options)
        x, _, _ = add_norm(stream, total=precise, keep_norm=False, **options)
        u = norm(x.to(base.dtype))
        shift, scale = modulation or (None, None)
        return None if total is None else x, u, None if scale is None else torch.addcmul(u + shift, u, scale)


def drop_path(stream: Stream, rate: float, training: bool) -> Stream:
    """Stochastic depth (Huang et al. 2016): of whole samples, drop what is added to the residual; scale the rest."""
    if not training or rate == 0:
        return stream
    base, mix, gate, residual = stream
    shape = (len(base), 1, 1)
    keep = ((torch.rand(shape, device=base.device) >= rate) / (1 - rate)).to(base.dtype)
    if mix is not None:
        mix = mix * keep if gate is None else mix
        gate = None if gate is None else gate * keep
    return Stream(base * keep, mix, gate, residual)
