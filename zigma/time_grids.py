"""Where to put the steps of a sampling run: noise levels sigma = 1 - t of the linear path, from noise (1) to data (0).

A grid is a spacing (which part of the path gets the small steps), a shift (of all levels towards the noise, for larger
pictures) and the part of the path that is walked. Python floats throughout: the levels k/steps come out exact.

    u      what remains of the run, 1 at its start and 0 at its end, in equal steps
    sigma  noise level, spacing(u), then shifted
    t      1 - sigma, the time of `solve_ode` and `solve_sde`: solve_ode(..., times=[1 - s for s in sigma_grid(...)])
"""

import math
from collections.abc import Callable, Sequence

from .flow import choose


def uniform(u: float) -> float:
    """sigma = u: equal steps, as SiT (arXiv 2401.08740) and rectified flow (arXiv 2209.03003) sample."""
    return u


def cosine(u: float) -> float:
    """sigma = sin(pi u / 2), that is t = 1 - cos(pi r / 2) with r = 1 - u: small steps near the noise.

    CosyVoice (arXiv 2407.05407, section 2.3); sway sampling of F5-TTS (arXiv 2410.06885) with its coefficient at -1.
    """
    return math.sin(math.pi / 2 * u)


def quadratic(u: float) -> float:
    """sigma = u^2: small steps near the data, as the quadratic sub-sequence of DDIM (arXiv 2010.02502, D.2)."""
    return u * u


def linear_quadratic(u: float, threshold: float = 0.025) -> float:
    """t = 2 h r up to r = 1 - u = 1/2, then a parabola that goes on smoothly to t = 1; h is the threshold.

    Half of the steps for the first h of the path: the linear-quadratic schedule of Movie Gen (arXiv 2410.13720), with
    the threshold of Mochi 1, whose grid this is for even numbers of steps.
    """
    r = 1 - u
    beyond = max(r - 0.5, 0.0)
    return 1 - 2 * threshold * r - 4 * (1 - 2 * threshold) * beyond * beyond


SPACINGS: dict[str, Callable[[float], float]] = {
    "uniform": uniform,
    "cosine": cosine,
    "quadratic": quadratic,
    "linear-quadratic": linear_quadratic,
}


def shifted(sigma: float, shift: float) -> float:
    """s sigma / (1 + (s - 1) sigma): Stable Diffusion 3 (arXiv 2403.03206), equation 23. Above 1: more steps in noise.

    It makes up for a picture of s^2 times as many pixels, whose noise hides less of it.
    """
    return shift * sigma / (shift * sigma + (1 - sigma))  # so written it is 1 at 1 whatever the shift


def sigma_grid(steps: int, spacing: str = "uniform", shift: float = 1.0, denoise: float = 1.0) -> list[float]:
    """steps + 1 falling noise levels, the last one 0.

    Args:
        steps: intervals of the grid.
        spacing: one of SPACINGS.
        shift: of every level, see `shifted`; 1 leaves them.
        denoise: the part of the run that is walked, its end: u starts here. 1 starts from pure noise; less is for a
            picture that is noised to the first level. With shift 1 and uniform steps it is the first level itself.

    Raises:
        ValueError: for other spacings, or numbers out of range.
    """
    level = choose(SPACINGS, spacing, "spacing")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"set steps to 1 or more: got {steps!r}, expected a whole number of intervals")
    if not 0 < denoise <= 1:
        raise ValueError(f"set denoise above 0 and up to 1: got {denoise}, expected the part of the path to walk")
    if not 0 < shift < math.inf:
        raise ValueError(f"set shift above 0: got {shift}, expected a factor such as 1 (none) or 3")
    return [shifted(level(denoise * (steps - i) / steps), shift) for i in range(steps)] + [0.0]


def ending_at(sigmas: Sequence[float], last: float) -> list[float]:
    """Falling levels that end at 0, squeezed towards their first so that they end at `last`: as many, as spaced.

    An SDE takes its noisy steps along these, and its last step from `last` to 0.
    """
    first = sigmas[0]
    return [sigma + last * (1 - sigma / first) for sigma in sigmas[:-1]] + [last]
