"""The loss of a training step, and the same loss at fixed times and noises, by which runs compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..flow import PATHS, Path, Velocity, choose, flow_loss, randn_like, sample_time
from .tables import FlowTable

__all__ = ["Objective"]

VALIDATION_TIMES = 8  # of each picture, in the middle of equal parts of the interval


class Objective:
    """What a [flow] table asks for."""

    def __init__(self, table: FlowTable) -> None:
        self.table = table
        self.path: Path = choose(PATHS, table.path, "flow path")()
        bounded = table.prediction == "velocity"
        self.interval = self.path.velocity_interval if bounded else (self.path.t_min, self.path.t_max)

    def draw(self, x1: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise x0 as x1 (b, ...), then times (b,), both from one generator."""
        table = self.table
        x0 = randn_like(x1, generator)
        t = sample_time(
            len(x1), table.time_sampling, self.interval, mean=table.mean, std=table.std, generator=generator
        )  # fmt: skip
        return x0, t

    def losses(self, model: Velocity, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """(b,) weighted losses of data x1 with noise x0 at times t."""
        table = self.table
        own = None if table.weighting in ("none", "min-snr") else table.weighting
        losses = flow_loss(
            model, x1, path=self.path, prediction=table.prediction, weighting=own, x0=x0, t=t, reduction="none"
        )  # fmt: skip
        return losses * self.min_snr(t) if table.weighting == "min-snr" else losses

    def min_snr(self, t: Tensor) -> Tensor:
        """Weights (b,) of Min-SNR-gamma, Hang et al. 2023 (arXiv 2303.09556) section 3.4, at SNR = (alpha / sigma)^2.

        The paper weighs the loss of the data x1 by min(SNR, gamma). Noise's loss is that times SNR, and so is the
        score's (weighted by sigma^2, see flow_loss); the velocity's is that times (D / sigma)^2, since
        v = (D x1 + sigma' x) / sigma.
        """
        sigma, gamma = self.path.safe_sigma(t), self.table.snr_gamma
        snr = (self.path.alpha(t) / sigma) ** 2
        weights = snr.clamp(max=gamma)
        if self.table.prediction == "velocity":
            return weights * (sigma / self.path.determinant(t)) ** 2
        return weights / snr.clamp(min=1e-8)

    def validation_loss(self, model, pictures: Sequence[tuple[Tensor, object]], device: torch.device) -> float:
        """Mean unweighted loss of (latent (1, ...), condition) pairs, each at the same times with its own fixed noise.

        `model(x, t, condition)` gives the prediction. The figure depends on weights and data alone.
        """
        low, high = self.interval
        t = low + (high - low) * (torch.arange(VALIDATION_TIMES) + 0.5) / VALIDATION_TIMES
        total = 0.0
        for index, (latent, condition) in enumerate(pictures):
            generator = torch.Generator().manual_seed(index)
            x1 = latent.expand(VALIDATION_TIMES, *latent.shape[1:])
            x0 = randn_like(x1, generator)

            def predict(x: Tensor, t: Tensor, condition=condition) -> Tensor:
                return model(x, t, condition)

            total += flow_loss(
                predict, x1.to(device), path=self.path, prediction=self.table.prediction, x0=x0.to(device),
                t=t.to(device),
            ).item()  # fmt: skip
        return total / max(len(pictures), 1)
