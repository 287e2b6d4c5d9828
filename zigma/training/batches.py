"""Which pictures come next: every picture once before any comes again, each batch of one shape, and where it stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["BatchOrder"]


class BatchOrder:
    """Endless batches of indices.

    Every epoch shuffles all pictures and hands them out as whole batches of one group. Those that are left over of a
    group wait, and come first in the next epoch: none is dropped, and after k epochs each has been seen k or k - 1
    times. A group smaller than a batch waits until its pictures, come again, fill one.

    Args:
        groups: of each picture, the group (a size) whose pictures fit together.
        batch_size: pictures of a batch.
        seed: of the order.

    Raises:
        ValueError: there are no pictures.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int) -> None:
        if not groups:
            raise ValueError("got no pictures to make batches of: expected at least one")
        self.groups, self.batch_size = list(groups), batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0
        self._waiting: dict[int, list[int]] = {group: [] for group in sorted(set(groups))}
        self._ready: list[list[int]] = []

    def next(self) -> list[int]:
        """The indices of the next batch."""
        while not self._ready:
            self.epoch += 1
            for index in torch.randperm(len(self.groups), generator=self.generator).tolist():
                waiting = self._waiting[self.groups[index]]
                waiting.append(index)
                if len(waiting) == self.batch_size:
                    self._ready.append(waiting)
                    self._waiting[self.groups[index]] = []
        return self._ready.pop(0)

    @property
    def steps_per_epoch(self) -> float:
        """On average."""
        return len(self.groups) / self.batch_size

    def state_dict(self) -> dict:
        """What `load_state_dict` takes: numbers, lists and a tensor."""
        return {
            "epoch": self.epoch, "waiting": dict(self._waiting), "ready": list(self._ready),
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Go on where a `state_dict` of the same pictures was taken."""
        self.epoch = state["epoch"]
        self._waiting = {group: list(indices) for group, indices in state["waiting"].items()}
        self._ready = [list(batch) for batch in state["ready"]]
        self.generator.set_state(state["generator"].cpu())
