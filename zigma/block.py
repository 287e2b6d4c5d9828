"""One layer of the model: norm, modulation, mixer, and cross-attention to a text. Names and shapes as in model.py."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import ZigMaConfig
from .layer_scans import LayerScan
from .mixer import SSM, Attention, CrossAttention, Mamba, is_plain, read_weights
from .scratch import Scratch
from .selective_scan import Stream, add_norm, gather_rows

__all__ = ["Block", "drop_path", "like_norms"]


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
        norm = operations.RMSNorm if config.rms_norm else operations.LayerNorm
        self.norm = norm(d, eps=config.norm_epsilon, **options)
        mixer = Mamba if config.mixer == "mamba" else Attention
        self.mixer = mixer(config, operations=operations, **options)
        parts = 6 if config.conditioning == "text" else 3
        self.adaLN_modulation = nn.Sequential(nn.Identity(), operations.Linear(d, parts * d, **options))
        self.msa = None
        if config.conditioning == "text":
            self.msa = CrossAttention(d, operations=operations, **options)
        self._eps, self._layer_norm, self._linear = config.norm_epsilon, not config.rms_norm, operations.Linear
        self._read_weights = getattr(operations, "read_weights", read_weights)

    def forward(
        self, stream: Stream, c: Tensor, keys_values: tuple[Tensor, Tensor] | None, scan: LayerScan,
        ssm: SSM | None = None, scratch: Scratch | None = None,
    ) -> Stream:  # fmt: skip
        """stream of (b, l, d), c = silu(condition) (b, d), text as keys and values; returns in this layer's order."""
        shift, scale, gate, *text = self.adaLN_modulation(c).unsqueeze(1).chunk(3 if self.msa is None else 6, dim=-1)
        weight, bias = self._read_weights(self.norm, like_norms(stream.base))
        places = scratch and scratch.of_norm(stream.base, torch.float32)
        residual, u, tokens = add_norm(
            drop_path(stream, self.drop, self.training), weight, bias, eps=self._eps, layer_norm=self._layer_norm,
            modulation=(shift, scale), gather=scan.gather, total=torch.float32, places=places,
        )  # fmt: skip
        mixed = self._mix(tokens, scan, ssm, scratch)
        if self.msa is None:
            return Stream(u, mixed, gate, residual)
        shift, scale, gate_text = text
        h, _, tokens = add_norm(
            Stream(u, mixed, gate), eps=1e-6, layer_norm=True, modulation=(shift, scale), total=u.dtype,
            keep_norm=False, places=places and (u, None, tokens),
        )  # fmt: skip
        return Stream(h, self.msa(tokens, keys_values, scratch), gate_text, residual)

    def is_private(self) -> bool:
        """Whether what the layers give to each other is seen by nobody else: none of them is hooked or replaced."""
        mixer, msa = self.mixer, self.msa
        kind, first = (Mamba, "in_proj") if type(mixer) is Mamba else (Attention, "qkv")
        layers = [(self, Block), (mixer, kind), (getattr(mixer, first, mixer), self._linear)]
        if msa is not None:
            layers += [(msa, CrossAttention), (getattr(msa, "to_q", msa), self._linear)]
        return all(is_plain(layer, expected) for layer, expected in layers)

    def _mix(self, tokens: Tensor, scan: LayerScan, ssm: SSM | None, scratch: Scratch | None = None) -> Tensor:
        """The mixer along each segment of the rows, as they lie; (b, l, d) -> (b, l, d)."""
        mixed = self.mixer(rearrange(tokens, "b (s l) d -> (b s) l d", s=scan.segments), None, ssm, scratch)
        mixed = rearrange(mixed, "(b s) l d -> b (s l) d", s=scan.segments)
        return mixed if scan.store is None else gather_rows(mixed, scan.store)


def like_norms(tokens: Tensor) -> Tensor:
    """An empty tensor of the device and dtype (float32) in which norms want their weights."""
    return tokens.new_empty(0, dtype=torch.float32)


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
