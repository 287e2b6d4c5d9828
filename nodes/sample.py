"""Sampling with the solvers of this pack, through the host's own machinery."""

from __future__ import annotations

import inspect

import comfy.sample
import latent_preview
import torch
from comfy_api.latest import io

from ..zigma.solvers import ODE_SOLVERS, SDE_SOLVERS
from ..zigma.time_grids import sigma_grid
from .comfy_model import as_zigma
from .integrate import FlowSampler, OdeSettings, SdeSettings
from .scheduler import SHIFT, SPACING
from .schema import schema

SDE = {f"sde-{name}": name for name in SDE_SOLVERS}
SOLVERS = [*ODE_SOLVERS, *SDE]


class ZigMaSampler(io.ComfyNode):
    """Noise to latent along the flow, by an ODE or an SDE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the host shows."""
        return schema(
            node_id="ZigMaSampler",
            display_name="ZigMa Sampler",
            description="Integrates the flow of a ZigMa model from noise to a picture. Solver euler equals KSampler "
            "with sampler euler and scheduler simple.",
            search_aliases=["ksampler", "flow matching", "ode", "sde", "denoise"],
            inputs=[
                io.Model.Input("model", tooltip="A ZigMa model, with or without LoRA or other scan orders."),
                io.Conditioning.Input("positive", tooltip="What the picture should show, from CLIP Text Encode."),
                io.Conditioning.Input("negative", tooltip="What guidance leads away from; an empty text is the usual "
                "choice."),
                io.Latent.Input("latent_image", tooltip="From ZigMa Empty Latent, or an encoded picture with denoise "
                "< 1."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Of the noise."
                ),
                io.Int.Input(
                    "steps", default=50, min=1, max=10000,
                    tooltip="Intervals of the time grid. Model evaluations in each: euler 1, heun, midpoint and "
                    "sde-heun 2, heun3 3, rk4 4; an SDE adds 1 at its end. dopri5 chooses its own steps and does not "
                    "use this.",
                ),
                io.Float.Input(
                    "cfg", default=3.0, min=0.0, max=100.0, step=0.1,
                    tooltip="Scale of classifier-free guidance; 1 is none, and twice as fast.",
                ),
                io.Combo.Input(
                    "solver", options=SOLVERS, default="euler",
                    tooltip="ODE: euler, midpoint, heun, rk4, ..., dopri5 (adaptive). SDE: sde-euler-maruyama, "
                    "sde-heun (new noise in each step; want 100 steps or more).",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                    tooltip="1 starts from pure noise; less keeps that much of latent_image.",
                ),
                io.Combo.Input("spacing", optional=True, **SPACING),
                io.Float.Input("shift", optional=True, **SHIFT),
                io.Sampler.Input(
                    "sampler", optional=True,
                    tooltip="Takes the place of solver: ZigMa ODE Sampler or ZigMa SDE Sampler with their tolerances, "
                    "diffusion and last step, or KSamplerSelect. Costs what that sampler does.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For VAE Decode or ZigMa VAE Decode.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed: int, steps: int, cfg: float, solver: str, denoise: float,
        spacing: str = "uniform", shift: float = 1.0, sampler=None,
    ) -> io.NodeOutput:  # fmt: skip
        """Hand our solver to the host's sampling as a sampler of its own."""
        as_zigma(model)
        sigmas = torch.tensor(sigma_grid(steps, spacing, shift, denoise))
        latent = _fitting(model, latent_image)
        samples = comfy.sample.sample_custom(
            model, comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index")), cfg,
            sampler or FlowSampler(SdeSettings(SDE[solver]) if solver in SDE else OdeSettings(solver)), sigmas,
            positive, negative, latent, noise_mask=latent_image.get("noise_mask"), seed=seed,
            callback=latent_preview.prepare_callback(model, steps),
        )  # fmt: skip
        kept = {key: value for key, value in latent_image.items() if not key.startswith("downscale_ratio_")}
        return io.NodeOutput({**kept, "samples": samples})


def _fitting(model, latent_image: dict) -> torch.Tensor:
    """An empty latent of another kind of model in the shape of this one, as far as the host can tell."""
    fix = comfy.sample.fix_empty_latent_channels
    ratios = {name: latent_image[name] for name in inspect.signature(fix).parameters if name in latent_image}
    return fix(model, latent_image["samples"], **ratios)
