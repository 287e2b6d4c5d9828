"""Sampling with the solvers of this pack, through the host's own machinery."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..zigma.solvers import ODE_SOLVERS, SDE_SOLVERS, solve_ode, solve_sde
from .comfy_model import as_zigma
from .schema import schema

# v = (denoised - x) / sigma is 0/0 at the data; evaluations there are taken this far before it.
SIGMA_MIN = 1e-3

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
                    tooltip="Intervals of the time grid. heun and midpoint evaluate the model twice in each, rk4 four "
                    "times; dopri5 chooses its own steps and does not use this.",
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
            ],
            outputs=[io.Latent.Output(tooltip="For VAE Decode or ZigMa VAE Decode.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, seed: int, steps: int, cfg: float, solver: str, denoise: float
    ) -> io.NodeOutput:
        """Hand our solver to the host's sampling as a sampler of its own."""
        as_zigma(model)
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
        sampler = comfy.samplers.KSAMPLER(_integrate, {"solver": solver, "steps": steps, "noise_seed": seed})
        samples = comfy.sample.sample_custom(
            model, noise, cfg, sampler, torch.linspace(denoise, 0, steps + 1), positive, negative, latent,
            noise_mask=latent_image.get("noise_mask"), seed=seed,
            callback=latent_preview.prepare_callback(model, steps),
        )  # fmt: skip
        kept = {key: value for key, value in latent_image.items() if key != "downscale_ratio_spacial"}
        return io.NodeOutput({**kept, "samples": samples})


def _integrate(
    model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None, *, solver, steps, noise_seed
) -> Tensor:
    """A sampler function of the host: x (b, c, h, w) at sigmas[0] to the latent at sigma 0."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        sigma = (1 - t).clamp(min=SIGMA_MIN)
        denoised = model(x, sigma, **(extra_args or {}))
        return (denoised - x) / sigma.reshape(-1, 1, 1, 1)

    def on_step(i: int, t: float, x: Tensor, v: Tensor) -> None:
        # The host's progress, previews and interruption all hang on this call.
        if callback is not None:
            sigma = torch.as_tensor(1 - t)
            callback({"x": x, "i": min(i, steps - 1), "sigma": sigma, "sigma_hat": sigma, "denoised": x + (1 - t) * v})

    t0 = 1 - float(sigmas[0])
    if solver in SDE:
        # Not the seed itself: the SDE's noise must not repeat the noise it starts from.
        generator = torch.Generator("cpu").manual_seed((noise_seed + 1) % 2**63)
        size = min(0.04, (1 - t0) / 2)
        return solve_sde(
            velocity, x, steps, SDE[solver], t0=t0, last_step_size=size, generator=generator, callback=on_step
        )  # fmt: skip
    return solve_ode(velocity, x, steps, solver, t0=t0, callback=on_step)
