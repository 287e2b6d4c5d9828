"""Sigmas for a flow model: where the steps of a sampling run lie."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..zigma.time_grids import SPACINGS, sigma_grid
from .schema import schema

__all__ = ["SHIFT", "SPACING", "ZigMaScheduler"]

SPACING = {
    "options": list(SPACINGS), "default": "uniform",
    "tooltip": "Where the small steps are: uniform nowhere, cosine near the noise, quadratic near the picture; "
    "linear-quadratic takes half of the steps in the first fortieth. It costs nothing.",
}  # fmt: skip
SHIFT = {
    "default": 1.0, "min": 0.01, "max": 100.0, "step": 0.01,
    "tooltip": "Moves all steps towards the noise: 1 does not; for a picture twice as wide and high as the model "
    "was trained on try 2. It costs nothing. ModelSamplingAuraFlow shifts the steps of KSampler and BasicScheduler, "
    "not these.",
}  # fmt: skip


class ZigMaScheduler(io.ComfyNode):
    """SIGMAS from 1, the noise, to 0, the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaScheduler",
            display_name="ZigMa Scheduler",
            description="Sigmas of a flow model for SamplerCustomAdvanced. Uniform with shift 1 equals the scheduler "
            "simple of KSampler wherever steps divides 1000.",
            search_aliases=["sigmas", "flow shift", "timestep schedule", "linear quadratic", "sway sampling"],
            inputs=[
                io.Int.Input(
                    "steps", default=50, min=1, max=10000,
                    tooltip="Intervals. Each costs as many model evaluations as the sampler says: euler 1, heun 2, "
                    "rk4 4.",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                    tooltip="1 starts from pure noise. Less walks only the last part of the schedule, in as many "
                    "steps, and keeps that much of the latent; with uniform and shift 1 it is the first sigma.",
                ),
                io.Combo.Input("spacing", **SPACING),
                io.Float.Input("shift", **SHIFT),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced, SamplerCustom and every node for SIGMAS.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, steps: int, denoise: float, spacing: str, shift: float) -> io.NodeOutput:
        """steps + 1 falling numbers."""
        return io.NodeOutput(torch.tensor(sigma_grid(steps, spacing, shift, denoise)))
