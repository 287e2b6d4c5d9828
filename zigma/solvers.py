"""Integrators that carry noise to data along a velocity field, and back.

    ODE   dx = v(x, t) dt                                   SiT (2)    solve_ode, likelihood
    SDE   dx = (v + w s)(x, t) dt + sqrt(2 w(t)) dW         SiT (4)    solve_sde

SiT is arXiv 2401.08740; its w is twice ours and its time runs the other way. Both equations have the same marginals
p_t for every w >= 0. A velocity is any callable v(x, t) with x (b, ...), t (b,); conditions and guidance live in it.

States are updated, never collected: memory does not depend on the number of steps. A half precision state is shown to
the velocity as such but summed in float32. Whatever a velocity or a callback raises comes out unchanged, so raising is
how a caller cancels.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .dormand_prince import Callback, Slope, StepUnderflow, dormand_prince
from .flow import LINEAR, Path, Velocity, choose, randn_like

Step = Callable[[Slope, Tensor, float, float, Tensor], Tensor]

# One step of an explicit Runge-Kutta method from time t to u, given the first slope k1 = f(x, t). The stage times are
# written so that the last one is exactly u: t + (u - t) may round to something beyond the end of the path.


def euler(f: Slope, x: Tensor, t: float, u: float, k1: Tensor) -> Tensor:
    """Euler's method, order 1, one evaluation."""
    return x + (u - t) * k1


def midpoint(f: Slope, x: Tensor, t: float, u: float, k1: Tensor) -> Tensor:
    """Explicit midpoint rule, order 2, two evaluations."""
    h = u - t
    return x + h * f(x + h / 2 * k1, (t + u) / 2)


def heun(f: Slope, x: Tensor, t: float, u: float, k1: Tensor) -> Tensor:
    """Heun's two-stage method (explicit trapezoid), order 2, two evaluations."""
    h = u - t
    k2 = f(x + h * k1, u)
    return x + h / 2 * (k1 + k2)


def heun3(f: Slope, x: Tensor, t: float, u: float, k1: Tensor) -> Tensor:
    """Heun's three-stage method, order 3, three evaluations."""
    h = u - t
    k2 = f(x + h / 3 * k1, t + h / 3)
    k3 = f(x + 2 * h / 3 * k2, t + 2 * h / 3)
    return x + h / 4 * (k1 + 3 * k3)


def rk4(f: Slope, x: Tensor, t: float, u: float, k1: Tensor) -> Tensor:
    """The classical method of Runge and Kutta, order 4, four evaluations."""
    h = u - t
    k2 = f(x + h / 2 * k1, (t + u) / 2)
    k3 = f(x + h / 2 * k2, (t + u) / 2)
    k4 = f(x + h * k3, u)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def rk4_38(f: Slope, x: Tensor, t: float, u: float, k1: Tensor) -> Tensor:
    """Kutta's 3/8 rule, order 4, four evaluations: what torchdiffeq calls "rk4"."""
    h = u - t
    k2 = f(x + h / 3 * k1, t + h / 3)
    k3 = f(x + h * (k2 - k1 / 3), t + 2 * h / 3)
    k4 = f(x + h * (k1 - k2 + k3), u)
    return x + h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)


FIXED_STEP: dict[str, Step] = {
    "euler": euler,
    "heun": heun,
    "heun3": heun3,
    "midpoint": midpoint,
    "rk4": rk4,
    "rk4-3/8": rk4_38,
}
ODE_SOLVERS: tuple[str, ...] = (*FIXED_STEP, "dopri5")


def _time_grid(steps: int, t0: float, t1: float, times: Sequence[float] | Tensor | None) -> list[float]:
    """The grid in Python floats (float64), its ends exact."""
    if times is not None:
        grid = [float(t) for t in times]
        rising = len(grid) > 1 and grid[-1] > grid[0]
        if len(grid) < 2 or not all((b > a) if rising else (b < a) for a, b in pairwise(grid)):
            raise ValueError(f"times must be two or more strictly rising or strictly falling numbers, got {grid}")
        return grid
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps counts intervals of the time grid: expected an integer of at least 1, got {steps!r}")
    if not (math.isfinite(t0) and math.isfinite(t1)):
        raise ValueError(f"t0 and t1 are {t0} and {t1}: expected two numbers (0 is noise, 1 is data)")
    if t0 == t1:
        raise ValueError(f"t0 and t1 are both {t0}: expected two different times (0 is noise, 1 is data)")
    return [t0 + (t1 - t0) * i / steps for i in range(steps)] + [t1]


def _time(t: float, x: Tensor) -> Tensor:
    """t as a tensor (b,), in float64 for float64 states and else in float32: bfloat16 cannot tell 0.999 from 1."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((len(x),), t, dtype=dtype, device=x.device)


def _wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is: what states are summed in."""
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"the state must be a floating point tensor (b, ...), got {x.dtype} {tuple(x.shape)}")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _field(velocity: Velocity, x0: Tensor) -> Callable[[Tensor, float | Tensor], Tensor]:
    """velocity(x, t) for a scalar t: x is shown in x0's dtype, the answer checked and brought to that of the state."""
    # Multiplied by t. An evaluation leaves no code in the cache, and torch.full is code that nothing else here runs.
    one = _time(1.0, x0)

    def f(x: Tensor, t: float | Tensor) -> Tensor:
        v = velocity(x.to(x0.dtype), one * t)
        if v.shape != x.shape:  # would broadcast without a word
            raise ValueError(f"the velocity has shape {tuple(v.shape)}: expected that of the state, {tuple(x.shape)}")
        return v.to(x.dtype)

    return f


@torch.no_grad()
def solve_ode(
    velocity: Velocity,
    x0: Tensor,
    steps: int = 30,
    method: str = "heun",
    rtol: float = 1e-3,
    atol: float = 1e-6,
    t0: float = 0.0,
    t1: float = 1.0,
    times: Sequence[float] | Tensor | None = None,
    callback: Callback | None = None,
    overshoot: bool = False,
) -> Tensor:
    """Integrate dx = velocity(x, t) dt from x0 (b, ...) at t0 to t1 and return the state there, (b, ...).

    steps     number of intervals between t0 and t1 (not of grid points); or give the whole grid as `times`.
    method    one of ODE_SOLVERS. "dopri5" (Dormand and Prince 1980, dormand_prince.py) chooses its own steps to
              meet rtol and atol and does not look at `steps`. Its error is one norm over the whole batch, so there a
              sample depends on its neighbours, within the tolerances; all other methods treat each sample alone.
    t0, t1    0 is noise and 1 is data; t0=1, t1=0 inverts: the noise that a sample came from.
    callback  called as callback(step, t, x, v) before each step, v = velocity(x, t); with "dopri5" for each accepted
              step. `path.data_from_velocity(v, x, t)` of these is the preview.
    overshoot of "dopri5": let its last step pass t1 and interpolate back, which torchdiffeq does by default and so the
              published code did. It reproduces published samples, asks the model about times beyond the data, and is
              ten times less exact at the published tolerances.
    ValueError on unknown methods, grids and shapes; RuntimeError if "dopri5" cannot meet its tolerances.
    """
    choose(dict.fromkeys(ODE_SOLVERS), method, "ODE solver")
    f, x = _field(velocity, x0), _wide(x0)
    if method.lower() == "dopri5":
        if times is not None:
            raise ValueError("dopri5 chooses its own steps and takes no times: give t0 and t1, or a fixed-step solver")
        _time_grid(1, t0, t1, None)
        try:
            return dormand_prince(f, x, t0, t1, rtol, atol, callback, overshoot).to(x0.dtype)
        except StepUnderflow as error:
            raise RuntimeError(
                f"dopri5 cannot meet rtol={rtol:g} and atol={atol:g} between t={t0:g} and t={t1:g} ({error}): "
                f"loosen them, stay away from a singular end, or choose one of {', '.join(FIXED_STEP)}"
            ) from error
    if overshoot:
        raise ValueError(f"overshoot is of dopri5, but the method is {method!r}, which ends at t1: leave it out")
    step = FIXED_STEP[method.lower()]
    for i, (t, u) in enumerate(pairwise(_time_grid(steps, t0, t1, times))):
        v = f(x, t)
        if callback is not None:
            callback(i, t, x, v)
        x = step(f, x, t, u, v)
    return x.to(x0.dtype)


# Diffusion coefficients w(t) >= 0 with norm c. sigma, sin^2 and sbdm are SiT 2.4 (i), (ii), (iii), the others stand in
# its published code. A model's score grows like 1/sigma towards t = 1. On the linear and GVP paths w makes up for it
# except when "constant" or "decreasing" with c other than 1: end those on a last step.
DIFFUSIONS: dict[str, Callable[[Path, Tensor, float], Tensor]] = {
    "constant": lambda path, t, c: torch.full_like(t, c),
    "sbdm": lambda path, t, c: c * path.kl_diffusion(t),
    "sigma": lambda path, t, c: c * path.sigma(t),
    "linear": lambda path, t, c: c * (1 - t),
    "decreasing": lambda path, t, c: 0.25 * (c * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t, c: c * torch.sin(math.pi * t) ** 2,
}
SDE_SOLVERS: tuple[str, ...] = ("euler-maruyama", "heun")
LAST_STEPS: tuple[str, ...] = ("mean", "tweedie", "euler")


def diffusion_coefficient(form: str, t: float | Tensor, path: Path = LINEAR, norm: float = 1.0) -> Tensor:
    """w(t) of the named form, of t's shape, float64 for a Python number."""
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    return choose(DIFFUSIONS, form, "diffusion form")(path, t, norm)


def _drift_weights(form: str, times: Sequence[float], path: Path, norm: float) -> list[tuple[float, float]]:
    """The weights of v and x in v + w s at each of the times: s is linear in both, SiT (9).

    At t = 1 it is the limit of -(w / sigma) eps, not 0 times something large: both factors are taken at t_max.
    """
    t = torch.tensor(times, dtype=torch.float64)
    w = diffusion_coefficient(form, t.clamp(max=path.t_max), path, norm)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    of_v, of_x = path.score_from_velocity(one, zero, t), path.score_from_velocity(zero, one, t)
    return list(zip((1 + w * of_v).tolist(), (w * of_x).tolist(), strict=True))


def _check_sde(method: str, diffusion: str, norm: float, last_step: str | None, last_step_size: float) -> None:
    choose(dict.fromkeys(SDE_SOLVERS), method, "SDE solver")
    choose(DIFFUSIONS, diffusion, "diffusion form")
    if not 0 <= norm < math.inf:
        raise ValueError(f"norm scales a diffusion coefficient: expected a number of at least 0, got {norm}")
    if last_step is not None:
        choose(dict.fromkeys(LAST_STEPS), last_step, "last step (or None)")
        if not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size is a length of time: expected one between 0 and 1, got {last_step_size}")


def _check_ends(t0: float, t1: float, last_step_size: float) -> None:
    if not t0 < t1:
        raise ValueError(f"an SDE runs from noise (0) to data (1): expected t0 < t1, got t0={t0:g} and t1={t1:g}")
    if last_step_size and t1 + last_step_size > 1 + 1e-6:
        raise ValueError(
            f"the last step goes from t={t1:g} over {last_step_size:g}, beyond the data at 1: end the noisy steps at "
            f"{1 - last_step_size:g}, or pass last_step=None"
        )


@torch.no_grad()
def solve_sde(
    velocity: Velocity,
    x0: Tensor,
    steps: int = 250,
    method: str = "euler-maruyama",
    path: Path = LINEAR,
    diffusion: str = "sigma",
    norm: float = 1.0,
    last_step: str | None = "mean",
    last_step_size: float = 0.04,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    *,
    t0: float | None = None,
    t1: float | None = None,
    times: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Integrate dx = (v + w s) dt + sqrt(2 w) dW, SiT (4), from noise x0 (b, ...) to data, (b, ...).

    steps      intervals between t0 and t1; the last step comes after them.
    method     "euler-maruyama", or "heun": add the noise, then one Heun step of the drift.
    path       the path that the velocity was trained on: it gives the score s of a velocity, SiT (9).
    diffusion  w(t), one of DIFFUSIONS, scaled by norm. "sbdm" is infinite at t = 0 on the linear and GVP paths and
               starts at path.t_min there; it wants many steps.
    last_step  without noise, from t1 over last_step_size: "mean" (drift), "euler" (velocity), "tweedie" (the posterior
               mean of the data); None: the steps themselves reach t = 1.
    t0, t1     default 0 (see sbdm) and 1 - last_step_size, or 1 without a last step.
    times      the whole rising grid of the noisy steps, in place of steps, t0 and t1; the last step starts at its end.
    generator  source of the noise; it alone decides the outcome for a given x0.
    callback   called as callback(step, t, x, v) with v = velocity(x, t) for each step and for the last one.
    """
    _check_sde(method, diffusion, norm, last_step, last_step_size)
    if times is not None and (t0 is not None or t1 is not None):
        raise ValueError("times is the whole grid of the SDE: expected it, or t0 and t1, but not both")
    t0 = t0 if t0 is not None else path.t_min if diffusion.lower() == "sbdm" else 0.0
    t1 = t1 if t1 is not None else 1.0 if last_step is None else 1 - last_step_size
    grid = _time_grid(steps, t0, t1, times)
    t1 = grid[-1]
    goes_on = last_step is not None and last_step.lower() != "tweedie"
    _check_ends(grid[0], t1, last_step_size if goes_on else 0.0)
    f, x = _field(velocity, x0), _wide(x0)
    weights = dict(zip(grid, _drift_weights(diffusion, grid, path, norm), strict=True))
    w = diffusion_coefficient(diffusion, torch.tensor(grid[:-1], dtype=torch.float64), path, norm).tolist()

    def add_score(v: Tensor, x: Tensor, t: float) -> Tensor:
        of_v, of_x = weights[t]
        return torch.add(of_x * x, v, alpha=of_v)

    def drift(x: Tensor, t: float) -> Tensor:
        return add_score(f(x, t), x, t)

    noise_first = method.lower() == "heun"
    step = heun if noise_first else euler
    for i, (t, u) in enumerate(pairwise(grid)):
        noise, deviation = randn_like(x, generator), math.sqrt(2 * w[i] * (u - t))
        x = torch.add(x, noise, alpha=deviation) if noise_first else x
        v = f(x, t)
        if callback is not None:
            callback(i, t, x, v)
        x = step(drift, x, t, u, add_score(v, x, t))
        x = x if noise_first else torch.add(x, noise, alpha=deviation)
    if last_step is None:
        return x.to(x0.dtype)

    v = f(x, t1)
    if callback is not None:
        callback(len(grid) - 1, t1, x, v)
    if last_step.lower() == "tweedie":
        return path.data_from_velocity(v, x, _time(t1, x)).to(x0.dtype)
    return (x + last_step_size * (add_score(v, x, t1) if last_step.lower() == "mean" else v)).to(x0.dtype)


class Likelihood(NamedTuple):
    """What `likelihood` found out about a batch of data."""

    log_prob: Tensor  # (b,) log p(x1) in nats
    standard_error: Tensor  # (b,) of log_prob, from the spread over probes; infinite with a single probe
    x0: Tensor  # (b, ...) the noise that x1 came from


def likelihood(
    velocity: Velocity,
    x1: Tensor,
    steps: int = 250,
    method: str = "heun",
    probes: int = 8,
    generator: torch.Generator | None = None,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    callback: Callback | None = None,
) -> Likelihood:
    """log p(x1) = log N(x0; 0, I) - int_0^1 div v(x_t, t) dt along the ODE from data x1 (b, ...) back to noise x0.

    The instantaneous change of variables of Chen et al. 2018 (arXiv 1806.07366, theorem 1) with the estimator of
    Hutchinson: div v = E[e^T (dv/dx) e], e of random signs (Grathwohl et al. 2019, arXiv 1810.01367). Each probe
    gives an estimate of the whole integral, and their spread the error bar, which knows nothing of the solver's own
    error. Fixed-step solvers draw new probes at every evaluation, which averages within a trajectory too; dopri5
    keeps them, because its error control needs a deterministic right side. The cost of an evaluation is one forward
    and `probes` backward passes. Callbacks see the augmented state (b, n + probes): the state, then the integrals.
    """
    if probes < 1:
        raise ValueError(f"the divergence is estimated from random probes: expected at least 1, got {probes}")
    f, x1 = _field(velocity, x1), _wide(x1)
    shape, n = x1.shape, math.prod(x1.shape[1:])
    device = x1.device if generator is None else generator.device
    kept: list[Tensor] = []

    def random_signs() -> Tensor:
        if method.lower() == "dopri5" and kept:
            return kept[0]
        e = torch.randint(2, (probes, *shape), generator=generator, device=device, dtype=torch.float32) * 2 - 1
        kept[:] = [e.to(x1)]
        return kept[0]

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = state[:, :n].reshape(shape).clone().requires_grad_()  # a clone, since inference tensors take no grad
            v = f(x, t)
            if not v.requires_grad:
                raise ValueError("the velocity has no gradient by x: expected one computed with autograd on")
            vjps = [(e, torch.autograd.grad(v, x, e, retain_graph=True)[0]) for e in random_signs()]
        divergence = torch.stack([(e * g).flatten(1).sum(1) for e, g in vjps], dim=1)
        return torch.cat([v.detach().flatten(1), divergence], dim=1)

    state = torch.cat([x1.flatten(1), x1.new_zeros(len(x1), probes)], dim=1)
    state = solve_ode(augmented, state, steps, method, rtol, atol, t0=1.0, t1=0.0, callback=callback)
    x0, integrals = state[:, :n], state[:, n:]  # int_1^0 div v dt = -int_0^1
    prior = -0.5 * (x0.square() + math.log(2 * math.pi)).sum(1)
    spread = integrals.std(1) / math.sqrt(probes) if probes > 1 and len(x1) else torch.full_like(prior, math.inf)
    return Likelihood(prior + integrals.mean(1), spread, x0.reshape(shape))
