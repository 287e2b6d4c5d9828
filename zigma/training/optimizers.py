"""Optimisers by name.

Optimisers beyond torch's come from their own packages, which are asked for when they are chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .optim import MatrixMuon, OptimizerGroup
from .tables import OptimizerTable

if TYPE_CHECKING:
    from .sharded import Shards

__all__ = ["make_optimizer"]

# The blocks' projections act as matrices on every token; the other matrices are embeddings or follow the condition.
MUON_WEIGHTS = ("in_proj.weight", "out_proj.weight", "to_q.weight", "to_v.weight", "to_out.0.weight")
NOT_DECAYED = ("A_log", "A_b_log", "pos_embed", "temporal_pos_embedding", "words.weight", "positions.weight")


def make_optimizer(
    named: list[tuple[str, nn.Parameter]], table: OptimizerTable, shards: Shards | None = None
) -> OptimizerGroup:
    """The optimiser of a table over parameters with their names.

    Args:
        shards: who has the other parts of these parameters, if they are parts.

    Raises:
        ValueError: there is nothing to train. ImportError: the optimiser's package is not installed.
    """
    named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not named:
        raise ValueError("no parameter learns: [model] train and freeze leave none over")
    muon = [p for name, p in named if table.name == "muon" and name.endswith(MUON_WEIGHTS)]
    taken = {id(p) for p in muon}
    rest = [(name, p) for name, p in named if id(p) not in taken]
    decayed = [p for name, p in rest if p.dim() >= 2 and not name.endswith(NOT_DECAYED)]
    plain = [p for name, p in rest if p.dim() < 2 or name.endswith(NOT_DECAYED)]
    groups = [
        {"params": decayed, "weight_decay": table.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    made = _of_groups([group for group in groups if group["params"]], table, shards)
    if not muon:
        return OptimizerGroup(made)
    options = {"lr": table.muon_lr, "weight_decay": table.weight_decay}
    if shards is None:
        return OptimizerGroup(MatrixMuon(muon, **options), made)
    from .sharded_optimizers import ShardedMuon

    return OptimizerGroup(ShardedMuon(muon, shards, **options), made)


def _of_groups(groups: list[dict], table: OptimizerTable, shards: Shards | None) -> torch.optim.Optimizer:
    betas = (table.beta1, table.beta2)
    if table.name in ("adamw", "muon"):
        return torch.optim.AdamW(groups, lr=table.lr, betas=betas, eps=table.eps, fused=True)
    if table.name == "prodigy":
        prodigy = _package("prodigyopt", "Prodigy", "prodigy")
        if shards is not None:
            from .sharded_optimizers import sharded_prodigy

            prodigy = sharded_prodigy(prodigy)
        return prodigy(groups, lr=table.lr, betas=betas, eps=table.eps, safeguard_warmup=True)
    return _package("bitsandbytes.optim", "AdamW8bit", "adamw8bit")(groups, lr=table.lr, betas=betas, eps=table.eps)


def _package(module: str, name: str, chosen: str):
    import importlib

    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(
            f"[optimizer] name {chosen!r} needs the package {package} ({error}): pip install {package}, or take 'adamw'"
        ) from error

