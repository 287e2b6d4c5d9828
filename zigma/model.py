"""ZigMa: a diffusion transformer whose blocks are Mamba layers that read the patches in different orders.

Hu et al., "ZigMa: A DiT-style Zigzag Mamba Diffusion Model", ECCV 2024, arXiv 2403.13802. Parameter names are the keys
of the published checkpoints.

Glossary
    b batch   c channels of the latent   h, w its sides   p patch size   l = (h/p)(w/p) tokens
    d width of a token (embed_dim)       m text tokens
    x latent (b, c, h, w)   t time (b,), 0 = noise, 1 = data   y condition   v velocity (b, c, h, w)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ZigMaConfig
from .mixer import CrossAttention, Mamba, read_weights
from .scan_orders import is_order, order_schedule

__all__ = ["ZigMa"]

log = logging.getLogger(__name__)


class ZigMa(nn.Module):
    """Velocity of the flow at a latent.

    Args:
        config: the architecture.
        token_orders: `depth` LongTensors (l,), one per layer, for the grid of `config`; None takes those of
            config.scan_type, for whatever grid an input has. Saved by `save_checkpoint`, no part of the state dict.
        operations: where layers come from (torch.nn, or what a host has in its place).
        device, dtype: of the parameters. On the "meta" device nothing is initialised.

    Raises:
        ValueError: for token orders that do not fit the architecture.
    """

    def __init__(
        self, config: ZigMaConfig, token_orders: Sequence[Tensor] | None = None, *, operations=nn, device=None,
        dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        d, p, options = config.embed_dim, config.patch_size, {"device": device, "dtype": dtype}
        layers = {"operations": operations, **options}
        self.x_embedder = PatchEmbed(config.in_channels, d, p, **layers)
        self.t_embedder = TimestepEmbedder(d, **layers)
        if config.conditioning == "text":
            self.y_embedder = operations.Linear(config.d_context, d, **options)
        elif config.conditioning == "class":
            self.y_embedder = LabelEmbedder(config.num_classes, d, **layers)
        if config.use_pe:
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), d, **options))
        self.blocks = nn.ModuleList(Block(config, index, **layers) for index in range(config.depth))
        self.norm_f = operations.RMSNorm(d, eps=config.norm_epsilon, **options)
        self.final_layer = FinalLayer(d, p * p * config.in_channels, **layers)
        self._read_weights = getattr(operations, "read_weights", read_weights)
        self._schedules: dict[tuple, list[Tensor]] = {}
        self.token_orders = None
        if token_orders is not None:
            self.token_orders = self._checked_orders(token_orders, math.prod(config.grid))
        if self.norm_f.weight.device.type != "meta":
            self.reset_parameters()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, token_orders: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Velocity v(x, t | y).

        Args:
            x: latents (b, c, h, w); h and w divisible by the patch size, and not bound to config.img_dim (a learned
                position embedding is resampled to another grid).
            t: times (b,) in [0, 1].
            y: labels (b,) for a class model, text features (b, m, d_context) for a text model, else None.
            token_orders: `depth` orders for this call, in place of the model's own.

        Returns:
            (b, c, h, w), in the dtype of x.

        Raises:
            ValueError: for inputs of another shape than these.
        """
        config, p = self.config, self.config.patch_size
        self._check_inputs(x, t, y)
        h, w = x.shape[2] // p, x.shape[3] // p
        orders = self._orders((h, w), x.device, token_orders)

        tokens = self.x_embedder(x)  # (b, l, d)
        if config.use_pe:
            tokens = tokens + self._positions(h, w, tokens)
        c = self.t_embedder(t, tokens)  # (b, d)
        context = None
        if config.conditioning == "text":
            context = self.y_embedder(y.to(tokens.dtype))  # (b, m, d)
            c = c + context.mean(dim=1)
        elif config.conditioning == "class":
            c = c + self.y_embedder(y, tokens)
        c = F.silu(c)

        residual = None
        for block, order in zip(self.blocks, orders, strict=True):
            if config.use_checkpoint and torch.is_grad_enabled():
                tokens, residual = checkpoint(block, tokens, residual, c, context, order, use_reentrant=False)
            else:
                tokens, residual = block(tokens, residual, c, context, order)
        residual = residual + drop_path(tokens, config.drop_path_rate, self.training)
        weight, _ = self._read_weights(self.norm_f, residual)
        tokens = rms_norm(residual, weight, config.norm_epsilon).to(tokens.dtype)
        v = self.final_layer(tokens)
        return rearrange(v, "b (h w) (i j c) -> b c (h i) (w j)", h=h, w=w, i=p, j=p).to(x.dtype)

    def _positions(self, h: int, w: int, like: Tensor) -> Tensor:
        """Position embedding (1, h*w, d), bilinearly resampled where the grid is not the one it was trained on."""
        positions = self.pos_embed.to(like)
        if (h, w) == self.config.grid:
            return positions
        rows, columns = self.config.grid
        if (h, w, "positions") not in self._schedules:
            self._schedules[h, w, "positions"] = []
            log.warning(
                "the position embedding, trained on %d x %d tokens, is resampled to %d x %d: pictures of another size "
                "than %d x %d latent pixels may suffer", rows, columns, h, w, *self.config.img_dim,
            )  # fmt: skip
        plane = rearrange(positions, "b (h w) d -> b d h w", h=rows)
        return rearrange(F.interpolate(plane.float(), (h, w), mode="bilinear"), "b d h w -> b (h w) d").to(like)

    def _orders(self, grid: tuple[int, int], device: torch.device, given: Sequence[Tensor] | None) -> list[Tensor]:
        """The orders of this call, on its device. Kept, so that the scan checks and moves each of them once."""
        if given is not None:
            return [order.to(device) for order in self._checked_orders(given, grid[0] * grid[1])]
        if (grid, device) not in self._schedules:
            if self.token_orders is None:
                orders = order_schedule(self.config.scan_type, self.config.depth, *grid)
            else:
                orders = self._checked_orders(self.token_orders, grid[0] * grid[1])
            moved = {id(order): order.to(device) for order in orders}  # layers that share an order go on sharing it
            self._schedules[grid, device] = [moved[id(order)] for order in orders]
        return self._schedules[grid, device]

    def _checked_orders(self, orders: Sequence[Tensor], length: int) -> list[Tensor]:
        if len(orders) != self.config.depth:
            raise ValueError(
                f"got {len(orders)} token orders, but this model has {self.config.depth} layers and takes one each: "
                "repeat_orders cycles a shorter list"
            )
        for layer, order in enumerate(orders):
            if len(order) != length:
                raise ValueError(
                    f"the token order of layer {layer} has {len(order)} entries, but the input has {length} tokens: "
                    "make the orders for the grid of the input"
                )
            if not is_order(order):
                raise ValueError(f"the token order of layer {layer} is no permutation of 0 to {length - 1}")
        return list(orders)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        config, p = self.config, self.config.patch_size
        if x.dim() != 4 or x.shape[1] != config.in_channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"got latents of shape {tuple(x.shape)}, expected (batch, {config.in_channels}, height, width) with "
                f"sides divisible by the patch size {p}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"got times of shape {tuple(t.shape)}, expected one for each of {len(x)} latents")
        if config.conditioning == "text" and (
            y is None or y.dim() != 3 or len(y) != len(x) or y.shape[2] != config.d_context
        ):
            got = "none" if y is None else f"shape {tuple(y.shape)}"
            raise ValueError(
                f"got text features of {got}, expected ({len(x)}, tokens, {config.d_context}): encode the prompt with "
                "the text encoder that belongs to this model"
            )
        if config.conditioning == "class" and (y is None or y.shape != x.shape[:1] or y.is_floating_point()):
            got = "none" if y is None else f"{y.dtype} of shape {tuple(y.shape)}"
            raise ValueError(f"got labels of {got}, expected {len(x)} whole numbers from 0 to {config.num_classes - 1}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values; torch's own where they are not named here."""
        d = self.config.embed_dim
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(d, -1))
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.x_embedder.proj.bias)
        for index in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[index].weight, std=0.02)
        if self.config.conditioning == "class":
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        if self.config.use_pe:
            nn.init.zeros_(self.pos_embed)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            block.mixer.reset_parameters(self.config.depth)


class Block(nn.Module):
    """One layer: normalise, modulate by the condition, mix in this layer's order; then cross-attend to the text.

    The stream `tokens` and the residual travel side by side: the residual (float32) sums what the norms see. The inner
    skip adds the *normalised* tokens, as published; there is no MLP.
    """

    def __init__(self, config: ZigMaConfig, index: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        d, options = config.embed_dim, {"device": device, "dtype": dtype}
        # Layer 0 has nothing to drop; layers 1 ... depth-1 take a ramp from 0 to the rate (published).
        self.drop = config.drop_path_rate * max(index - 1, 0) / max(config.depth - 1, 1)
        self.norm = operations.RMSNorm(d, eps=config.norm_epsilon, **options)
        self.mixer = Mamba(
            d, config.d_state, config.d_conv, config.expand, config.dt_rank, operations=operations, **options
        )
        parts = 6 if config.conditioning == "text" else 3
        self.adaLN_modulation = nn.Sequential(nn.Identity(), operations.Linear(d, parts * d, **options))
        self.msa = None
        if config.conditioning == "text":
            self.msa = CrossAttention(d, operations=operations, **options)
        self._eps = config.norm_epsilon
        self._read_weights = getattr(operations, "read_weights", read_weights)

    def forward(
        self, tokens: Tensor, residual: Tensor | None, c: Tensor, context: Tensor | None, order: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tokens (b, l, d), residual (b, l, d) float32 or None, c = silu(condition) (b, d), context (b, m, d)."""
        tokens_in = drop_path(tokens, self.drop, self.training)
        residual = tokens_in.float() if residual is None else residual + tokens_in
        weight, _ = self._read_weights(self.norm, residual)
        u = rms_norm(residual, weight, self._eps).to(tokens.dtype)
        shift, scale, gate, *text = self.adaLN_modulation(c).unsqueeze(1).chunk(3 if self.msa is None else 6, dim=-1)
        tokens = u + gate * self.mixer(torch.addcmul(u + shift, u, scale), order)
        if self.msa is not None:
            shift, scale, gate = text
            u = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).to(tokens.dtype)
            tokens = tokens + gate * self.msa(torch.addcmul(u + shift, u, scale), context)
        return tokens, residual


class PatchEmbed(nn.Module):
    """Patches of p x p latent pixels -> tokens in raster order: (b, c, h, w) -> (b, l, d)."""

    def __init__(
        self, in_channels: int, embed_dim: int, patch_size: int, *, operations=nn, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.proj = operations.Conv2d(in_channels, embed_dim, patch_size, patch_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, (h/p)(w/p), d)."""
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 t, cosines first, then a small network: (b,) -> (b, d)."""

    FREQUENCIES = 128

    def __init__(self, embed_dim: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.mlp = nn.Sequential(
            operations.Linear(2 * self.FREQUENCIES, embed_dim, **options),
            nn.SiLU(),
            operations.Linear(embed_dim, embed_dim, **options),
        )

    def forward(self, t: Tensor, like: Tensor) -> Tensor:
        """Times (b,) in [0, 1] -> (b, d), computed in the dtype of `like`."""
        k = torch.arange(self.FREQUENCIES, device=t.device, dtype=torch.float32)
        angles = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) * k / self.FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(like.dtype))


class LabelEmbedder(nn.Module):
    """One learned row per class; the published model has no row for "no class", hence no guidance."""

    def __init__(self, num_classes: int, embed_dim: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        self.embedding_table = operations.Embedding(num_classes, embed_dim, device=device, dtype=dtype)

    def forward(self, labels: Tensor, like: Tensor) -> Tensor:
        """Labels (b,) -> (b, d) in the dtype of `like`."""
        return self.embedding_table(labels).to(like.dtype)


class FinalLayer(nn.Module):
    """Tokens -> the p*p*c velocities of their patch, features in the order (row, column, channel)."""

    def __init__(self, embed_dim: int, out_features: int, *, operations=nn, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = operations.Linear(embed_dim, out_features, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, p*p*c)."""
        return self.linear(F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).to(tokens.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in float32 as the residual is; (..., d) -> (..., d)."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al. 2016): zero whole samples of x (b, ...) with this probability, scale the rest."""
    if not training or rate == 0:
        return x
    keep = torch.rand((len(x),) + (1,) * (x.dim() - 1), device=x.device) >= rate
    return x * keep / (1 - rate)
