"""Muon for every weight that acts as a matrix, AdamW for the rest.

Muon (Jordan et al. 2024) orthogonalises the momentum of a weight matrix. torch.optim.Muon takes matrices only; a
convolution's kernel (out, in, k, k) is handed to it as the matrix (out, in*k*k) that shares its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

__all__ = ["MatrixMuon", "OptimizerGroup", "as_matrix", "schedule", "split_parameters"]

Of = Callable[[torch.Tensor, nn.Parameter], torch.Tensor]  # (value, parameter) -> value


def as_matrix(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """(out, ...) -> (out, rest) in the memory's own order, so that it is a view; channels-last: (o, h, w, i)."""
    like = tensor if like is None else like
    if tensor.dim() == 4 and not like.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten(1)


_Muon = getattr(torch.optim, "Muon", None)  # torch has it since 2.9


class MatrixMuon(_Muon or torch.optim.Optimizer):
    """torch.optim.Muon over weights of two or more dimensions, each flattened to (out, rest).

    Args:
        params: weights; their memory is shared with the flattened views, so they must not be re-allocated afterwards
            (move the model to its device first).

    Attributes:
        weights: as given, in the order of the matrices in the groups.

    Raises:
        ImportError: this torch has no Muon. ValueError: a weight whose memory does not lie as a matrix.
    """

    def __init__(self, params: Iterable[nn.Parameter], **options) -> None:
        if _Muon is None:
            raise ImportError(f"Muon needs torch 2.9 or newer, this is {torch.__version__}: take the optimizer 'adamw'")
        self.weights = list(params)
        matrices = [nn.Parameter(as_matrix(w.detach())) for w in self.weights]
        # A copy instead of a view would train nothing, and no error would tell.
        for weight, matrix in zip(self.weights, matrices, strict=True):
            if weight.data_ptr() != matrix.data_ptr():
                raise ValueError(
                    f"got a weight of shape {tuple(weight.shape)} with strides {weight.stride()}, expected contiguous "
                    "or channels-last memory: call .contiguous() on it first"
                )
        super().__init__(matrices, **options)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; gradients are read from the original weights."""
        for weight, matrix in zip(self.weights, parameters_of(self), strict=True):
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad, like=weight)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the original weights."""
        for weight in self.weights:
            weight.grad = None
        super().zero_grad(set_to_none)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What it updates, in the order in which its state dict counts."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def split_parameters(
    model: nn.Module, is_matrix: Callable[[str, nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights that `is_matrix` chooses, all others), those that need gradients only."""
    chosen, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (chosen if is_matrix(name, parameter) else others).append(parameter)
    return chosen, others


class OptimizerGroup:
    """Several optimisers that step, save and load as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self._base = [[group["lr"] for group in o.param_groups] for o in optimizers]

    def set_lr_scale(self, scale: float) -> None:
        """Set every learning rate to its initial value times `scale` (a schedule's value at this step)."""
        for optimizer, base in zip(self.optimizers, self._base, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * scale

    def step(self) -> None:
        """Step all of them."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self, whole: Of | None = None) -> list[dict]:
        """Their states, in order.

        Args:
            whole: what becomes of a tensor that belongs to a parameter, such as a moment, as in average.py.
        """
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return states if whole is None else self._mapped(states, whole)

    def load_state_dict(self, states: list[dict], part: Of | None = None) -> None:
        """Load what `state_dict` gave; `part` undoes what `whole` did there."""
        for optimizer, state in zip(
            self.optimizers, states if part is None else self._mapped(states, part), strict=True
        ):
            optimizer.load_state_dict(state)

    def _mapped(self, states: list[dict], change: Of) -> list[dict]:
        """The states with every tensor of a parameter changed."""
        changed = []
        for optimizer, state in zip(self.optimizers, states, strict=True):
            owners = optimizer.weights if isinstance(optimizer, MatrixMuon) else parameters_of(optimizer)
            entries = {
                index: {key: change(v, owners[index]) if isinstance(v, torch.Tensor) else v for key, v in entry.items()}
                for index, entry in state["state"].items()
            }
            changed.append({**state, "state": entries})
        return changed


def schedule(progress: float, kind: str = "cosine", warmup: float = 0.02, hold: float = 0.0) -> float:
    """Learning-rate factor at `progress` in [0, 1]: linear warm-up, a plateau until `hold`, then the fall to zero.

    kind: of the fall, "cosine" or "linear"; "constant" is none.
    """
    if progress < warmup:
        return progress / warmup
    start = max(warmup, hold)
    if kind == "constant" or progress < start:
        return 1.0
    rest = min(1.0, (progress - start) / max(1 - start, 1e-9))
    return 1 - rest if kind == "linear" else 0.5 * (1 + math.cos(math.pi * rest))
