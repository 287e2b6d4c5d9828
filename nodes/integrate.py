"""The solvers of this pack as a SAMPLER of the host, which SamplerCustomAdvanced, SamplerCustom and our own node run.

The host hands over its model, the noised latent and falling sigmas; it does the rest: noise, masks, guidance, previews.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..zigma.flow import expand_time
from ..zigma.solvers import Callback, solve_ode, solve_sde
from ..zigma.time_grids import ending_at

__all__ = ["FlowSampler", "OdeSettings", "SdeSettings"]

# v = (denoised - x) / sigma is 0/0 at the data; evaluations there are taken this far before it.
SIGMA_MIN = 1e-3
TOLERANCE = 1e-4  # a schedule computed in half precision may start this far above 1
CLOSE = 0.01  # part of the first sigma up to which dopri5 goes before a jump
HUNDREDTHS = 100  # what dopri5, which does not know its number of steps, counts its progress in


@dataclass(frozen=True)
class OdeSettings:
    """How to integrate the ODE: `solve_ode` says what the fields mean."""

    method: str = "euler"
    rtol: float = 1e-3
    atol: float = 1e-6

    def reports(self, sigmas: list[float]) -> int:
        """What the progress bar counts to."""
        return HUNDREDTHS if self.method == "dopri5" else len(sigmas) - 1

    def report(self, step: int, t: float, sigmas: list[float]) -> int:
        """What the progress bar shows in this step, counted from 0."""
        if self.method != "dopri5":
            return step
        covered = (sigmas[0] - (1 - t)) / (sigmas[0] - sigmas[-1])
        return max(round(HUNDREDTHS * covered) - 1, 0)

    def before_jump(self, sigmas: list[float]) -> list[float] | None:
        """What is walked of sigmas that end at 0 if the last step jumps to the expected picture; None: it need not."""
        return [sigmas[0], CLOSE * sigmas[0]] if self.method == "dopri5" else sigmas[:-1]

    def solve(self, field: _Field, x: Tensor, sigmas: list[float], seed: int | None, on_step: Callback) -> Tensor:
        """x at the first sigma to x at the last."""
        times = [1 - sigma for sigma in sigmas]
        if self.method != "dopri5":
            return solve_ode(field, x, method=self.method, times=times, callback=on_step)
        x = solve_ode(
            field, x, method="dopri5", rtol=self.rtol, atol=self.atol, t0=times[0], t1=times[-1], callback=on_step
        )  # fmt: skip
        on_step(0, times[-1], x, x)  # its last evaluation was at the end of its last step
        return x


@dataclass(frozen=True)
class SdeSettings:
    """How to integrate the SDE: `solve_sde` says what the fields mean. A last_step of None has none."""

    method: str = "euler-maruyama"
    diffusion: str = "sigma"
    norm: float = 1.0
    last_step: str | None = "mean"
    last_step_size: float = 0.04

    def reports(self, sigmas: list[float]) -> int:
        """What the progress bar counts to."""
        return len(sigmas) - 1 + (self.last_step is not None and sigmas[-1] == 0)

    def report(self, step: int, t: float, sigmas: list[float]) -> int:
        """What the progress bar shows in this step, counted from 0."""
        return step

    def before_jump(self, sigmas: list[float]) -> list[float] | None:
        """As that of OdeSettings."""
        return sigmas[:-1] if self.last_step is None else None

    def solve(self, field: _Field, x: Tensor, sigmas: list[float], seed: int | None, on_step: Callback) -> Tensor:
        """x at the first sigma to x at the last. Sigmas that end above 0 have no last step."""
        settings, size, start = self, self.last_step_size, sigmas[0]
        if sigmas[-1] > 0:
            settings = replace(self, last_step=None)
        elif self.last_step is not None:
            size = min(size, start / 2)  # of a run that starts close to the data
            sigmas = ending_at(sigmas, size)
        # Not the seed itself: the noise must not repeat that of the start, nor that of an earlier half of the sigmas,
        # whose second half commonly runs with DisableNoise, which is seed 0.
        own = None if seed is None else (seed + 1 + round((1 - start) * 2**20)) % 2**63
        generator = None if own is None else torch.Generator("cpu").manual_seed(own)
        return solve_sde(
            field, x, method=self.method, diffusion=self.diffusion, norm=self.norm, last_step=settings.last_step,
            last_step_size=size, generator=generator, times=[1 - sigma for sigma in sigmas], callback=on_step,
        )  # fmt: skip


class FlowSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER whose progress bar counts what it really does."""

    def __init__(self, settings: OdeSettings | SdeSettings) -> None:
        super().__init__(integrate, {"settings": settings})

    def sample(self, model_wrap, sigmas, extra_args, callback, *arguments, **keywords) -> Tensor:
        """The host's way to run a sampler."""
        settings, walked = self.extra_options["settings"], _distinct(sigmas)

        def counted(step: int, denoised: Tensor, x: Tensor, _total: int) -> None:
            callback(step, denoised, x, settings.reports(walked))

        return super().sample(model_wrap, sigmas, extra_args, callback and counted, *arguments, **keywords)


def integrate(
    model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None, *, settings
) -> Tensor:  # fmt: skip
    """A sampler function of the host: x (b, c, ...) at the first of the sigmas to x at the last.

    Raises:
        ValueError: for sigmas or a model that are not of a flow.
    """
    _check_model(model.inner_model.inner_model.model_sampling)
    walked = _checked(_distinct(sigmas))
    if len(walked) < 2:
        return x
    extra_args = extra_args or {}
    field = _Field(model, extra_args)
    with tqdm(total=settings.reports(walked), disable=disable) as bar:

        def on_step(step: int, t: float, x: Tensor, _v: Tensor) -> None:
            shown = settings.report(step, t, walked)
            bar.update(shown + 1 - bar.n)
            if callback is not None:
                sigma = torch.as_tensor(1 - t)
                callback({"x": x, "i": shown, "sigma": sigma, "sigma_hat": sigma, "denoised": field.denoised})

        seed, mask = extra_args.get("seed"), extra_args.get("denoise_mask")
        if mask is None or walked[-1] > 0:
            return settings.solve(field, x, walked, seed, on_step)
        # Under a mask the host's picture is no limit of the network's: there is no velocity at the data. So the last
        # step jumps to the picture, as stock samplers do, or has at least no noise where the mask keeps the picture.
        part = settings.before_jump(walked)
        if part is None:
            x = settings.solve(field, x, walked, seed, on_step)
            return field.denoised + mask * (x - field.denoised)
        x = settings.solve(field, x, part, seed, on_step) if len(part) > 1 else x
        on_step(len(part) - 1, 1 - part[-1], x, field(x, 1 - x.new_full((len(x),), part[-1])))
        return field.denoised


class _Field:
    """The host's model, which tells the picture that it expects, as a velocity; keeps what it told last."""

    def __init__(self, model, extra_args: dict[str, Any]) -> None:
        self.model, self.extra_args = model, extra_args
        self.denoised: Tensor | None = None
        self.one: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        # 1 - t by a tensor: a number before the minus takes another way, 50 us long after an evaluation.
        self.one = torch.ones_like(t) if self.one is None else self.one
        sigma = (self.one - t).clamp(min=SIGMA_MIN)
        self.denoised = self.model(x, sigma, **self.extra_args)
        return (self.denoised - x) / expand_time(sigma, x)


def _distinct(sigmas: Tensor) -> list[float]:
    """Without repetitions, which schedules of many steps have: nothing happens in an interval of no length."""
    values = [1.0 if 1 < value <= 1 + TOLERANCE else value for value in sigmas.tolist()]
    return [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


def _checked(sigmas: list[float]) -> list[float]:
    """Falling sigmas between 1 and 0, or a sentence."""
    remedy = "connect ZigMa Scheduler, or BasicScheduler with a ZigMa MODEL, to sigmas"
    if sigmas[0] > 1:
        raise ValueError(
            f"{remedy}: got sigmas from {sigmas[0]:g}, which are of another kind of model, expected them to fall from "
            "at most 1 (noise) to 0 (picture)"
        )
    if not all(a > b for a, b in pairwise(sigmas)) or not sigmas[-1] >= 0:
        raise ValueError(f"{remedy}: got {_shown(sigmas)}, expected sigmas that fall in each step, and not below 0")
    if len(sigmas) == 1 and sigmas[0] >= 1 - TOLERANCE:
        raise ValueError(
            f"give at least two different sigmas: got {_shown(sigmas)}, so that the noise would be left as it is; "
            "after SplitSigmas use a step of 1 or more"
        )
    return sigmas


def _shown(sigmas: list[float]) -> str:
    shown = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:6])
    return f"[{shown}{', ...' if len(sigmas) > 6 else ''}]"


def _check_model(sampling) -> None:
    """The samplers know x = (1 - sigma) picture + sigma noise, and nothing else."""
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise ValueError(
            "connect a ZigMa MODEL to the guider or sampler node: got a model that is no flow "
            f"({type(sampling).__name__}), expected one, as ZigMa is, for the ZigMa samplers"
        )
