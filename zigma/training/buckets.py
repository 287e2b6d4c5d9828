"""Aspect-ratio buckets, and the order in which samples come: every batch of one bucket, every sample once an epoch.

Buckets after NovelAI's "Aspect ratio bucketing" (2022): pictures of like shape are trained at a size of about equal
area, instead of all being cut to squares.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["BatchOrder", "make_buckets", "nearest_bucket", "target_sizes"]


def make_buckets(area_side: int, step: int, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """Sizes (height, width) of at most area_side^2 pixels, the tallest first; each has its transpose among them.

    Args:
        area_side: side of the square; the square bucket is its multiple of `step`.
        step: of all sides.
        max_ratio: of the longer side to the shorter one.

    Raises:
        ValueError: no side fits.
    """
    if step < 1 or area_side < step or max_ratio < 1:
        raise ValueError(
            f"got buckets of about {area_side} x {area_side} pixels in steps of {step} and ratios up to {max_ratio:g}, "
            "expected a side of at least one step and a ratio of at least 1"
        )
    units = area_side // step
    area = (area_side / step) ** 2
    sizes = {(units, units)}
    for short in range(1, units + 1):
        long = int(area // short)
        if short <= long <= short * max_ratio:
            sizes |= {(short, long), (long, short)}
    # (3, 5) has no use beside (4, 5); the square stays, or square pictures would be cut.
    kept = {s for s in sizes if s[0] == s[1] or not any(o != s and o[0] >= s[0] and o[1] >= s[1] for o in sizes)}
    return [(h * step, w * step) for h, w in sorted(kept, key=lambda size: (size[1] / size[0], size))]


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose ratio is nearest to that of (height, width), by factor; of several the largest."""
    if not buckets or min(size) < 1:
        raise ValueError(f"got a picture of {size} and {len(buckets)} buckets, expected at least one of each")
    ratio = math.log(size[1] / size[0])
    return min(buckets, key=lambda b: (round(abs(math.log(b[1] / b[0]) - ratio), 9), -b[0] * b[1]))


def target_sizes(
    sizes: Sequence[tuple[int, int]], size: int | tuple[int, int], *, buckets: bool = False, step: int = 8
) -> list[tuple[int, int]]:
    """(height, width) at which each sample is trained.

    Args:
        sizes: (height, width) of the samples.
        size: a side, or (height, width).
        buckets: a bucket of about the same area for each; else `size` for all.
        step: of the buckets' sides.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not buckets:
        return [(height, width)] * len(sizes)
    choice = make_buckets(math.isqrt(height * width), step)
    return [nearest_bucket(own, choice) for own in sizes]


class BatchOrder:
    """Endless batches of sample indices, each of one bucket, decided by the seed alone.

    An epoch shuffles every bucket and deals it out in batches, which come in random order. What does not fill a batch
    opens the bucket's next epoch, so that nothing is dropped: after any number of whole epochs k, each sample of a
    bucket with at least batch_size samples has come k or k - 1 times, and never twice in one batch. A smaller bucket
    waits until its epochs fill a batch, in which its samples then come several times; over many epochs no sample comes
    more often than another.

    Args:
        groups: bucket of each sample.
        batch_size: samples in a batch.
        seed: of the order.
    """

    def __init__(self, groups: Sequence[int], batch_size: int, seed: int) -> None:
        if not groups or batch_size < 1:
            raise ValueError(f"got {len(groups)} samples in batches of {batch_size}, expected at least 1 of each")
        self.batch_size, self.seed = batch_size, seed
        self.count = len(groups)
        self.members = [[i for i, own in enumerate(groups) if own == group] for group in sorted(set(groups))]
        self._identity = hashlib.sha256(repr([*map(int, groups)]).encode()).hexdigest()
        self.epoch, self.position = 0, 0
        self._carried: list[list[int]] = [[] for _ in self.members]  # into this epoch
        self._lay_out()

    @property
    def steps_per_epoch(self) -> float:
        """Batches in an epoch, on average: what is left over counts in the next one."""
        return self.count / self.batch_size

    def _lay_out(self) -> None:
        """The batches of this epoch, and what they leave for the next."""
        text = f"{self.seed} {self.epoch}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
        self._batches: list[list[int]] = []
        self._left: list[list[int]] = []
        for members, carried in zip(self.members, self._carried, strict=True):
            order = [members[place] for place in torch.randperm(len(members), generator=generator).tolist()]
            if carried and len(members) >= self.batch_size:
                # The first batch mixes two epochs: it takes samples that are not in it yet.
                held, room = set(carried), self.batch_size - len(carried)
                first = [index for index in order if index not in held][:room]
                chosen = set(first)
                order = first + [index for index in order if index not in chosen]
            queue = carried + order
            whole = len(queue) - len(queue) % self.batch_size
            self._batches += [queue[i : i + self.batch_size] for i in range(0, whole, self.batch_size)]
            self._left.append(queue[whole:])
        shuffled = torch.randperm(len(self._batches), generator=generator).tolist()
        self._batches = [self._batches[place] for place in shuffled]

    def next(self) -> list[int]:
        """The indices of the next batch."""
        while self.position == len(self._batches):
            self.epoch, self.position, self._carried = self.epoch + 1, 0, self._left
            self._lay_out()
        batch = self._batches[self.position]
        self.position += 1
        return list(batch)

    def state_dict(self) -> dict[str, Any]:
        """All that goes on from here, as JSON can hold it."""
        return {
            "seed": self.seed, "batch_size": self.batch_size, "groups": self._identity, "epoch": self.epoch,
            "position": self.position, "carried": [list(part) for part in self._carried],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where that order was; its seed is taken over.

        Raises:
            ValueError: it is of other data or of another batch size.
        """
        if state["groups"] != self._identity or len(state["carried"]) != len(self.members):
            raise ValueError("got the order of other data or other buckets: resume with the data that the run began on")
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"got an order of batches of {state['batch_size']}, but this run's have {self.batch_size}: "
                "resume with the batch size that the run began with"
            )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._carried = [list(part) for part in state["carried"]]
        self._lay_out()
