"""dopri5: the explicit Runge-Kutta pair of Dormand and Prince, which chooses its own steps.

    k_i = f(x + h sum_j A_ij k_j, t + C_i h)     seven slopes; the last is the first of the next step (FSAL)
    x'  = x + h sum_j B_j k_j                    order 5, where the last slope is taken
    e   = h sum_j E_j k_j                        x' minus a result of order 4: the error that chooses h

A = 1/5, 3/40 ... and B: Dormand and Prince 1980, J. Comp. Appl. Math. 6, table 2; E and the point in the middle of a
step: Shampine 1986, Math. Comp. 46; first step and step control: Hairer, Norsett and Wanner, Solving Ordinary
Differential Equations I, II.4. The same choices as torchdiffeq's "dopri5", so that the same steps are taken.

Times are Python floats: only the norm of an error is read back from the device, once in a step.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Slope = Callable[[Tensor, float], Tensor]  # f(x, t)
Callback = Callable[[int, float, Tensor, Tensor], None]  # (step, t, x, f(x, t)), before x is updated

C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
B = (*A[-1], 0.0)
B4 = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
E = tuple(b - b4 for b, b4 in zip(B, B4, strict=True))
MIDDLE = (
    6025192743 / 60171106304, 0.0, 51252292925 / 130801643196, -2691868925 / 90256659456,
    187940372067 / 3189068634112, -1776094331 / 39487288512, 11237099 / 470086768,
)  # fmt: skip

ORDER, SAFETY, LEAST, MOST = 5, 0.9, 0.2, 10.0  # a step changes by a factor of LEAST to MOST


class StepUnderflow(RuntimeError):
    """No step was short enough."""


def add_slopes(x: Tensor | None, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """x + h sum_j weights_j slopes_j, or without x, always a tensor of its own."""
    used = [(h * w, k) for w, k in zip(weights, slopes, strict=False) if w]
    (w, k), *others = used
    total = w * k if x is None else torch.add(x, k, alpha=w)
    for w, k in others:
        total.add_(k, alpha=w)
    return total


def tolerance(rtol: float, atol: float, x: Tensor) -> Tensor:
    """What an error may be, number by number: atol + rtol |x|."""
    return x.abs().mul_(rtol).add_(atol)


def norm(error: Tensor, allowed: Tensor) -> float:
    """Root mean square over the whole batch of error / allowed."""
    return torch.linalg.vector_norm(error / allowed).item() / math.sqrt(max(error.numel(), 1))


def first_step(f: Slope, x: Tensor, t: float, furthest: float, k1: Tensor, rtol: float, atol: float) -> float:
    """The length of a first step, for one evaluation no further than `furthest`, a signed length.

    Hairer, Norsett and Wanner, II.4, algorithm 4.14.
    """
    allowed = tolerance(rtol, atol, x)
    d0, d1 = norm(x, allowed), norm(k1, allowed)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    if h0 == 0 or math.isnan(h0):  # an infinite slope, or none
        return math.nan
    h0 = math.copysign(min(h0, abs(furthest)), furthest)
    k2 = f(torch.add(x, k1, alpha=h0), t + h0)
    d2 = norm(k2 - k1, allowed) / abs(h0)
    steepest = max(d1, d2)
    h1 = max(1e-6, 1e-3 * abs(h0)) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / ORDER)
    return min(100 * abs(h0), h1)


def next_step(length: float, error: float) -> float:
    """The length of the step after one of this length with this error, whose limit is 1."""
    if error == 0:
        return length * MOST
    if math.isnan(error):  # min and max would lose it
        return math.nan
    least = 1.0 if error < 1 else LEAST
    return length * min(MOST, max(least, SAFETY * error ** (-1 / ORDER)))


def between(x: Tensor, y: Tensor, slopes: Sequence[Tensor], h: float, part: float) -> Tensor:
    """The quartic through a step from x to y and its middle, with the slopes at both ends, `part` of the step on."""
    middle, k1, k7 = add_slopes(x, h, MIDDLE, slopes), slopes[0], slopes[6]
    a = 2 * h * (k7 - k1) - 8 * (x + y) + 16 * middle
    b = h * (5 * k1 - 3 * k7) + 18 * x + 14 * y - 32 * middle
    c = h * (k7 - 4 * k1) - 11 * x - 5 * y + 16 * middle
    return x + part * (h * k1 + part * (c + part * (b + part * a)))


def dormand_prince(
    f: Slope, x: Tensor, t: float, end: float, rtol: float, atol: float, callback: Callback | None = None,
    overshoot: bool = False,
) -> Tensor:  # fmt: skip
    """Integrate dx = f(x, t) dt from x (b, ...) at time t to `end`, which may lie on either side.

    callback   called as callback(step, t, x, f(x, t)) at the start and after each step that was kept, but the last.
    overshoot  let the last step pass the end, and go back by the quartic of that step, of order 4.
    ValueError on negative tolerances; StepUnderflow where no step is short enough for them, or f is not a number.
    """
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"rtol and atol limit the error: expected two positive numbers, got {rtol:g} and {atol:g}")
    step, k = 0, f(x, t)
    shortest = 16 * math.ulp(max(abs(t), abs(end)))
    if callback is not None:
        callback(step, t, x, k)
    length = first_step(f, x, t, (end - t) * (math.inf if overshoot else 1), k, rtol, atol)
    while True:
        last = length >= abs(end - t)
        if not (last or length > shortest):  # nor is NaN
            raise StepUnderflow(f"at t={t:g} the step came down to {length:.1g}")
        u = end if last and not overshoot else t + math.copysign(length, end - t)
        h, slopes = u - t, [k]
        for a, c in zip(A[1:], C[1:], strict=True):
            y = add_slopes(x, h, a, slopes)
            slopes.append(f(y, u if c == 1 else t + c * h))  # t + h may round to something beyond the end
        allowed = tolerance(rtol, atol, torch.maximum(x.abs(), y.abs()))
        error = norm(add_slopes(None, h, E, slopes), allowed)
        if error <= 1:
            if last:
                return between(x, y, slopes, h, (end - t) / h) if overshoot else y
            step, t, x, k = step + 1, u, y, slopes[-1]
            if callback is not None:
                callback(step, t, x, k)
        length = next_step(abs(h), error)
