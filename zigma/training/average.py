"""An exponential moving average of what learns, the weights that samples and finished files come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Average"]

EARLY = 100  # updates, a multiple of every rhythm there is: at first every one of them counts
WINDOW_PART = 0.005  # of the average's window 1 / (1 - decay) between two looks, ten updates at most
Of = Callable[[Tensor, nn.Parameter], Tensor]  # (value, parameter) -> value


class Average:
    """average <- d average + (1 - d) weights after each update, d = min(decay, (1 + n) / (10 + n)) after n updates:
    an early average forgets its random start.

    A slow average does not look at every update later on: with decay 0.999 at every fifth, with d^5, which is the same
    average to within half a per cent of its window and costs a fifth of the memory traffic.

    Args:
        named: parameters with their names; those that do not learn are left out.
        decay: 0 keeps no average: the weights themselves count.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay, self.updates = decay, 0
        most = max(1, int(WINDOW_PART / (1 - decay) + 1e-9))
        self.every = max(n for n in (1, 2, 5, 10) if n <= most)
        self._parameters = {name: p for name, p in named if p.requires_grad}
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the weights."""
        if not self.decay:
            return
        self.updates += 1
        every = self.every if self.updates > EARLY else 1
        if self.updates % every:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) ** every
        weights = [self._parameters[name].detach() for name in self._values]
        torch._foreach_lerp_(list(self._values.values()), weights, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network computes with the averages inside; its own weights are back afterwards, bit for bit."""
        own = {name: self._parameters[name].detach().clone() for name in self._values}
        try:
            self._fill(self._values)
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)

    def state_dict(self, whole: Of | None = None) -> dict:
        """What `load_state_dict` takes.

        Args:
            whole: what becomes of the value of a parameter, such as that of the parameter which this one is a part of.
        """
        values = dict(self._values)
        if whole is not None:
            values = {name: whole(value, self._parameters[name]) for name, value in values.items()}
        return {"updates": self.updates, "values": values}

    @torch.no_grad()
    def load_state_dict(self, state: dict, part: Of | None = None) -> None:
        """Go on where a `state_dict` was taken; `part` undoes what `whole` did there."""
        self.updates = state["updates"]
        for name, value in state["values"].items():
            self._values[name].copy_(value if part is None else part(value, self._parameters[name]))
