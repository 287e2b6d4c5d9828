"""ZigMa: a diffusion transformer whose blocks are Mamba layers that read the patches in different orders.

Hu et al., "ZigMa: A DiT-style Zigzag Mamba Diffusion Model", ECCV 2024, arXiv 2403.13802. Parameter names are the keys
of the published checkpoints.

Glossary
    b batch   c channels of the latent   h, w its sides   p patch size   l = (h/p)(w/p) tokens
    d width of a token (embed_dim)       m text tokens      f frames of a video: then l = f (h/p)(w/p), frame by frame
    x latent (b, c, h, w) or (b, f, c, h, w)   t time (b,), 0 = noise, 1 = data   y condition   v velocity, as x
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import Block, Norms, drop_path, is_private
from .config import ZigMaConfig
from .embedders import FinalLayer, LabelEmbedder, PatchEmbed, TimestepEmbedder, sine_positions
from .layer_scans import LayerScan, relative_scans
from .mixer import SSM, is_plain
from .scan_orders import LayerSchedule, is_order
from .scratch import Scratch
from .selective_scan import Stream
from .selective_scan.custom_ops import transformed
from .selective_scan.surroundings import beyond_this_call

__all__ = ["Condition", "ZigMa"]

log = logging.getLogger(__name__)

KEPT_SCHEDULES = 64  # grids of the model's own orders, such as the buckets of a training
KEPT_SCANS = 8  # of token orders given to `forward`: runs that take turns, on a few grids


class Condition(NamedTuple):
    """A condition as the layers take it: `ZigMa.encode_condition`.

    Attributes:
        pooled: (b, d), added to the embedding of the time.
        keys_values: of each layer's cross-attention, (b, heads, m, c) each; None without text.
    """

    pooled: Tensor
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...]


class ZigMa(nn.Module):
    """Velocity of the flow at a latent.

    Args:
        config: the architecture.
        token_orders: `depth` LongTensors, one per layer, for the grid of `config`: (h*w,) for a layer that mixes
            space, (f,) for one that mixes time, (l,) otherwise. None takes those of config.scan_type, for whatever
            grid an input has. Saved by `save_checkpoint`, no part of the state dict.
        operations: where layers come from (torch.nn, or what a host has in its place).
        device, dtype: of the parameters. On the "meta" device nothing is initialised.
        generator: draws the orders of a "randomN<k>" that are not given.

    Raises:
        ValueError: for token orders that do not fit the architecture, and random ones with nothing to draw from.
    """

    def __init__(
        self, config: ZigMaConfig, token_orders: Sequence[Tensor] | None = None, *, operations=nn, device=None,
        dtype=None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.schedule = LayerSchedule(config.scan_type, config.depth, video=config.video_frames > 0)
        d, p, options = config.embed_dim, config.patch_size, {"device": device, "dtype": dtype}
        layers = {"operations": operations, **options}
        self.x_embedder = PatchEmbed(config.in_channels, d, p, **layers)
        self.t_embedder = TimestepEmbedder(d, **layers)
        if config.conditioning == "text":
            self.y_embedder = operations.Linear(config.d_context, d, **options)
        elif config.conditioning == "class":
            self.y_embedder = LabelEmbedder(config.num_classes, d, **layers)
        frames = max(config.video_frames, 1)
        if config.use_pe:
            table = torch.empty(1, frames * math.prod(config.grid), d, **options)
            self.pos_embed = nn.Parameter(table, requires_grad=config.use_pe == 2)
        if config.tpe:
            self.temporal_pos_embedding = nn.Parameter(torch.empty(1, frames, d, **options))
        if config.share_ssm:
            self.ssm = SSM(config, **layers)
        self.blocks = nn.ModuleList(Block(config, index, **layers) for index in range(config.depth))
        self._norms = Norms.of(config, operations)
        self.norm_f = self._norms.kind(d, eps=config.norm_epsilon, **options)
        self.final_layer = FinalLayer(d, p * p * config.in_channels, **layers)
        self._schedules: dict[tuple, tuple[list[LayerScan], Tensor | None]] = {}
        self._given: list[tuple] = []
        self._resampled_to: set[tuple[int, int, int]] = set()  # what has been said of
        self.token_orders = None
        on_meta = self.norm_f.weight.device.type == "meta"
        if token_orders is not None:
            self.token_orders = self._checked_orders(token_orders, config.grid, config.video_frames)
        elif self.schedule.random and generator is not None:
            self.token_orders = self.schedule.orders(*config.grid, generator=generator)
        elif self.schedule.random and not on_meta:
            raise ValueError(
                f"scan_type {config.scan_type!r} draws its token orders, but there is nothing to draw from: pass "
                "generator=torch.Generator().manual_seed(...), or the token_orders themselves"
            )
        if not on_meta:
            self.reset_parameters()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | Condition | None = None, token_orders: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Velocity v(x, t | y).

        Args:
            x: latents (b, c, h, w), of a video model (b, f, c, h, w); h and w divisible by the patch size. Neither
                they nor f are bound to the config (a learned position embedding is resampled to another grid).
            t: times (b,) in [0, 1].
            y: labels (b,) for a class model, text features (b, m, d_context) for a text model, else None; or what
                `encode_condition` made of them, which spares a sampling run that work in every step.
            token_orders: `depth` orders for this call, in place of the model's own.

        Returns:
            As x, in its dtype.

        Raises:
            ValueError: for inputs of another shape than these.
        """
        config, p = self.config, self.config.patch_size
        self._check_inputs(x, t, y)
        f, h, w = x.shape[1] if config.video_frames else 0, x.shape[-2] // p, x.shape[-1] // p
        scans, to_raster = self._scans((h, w), f, x.device, token_orders)

        tokens = self._add_positions(self.x_embedder(x), (h, w), f)  # (b, l, d)
        c = self.t_embedder(t, tokens)  # (b, d)
        condition = y if isinstance(y, Condition) else self.encode_condition(y, tokens.dtype)
        c = F.silu(c if condition is None else c + condition.pooled)
        asked = [None] * config.depth if condition is None else condition.keys_values

        stream, ssm = Stream(tokens), self.ssm if config.share_ssm else None
        if scratch := Scratch.for_inference(tokens):
            scratch.between_layers = all(map(is_private, self.blocks)) and is_plain(self.final_layer, FinalLayer)
        for block, keys_values, scan in zip(self.blocks, asked, scans, strict=True):
            if config.use_checkpoint and torch.is_grad_enabled():
                stream = checkpoint(block, stream, c, keys_values, scan, ssm, use_reentrant=False)
            else:
                stream = block(stream, c, keys_values, scan, ssm, scratch)
        stream = drop_path(stream, config.drop_path_rate, self.training)
        places = scratch and scratch.of_norm(stream.base)
        _, tokens, _ = self._norms(self.norm_f, stream, gather=to_raster, places=places)
        v = self.final_layer(tokens)
        v = rearrange(v, "b (f h w) (i j c) -> b f c (h i) (w j)", f=max(f, 1), h=h, w=w, i=p, j=p).to(x.dtype)
        return v if f else v.squeeze(1)

    def encode_condition(self, y: Tensor | None, dtype: torch.dtype | None = None) -> Condition | None:
        """What is the same at every time t of a condition y (as in `forward`), in `dtype` or that of the weights.

        None for a model without conditions. It holds for the weights of this moment: make it anew when they change.
        """
        config = self.config
        if config.conditioning == "none":
            return None
        if config.conditioning == "class":
            self._check_labels(y)
            pooled = self.y_embedder(y, y.new_empty(0, dtype=dtype or self.y_embedder.embedding_table.weight.dtype))
            return Condition(pooled, (None,) * config.depth)
        context = self.y_embedder(y.to(dtype or self.y_embedder.weight.dtype))  # (b, m, d)
        return Condition(context.mean(dim=1), tuple(block.msa.keys_values(context) for block in self.blocks))

    def layer_orders(self, height: int, width: int, frames: int = 0) -> list[Tensor]:
        """The token orders that the layers use on a grid of height x width tokens (and frames), one per layer.

        Raises:
            ValueError: for another grid than that of the orders the model was given.
        """
        if self.token_orders is not None:
            return self._checked_orders(self.token_orders, (height, width), frames)
        if self.schedule.random:
            raise ValueError(
                f"this model's token orders are random ({self.config.scan_type}) and it was not given any: pass "
                "token_orders"
            )
        return self.schedule.orders(height, width, frames)

    def _add_positions(self, tokens: Tensor, grid: tuple[int, int], f: int) -> Tensor:
        """tokens (b, l, d) with the embeddings of their place and frame, if the model has any."""
        config = self.config
        frames = max(config.video_frames, 1)
        if config.use_pe == 1 and grid != config.grid:
            tokens = tokens + sine_positions(*grid, tokens.shape[-1]).to(tokens)
        elif config.use_pe:
            tokens = tokens + self._resampled(self.pos_embed, (frames, *config.grid), (max(f, 1), *grid), tokens)
        if config.tpe:
            by_frame = self._resampled(self.temporal_pos_embedding, (frames, 1, 1), (f, 1, 1), tokens)
            tokens = tokens + by_frame.repeat_interleave(math.prod(grid), dim=1)
        return tokens

    def _resampled(self, table: Tensor, own: tuple[int, int, int], to: tuple[int, int, int], like: Tensor) -> Tensor:
        """An embedding (1, l, d) of (frames, rows, columns), resampled linearly where these are not its own."""
        if to == own:
            return table.to(like)
        if to not in self._resampled_to:
            self._resampled_to.add(to)
            log.warning(
                "the position embedding, trained on %s tokens, is resampled to %s: another size than that of the "
                "training, %d x %d latent pixels, may suffer",
                *(" x ".join(str(side) for side in sides if side > 1) for sides in (own, to)), *self.config.img_dim,
            )  # fmt: skip
        volume = rearrange(table.to(like).float(), "b (f h w) d -> b d f h w", f=own[0], h=own[1])
        return rearrange(F.interpolate(volume, to, mode="trilinear"), "b d f h w -> b (f h w) d").to(like)

    def _scans(
        self, grid: tuple[int, int], frames: int, device: torch.device, given: Sequence[Tensor] | None
    ) -> tuple[list[LayerScan], Tensor | None]:
        """How the layers of this call come to their tokens, and the last one's back. Kept if the orders are its own."""
        if given is None:
            if self.token_orders is not None and not torch.compiler.is_compiling():
                return self._scans(grid, frames, device, self.token_orders)  # which may be set anew
            return self._own_scans(grid, frames, device)
        key = None
        if not any(order.is_inference() for order in given):  # these do not count their changes
            # A sampling run gives the same tensors at every step; a few runs may take turns.
            key = ([order._version for order in given], grid, frames, device)
            for known, orders, scans in self._given:
                if known == key and all(a is b for a, b in zip(orders, given, strict=True)):
                    return scans
        with beyond_this_call():
            scans = self._as_scans(self._checked_orders(given, grid, frames), grid, frames, device)
        if key is not None:
            self._given = [*self._given[1 - KEPT_SCANS :], (key, list(given), scans)]
        return scans

    def _own_scans(
        self, grid: tuple[int, int], frames: int, device: torch.device
    ) -> tuple[list[LayerScan], Tensor | None]:
        key = (grid, frames, device)
        if (scans := self._schedules.get(key)) is None:
            while len(self._schedules) >= KEPT_SCHEDULES:  # perhaps of several threads
                self._schedules.pop(next(iter(self._schedules), None), None)
            with beyond_this_call():
                scans = self._as_scans(self.layer_orders(*grid, frames), grid, frames, device)
            self._schedules[key] = scans
        return scans

    # As torch.compiler.assume_constant_result marks, without importing the compiler: a traced graph keeps the orders.
    _own_scans._dynamo_marked_constant = True

    def _as_scans(self, orders, grid, frames, device) -> tuple[list[LayerScan], Tensor | None]:
        config = self.config
        if config.mixer == "attention":  # which an order means nothing to: no row needs to move for one
            orders = [torch.arange(len(order)) for order in orders]
        return relative_scans(
            orders, self.schedule.axes, grid, frames, device, legacy_permutation=config.legacy_permutation,
            reversed_time=config.mixer == "mamba" and not config.corrected_time_order,
        )  # fmt: skip

    def _checked_orders(self, orders: Sequence[Tensor], grid: tuple[int, int], frames: int) -> list[Tensor]:
        if len(orders) != self.config.depth:
            raise ValueError(
                f"got {len(orders)} token orders, but this model has {self.config.depth} layers and takes one each: "
                "repeat_orders cycles a shorter list"
            )
        lengths = {"s": math.prod(grid), "t": frames, "a": max(frames, 1) * math.prod(grid)}
        for layer, (order, axis) in enumerate(zip(orders, self.schedule.axes, strict=True)):
            length, what = lengths[axis], "frames" if axis == "t" else "tokens"
            if len(order) != length:
                raise ValueError(
                    f"the token order of layer {layer} has {len(order)} entries, but the input has {length} {what}: "
                    "make the orders for the grid of the input"
                )
            if not is_order(order):
                raise ValueError(f"the token order of layer {layer} is no permutation of 0 to {length - 1}")
        return list(orders)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | Condition | None) -> None:
        config, p = self.config, self.config.patch_size
        axes = (
            ("batch", "frames", str(config.in_channels)) if config.video_frames else ("batch", str(config.in_channels))
        )
        fits = x.dim() == len(axes) + 2 and x.shape[-3] == config.in_channels
        if not fits or x.shape[-2] % p or x.shape[-1] % p:
            raise ValueError(
                f"got latents of shape {tuple(x.shape)}, expected ({', '.join(axes)}, height, width) with sides "
                f"divisible by the patch size {p}"
            )
        if 0 in x.shape[1:]:
            raise ValueError(f"got latents of shape {tuple(x.shape)}, expected at least one token and one frame")
        if t.shape != x.shape[:1]:
            raise ValueError(f"got times of shape {tuple(t.shape)}, expected one for each of {len(x)} latents")
        if isinstance(y, Condition):
            if len(y.pooled) != len(x):
                raise ValueError(f"got {len(y.pooled)} encoded conditions, expected one for each of {len(x)} latents")
            return
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
        if config.conditioning == "none" and y is not None:
            raise ValueError(f"got a condition of shape {tuple(y.shape)}, but this model takes none: leave y out")

    def _check_labels(self, labels: Tensor) -> None:
        """On a CPU alone: to look at them elsewhere is to wait for the device."""
        if torch.compiler.is_compiling() or transformed() or labels.device.type != "cpu" or not labels.numel():
            return
        low, high, classes = int(labels.min()), int(labels.max()), self.config.num_classes
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(f"got the label {wrong}, but this model has {classes}: expected 0 to {classes - 1}")

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
        if self.config.use_pe == 1:
            self.pos_embed.copy_(sine_positions(*self.config.grid, d))
        elif self.config.use_pe == 2:
            nn.init.zeros_(self.pos_embed)
        if self.config.tpe:
            nn.init.zeros_(self.temporal_pos_embedding)
        if self.config.share_ssm:
            self.ssm.reset_ssm(self.config)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            block.mixer.reset_parameters(self.config)
