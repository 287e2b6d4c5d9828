"""The Mamba mixer that reads its tokens in any order, and the cross-attention beside it.

Glossary: b batch, l tokens, d width of a token (embed_dim), e width inside the mixer (expand * d), n states per
channel, r rank of the step size (dt_rank), m text tokens.

Mamba: Gu and Dao 2023, arXiv 2312.00752, section 3.4. The permutation of the tokens: ZigMa, arXiv 2403.13802,
equation 2. Everything keeps the layout (b, l, d): what a matrix product writes, the scan reads without a transpose.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import ZigMaConfig
from .scratch import Scratch
from .selective_scan import gather_rows, ordered_conv1d_silu, selective_scan_gathered

__all__ = [
    "FLOAT32_PARAMETERS",
    "SSM",
    "Attention",
    "CrossAttention",
    "Mamba",
    "at_least_float32",
    "is_plain",
    "may_share",
    "read_weights",
]


def read_weights(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer whose own forward is bypassed by a kernel.

    A host that casts, patches or offloads weights inside its layers puts its accessor in place of this one, as the
    attribute `read_weights` of the `operations` it passes; `like` is a tensor of the device and dtype of the use.
    """
    return layer.weight, getattr(layer, "bias", None)  # norms may have none


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer does what its kind says: it was not replaced, hooked, or given another forward.

    Only then may its weights be read in place of the call. Adapters do all three; and whoever takes them off may leave
    the layer's own forward as an attribute of it.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks or _hooks_of_all_modules()
    given = vars(layer).get("forward")
    return type(layer) is kind and not hooked and (given is None or given == kind.forward.__get__(layer))


_hooks_of_all_modules = getattr(nn.modules.module, "_has_any_global_hook", lambda: False)


def may_share(scratch: Scratch | None, kind: type[nn.Module], *layers: nn.Module) -> bool:
    """Whether these layers' results may lie in scratch memory, which ends what was there: nobody else has seen it.

    A hook may keep what it is shown, and so may an adapter. A compiler may take a part of a model alone.
    """
    if scratch is None or torch.compiler.is_compiling():
        return False
    return all(is_plain(layer, kind) for layer in layers)


# Of an SSM, by the last part of their keys.
FLOAT32_PARAMETERS = ("A_log", "A_b_log", "D", "D_b")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself if it has the bits of float32, else float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


class SSM(nn.Module):
    """The selective state-space part of a mixer: causal convolution, step sizes and B, C from the input, scan, gate.

    A bidirectional one has everything twice; the second direction reads the order backwards, and the two outputs add
    up. Its names end in _b, as published.

    Args:
        config: the sizes.
        operations, device, dtype: where the layers come from, and of the parameters.
    """

    def __init__(self, config: ZigMaConfig, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        e, rank, n, width = config.d_inner, config.dt_rank, config.d_state, config.d_conv
        self.splits = [rank, n, n]
        self.bidirectional = config.scan_type == "v2"
        for suffix in ("", "_b") if self.bidirectional else ("",):
            # Depthwise; only its weights are used. A causal convolution pads on the left, which Conv1d cannot say.
            conv = operations.Conv1d(e, e, width, groups=e, padding=width - 1, bias=config.conv_bias, **options)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", operations.Linear(e, rank + 2 * n, bias=False, **options))
            self.add_module(f"dt_proj{suffix}", operations.Linear(rank, e, **options))
            # At least float32 whatever the other weights are: a rounded A is another decay, at every step again.
            precise = {"device": device, "dtype": at_least_float32(dtype or torch.get_default_dtype())}
            self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.empty(e, n, **precise)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.empty(e, **precise)))
        self._read_weights = getattr(operations, "read_weights", read_weights)
        self._linear, self._conv = operations.Linear, operations.Conv1d

    def _apply(self, fn, recurse: bool = True):
        """As of any module (`.to`, `.half`, `.cuda`, ...), but A and D stay float32 where the others get fewer bits."""
        names = [name for name in self._parameters if name in FLOAT32_PARAMETERS]
        before = {name: self._parameters[name].detach() for name in names}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = self._parameters[name]
            if parameter.dtype != at_least_float32(parameter.dtype):
                parameter.data = value.to(parameter.device, at_least_float32(parameter.dtype))
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(parameter.dtype)
        return self

    def scan(self, x: Tensor, z: Tensor, order: Tensor | None = None, scratch: Scratch | None = None) -> Tensor:
        """x, z (b, l, e) in raster order -> y * silu(z) (b, l, e) in raster order; None reads them as they lie.

        scratch: memory to use, also for the result. The memory of x and z is used then too.
        """
        if self.bidirectional:  # the second direction reads x and z again, and adds to the result of the first
            scratch = None
        y = self._scan(x, z, order, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, scratch)
        if self.bidirectional:
            backwards = torch.arange(x.shape[1] - 1, -1, -1, device=x.device) if order is None else order.flip(0)
            y = y + self._scan(
                x, z, backwards, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b
            )  # fmt: skip
        return y

    def _scan(self, x, z, order, conv1d, x_proj, dt_proj, A_log, D, scratch=None) -> Tensor:
        used = scratch is not None
        # From here on in scan order; z waits in raster order. Rows that move cannot take the place of x: then the
        # step sizes do, and the result that of z.
        u = self._convolve(conv1d, x, order, overwrite_x=used)
        dt, B, C = x_proj(u).split(self.splits, dim=-1)
        place = "step sizes" if order is None else x
        delta, delta_bias = self._step_sizes(dt_proj, dt, scratch, place)  # softplus follows inside the scan
        precise = at_least_float32(u.dtype)
        A, D = -torch.exp(A_log.to(u.device, precise)), D.to(u.device, precise)
        unseen = delta_bias is not None  # no layer was called for them, and no hook
        return selective_scan_gathered(
            u, delta, A, B, C, D, z, delta_bias, order=order, overwrite_delta=unseen, overwrite_z=used
        )  # fmt: skip

    def _convolve(self, conv1d: nn.Module, x: Tensor, order: Tensor | None, overwrite_x: bool) -> Tensor:
        """x (b, l, e) in raster order -> SiLU of the causal convolution along the order, (b, l, e) in scan order."""
        if is_plain(conv1d, self._conv):
            weight, bias = self._read_weights(conv1d, x)
            return ordered_conv1d_silu(x, weight, bias, order, overwrite_x=overwrite_x)
        rows = x if order is None else gather_rows(x, order)
        # The layer pads on both sides, so that its first l results are the causal ones.
        return F.silu(conv1d(rows.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))

    def _step_sizes(
        self, dt_proj: nn.Module, dt: Tensor, scratch: Scratch | None, place: Tensor | str
    ) -> tuple[Tensor, Tensor | None]:
        """dt (b, l, r) -> step sizes (b, l, e) before softplus, and their bias (e,) if the scan is to add it.

        On a CPU torch writes the bias to all rows before the product: a pass over memory, where the scan adds it for
        nothing.
        """
        if dt.device.type == "cpu" and is_plain(dt_proj, self._linear):
            weight, bias = self._read_weights(dt_proj, dt)
            bias = bias.to(at_least_float32(bias.dtype))
            if scratch is not None:
                return scratch.linear(dt, weight, place=place), bias
            rows = F.linear(dt.flatten(0, 1), weight)  # of three dimensions torch makes one product or several
            return rows.unflatten(0, dt.shape[:2]), bias
        return dt_proj(dt.contiguous()), None  # contiguous, so that torch adds the bias within the product

    @torch.no_grad()
    def reset_ssm(self, config: ZigMaConfig) -> None:
        """Mamba's initial values: step sizes log-uniform from dt_min to dt_max, A = -(1 ... n), D = 1.

        The step sizes of a backward direction start as torch's own weights with bias 0, as published.
        """
        bound = config.dt_scale * config.dt_rank**-0.5
        if config.dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        steps = torch.rand(self.dt_proj.bias.shape, device=self.dt_proj.bias.device)
        steps = torch.exp(low + steps * (high - low)).clamp(min=config.dt_init_floor)
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus(bias) = steps
        if self.bidirectional:
            nn.init.zeros_(self.dt_proj_b.bias)
        directions = [(self.A_log, self.D)]
        if self.bidirectional:
            directions.append((self.A_b_log, self.D_b))
        for A_log, D in directions:
            A_log.copy_(torch.arange(1, A_log.shape[1] + 1, device=A_log.device).log().expand_as(A_log))
            D.fill_(1)


class Mamba(SSM):
    """Selective state-space layer over the tokens in a given order; (b, l, d) -> (b, l, d), both in raster order.

    Args:
        config: the sizes; with share_ssm the layer has only its projections, and is given the SSM to use.
        operations, device, dtype: where the layers come from, and of the parameters.
    """

    def __init__(self, config: ZigMaConfig, *, operations=nn, device=None, dtype=None) -> None:
        options = {"device": device, "dtype": dtype}
        if config.share_ssm:
            nn.Module.__init__(self)
        else:
            super().__init__(config, operations=operations, **options)
        d, e = config.embed_dim, config.d_inner
        self._linear, self._read_weights = operations.Linear, getattr(operations, "read_weights", read_weights)
        self.in_proj = operations.Linear(d, 2 * e, bias=config.bias, **options)
        self.out_proj = operations.Linear(e, d, bias=config.bias, **options)

    def forward(
        self, tokens: Tensor, order: Tensor | None = None, ssm: SSM | None = None, scratch: Scratch | None = None
    ) -> Tensor:
        """tokens (b, l, d) in raster order, order (l,): order[k] is the token read at step k; ssm: the shared one.

        Without an order the tokens are read as they lie: the model brings them in scan order (layer_scans.py).
        scratch: what the model's layers share.
        """
        ssm, scratch = ssm or self, scratch or Scratch.for_inference(tokens)
        if not may_share(scratch, self._linear, self.in_proj, ssm.x_proj, self.out_proj):
            x, z = self.in_proj(tokens).chunk(2, dim=-1)
            return self.out_proj(ssm.scan(x, z, order))
        x, z = scratch.linear(tokens, *self._read_weights(self.in_proj, tokens), place="x and z").chunk(2, dim=-1)
        y = ssm.scan(x, z, order, scratch)
        return scratch.linear(y, *self._read_weights(self.out_proj, y), place=scratch.between("mixed"))

    @torch.no_grad()
    def reset_parameters(self, config: ZigMaConfig) -> None:
        """Mamba's initial values, the output divided by the square root of the number of residual additions."""
        if not config.share_ssm:
            self.reset_ssm(config)
        if config.rescale_prenorm_residual:
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
            self.out_proj.weight.div_(math.sqrt(config.n_residuals_per_layer * config.depth))


class Attention(nn.Module):
    """Self-attention in the mixer's place (DiT, arXiv 2212.09748, without its MLP); (b, l, d) -> (b, l, d).

    The baseline for comparisons: it sees every token at once, so that an order means nothing to it. Heads are as wide
    as the largest divisor of d up to 64.
    """

    def __init__(self, config: ZigMaConfig, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        d, options = config.embed_dim, {"device": device, "dtype": dtype}
        self.heads = d // max(width for width in range(1, min(d, 64) + 1) if d % width == 0)
        self.qkv = operations.Linear(d, 3 * d, **options)
        self.proj = operations.Linear(d, d, **options)

    def forward(
        self, tokens: Tensor, order: Tensor | None = None, ssm: SSM | None = None, scratch: Scratch | None = None
    ) -> Tensor:
        """tokens (b, l, d); what other mixers need is not looked at."""
        q, k, v = rearrange(self.qkv(tokens), "b l (three h c) -> three b h l c", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l c -> b l (h c)"))

    @torch.no_grad()
    def reset_parameters(self, config: ZigMaConfig) -> None:
        """Nothing beside what torch does, and the model's zero biases."""


class CrossAttention(nn.Module):
    """Tokens of the picture ask tokens of the text; (b, l, d), (b, m, d) -> (b, l, d). No mask, no dropout.

    Eight heads of 64 channels whatever the width, as published.
    """

    HEADS = 8
    HEAD_DIM = 64

    def __init__(self, embed_dim: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        inner, options = self.HEADS * self.HEAD_DIM, {"device": device, "dtype": dtype}
        self._linear, self._read_weights = operations.Linear, getattr(operations, "read_weights", read_weights)
        self.to_q = operations.Linear(embed_dim, inner, bias=False, **options)
        self.to_k = operations.Linear(embed_dim, inner, bias=False, **options)
        self.to_v = operations.Linear(embed_dim, inner, bias=False, **options)
        # A list, for the published key is to_out.0 (beside a dropout without weights).
        self.to_out = nn.ModuleList([operations.Linear(inner, embed_dim, **options)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (b, m, d) -> keys and values (b, heads, m, c): the same at every step of a sampling run."""
        k, v = (rearrange(p(context), "b m (h c) -> b h m c", h=self.HEADS) for p in (self.to_k, self.to_v))
        return k, v

    def forward(self, tokens: Tensor, keys_values: tuple[Tensor, Tensor], scratch: Scratch | None = None) -> Tensor:
        """tokens (b, l, d) -> (b, l, d)."""
        q, (k, v) = self._project(self.to_q, tokens, scratch, "queries"), keys_values
        q = rearrange(q, "b l (h c) -> b h l c", h=self.HEADS)
        if torch.is_grad_enabled() and q.device.type == "cpu":
            # The fused attention's backward on a CPU took a third of a training step at 64 tokens.
            mixed = torch.softmax(q @ k.transpose(-1, -2) * self.HEAD_DIM**-0.5, dim=-1).to(v.dtype) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        place = scratch and scratch.between("attended")
        return self._project(self.to_out[0], rearrange(mixed, "b h l c -> b l (h c)"), scratch, place)

    def _project(self, layer: nn.Module, x: Tensor, scratch: Scratch | None, place: str | None = None) -> Tensor:
        if not may_share(scratch, self._linear, layer):
            return layer(x)
        return scratch.linear(x, *self._read_weights(layer, x), place=place)
