"""Optimisers that look at more than one number of a weight, where every process has only some of its rows."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .optim import MatrixMuon, as_matrix, parameters_of
from .sharded import Shards

__all__ = ["ShardedMuon", "sharded_prodigy"]


class ShardedMuon(MatrixMuon):
    """MatrixMuon over parts of weights: one matrix after another is whole while it is orthogonalised, on all processes.

    Args:
        params: parts. shards: who has the others.
    """

    def __init__(self, params: Iterable[nn.Parameter], shards: Shards, **options) -> None:
        super().__init__(params, **options)
        self._shards = shards

    @torch.no_grad()
    def step(self, closure=None):
        """One update; gradients are read from the parts."""
        for weight, matrix in zip(self.weights, parameters_of(self), strict=True):
            if weight.grad is not None:
                self._step_of(weight, matrix)

    def _step_of(self, weight: nn.Parameter, matrix: nn.Parameter) -> None:
        own, state = matrix.data, self.state[matrix]
        matrix.data = self._shards.everywhere(own, weight)
        matrix.grad = self._shards.everywhere(as_matrix(weight.grad, like=weight), weight)
        state.update({key: self._shards.everywhere(value, weight) for key, value in state.items()})
        torch.optim.Muon.step(self)  # of this matrix: no other has a gradient
        own.copy_(self._shards.part(matrix.data, weight))
        state.update({key: self._shards.part(value, weight) for key, value in state.items()})
        matrix.grad = None
        matrix.data = own


def sharded_prodigy(prodigy: type) -> type:
    """A Prodigy whose step size follows from the sums over all processes; its state is as without shards."""

    class ShardedProdigy(prodigy):
        @torch.no_grad()
        def step(self, closure=None) -> None:
            first, params = self.param_groups[0], parameters_of(self)
            # It leaves a step with a learning rate of 0 only if it believes to be alone.
            first["fsdp_in_use"] = any(group["lr"] > 0 for group in self.param_groups)
            device = params[0].device
            with nullcontext() if device.type == "cuda" else _SumsOn(device):
                super().step(closure)
            first["fsdp_in_use"] = False  # a checkpoint may go on without shards
            for group in self.param_groups:
                group.update({key: v.item() for key, v in group.items() if isinstance(v, torch.Tensor)})
            for state in (self.state[p] for p in params if p in self.state):
                if state["p0"].dim() == 0:  # of a part of zeros; the other parts may be none
                    state["p0"] = torch.zeros_like(state["s"])

    return ShardedProdigy


class _SumsOn(TorchFunctionMode):
    """Prodigy puts what it adds up on a GPU, whatever the processes compute on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].to(self._device) if func is torch.Tensor.cuda else func(*args, **(kwargs or {}))
