"""Laws of the grids: their ends, their order, the formulas they are named for, what SDEs make of them."""

import math
from itertools import pairwise

import pytest
import torch

from zigma.solvers import solve_ode, solve_sde
from zigma.time_grids import SPACINGS, ending_at, shifted, sigma_grid


def toy(x, t):
    return 0.7 * torch.sin(x) - 0.3 * x + 0.5 * t[:, None]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("denoise", [0.01, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_a_grid_falls_from_its_start_to_zero(spacing, shift, denoise, steps):
    grid = sigma_grid(steps, spacing, shift, denoise)
    assert len(grid) == steps + 1 and grid[-1] == 0 and grid[0] <= 1
    assert all(a > b for a, b in pairwise(grid))
    assert len(set(torch.tensor(grid).tolist())) == steps + 1  # in float32 as well, which a host's sigmas are
    if denoise == 1:
        assert grid[0] == 1


@pytest.mark.parametrize("steps", [n for n in range(1, 1001) if 1000 % n == 0])
def test_uniform_levels_are_the_exact_fractions(steps):
    assert torch.equal(torch.tensor(sigma_grid(steps)), torch.arange(steps, -1, -1) / torch.tensor(float(steps)))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_denoise_walks_the_end_of_a_longer_grid(spacing):
    whole, part = sigma_grid(40, spacing, 2.0), sigma_grid(10, spacing, 2.0, denoise=0.25)
    assert part == pytest.approx(whole[30:])


def test_the_formulas_are_those_of_their_sources():
    steps = 12
    r = [i / steps for i in range(steps + 1)]
    times = {name: [1 - sigma for sigma in sigma_grid(steps, name)] for name in SPACINGS}
    assert times["uniform"] == pytest.approx(r)
    assert times["cosine"] == pytest.approx([1 - math.cos(math.pi / 2 * x) for x in r])  # CosyVoice
    sway = [x - (math.cos(math.pi / 2 * x) - 1 + x) for x in r]  # F5-TTS with s = -1
    assert times["cosine"] == pytest.approx(sway, abs=1e-12)
    assert times["quadratic"] == pytest.approx([1 - (1 - x) ** 2 for x in r])
    assert sigma_grid(8, shift=3.0) == pytest.approx([3 * u / (1 + 2 * u) for u in (1 - i / 8 for i in range(9))])


def test_linear_quadratic_goes_on_smoothly_half_way():
    fine = [1 - sigma for sigma in sigma_grid(2000, "linear-quadratic")]
    slopes = [2000 * (b - a) for a, b in pairwise(fine)]
    assert fine[1000] == pytest.approx(0.025) and slopes[:1000] == pytest.approx([0.05] * 1000)
    assert max(abs(b - a) for a, b in pairwise(slopes)) < 0.005  # no jump of the slope, and a constant rise after it
    assert len({round(b - a, 9) for a, b in pairwise(slopes[1001:])}) == 1


def test_shifts_compose_and_undo():
    for sigma in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert shifted(shifted(sigma, 2.0), 3.0) == pytest.approx(shifted(sigma, 6.0))
        assert shifted(shifted(sigma, 5.0), 1 / 5.0) == pytest.approx(sigma)
        assert shifted(sigma, 1.0) == pytest.approx(sigma, abs=1e-15)
    ratio = shifted(0.4, 3.0) / (1 - shifted(0.4, 3.0))
    assert ratio == pytest.approx(3 * 0.4 / 0.6)  # the noise-to-signal ratio is multiplied: equation 23 in words


def test_ending_at_keeps_the_number_the_start_and_the_order():
    for grid in (sigma_grid(10), sigma_grid(10, "cosine", 2.0, 0.5), [0.3, 0.29, 0.0]):
        squeezed = ending_at(grid, 0.04)
        assert len(squeezed) == len(grid) and squeezed[0] == grid[0] and squeezed[-1] == 0.04
        assert all(a > b for a, b in pairwise(squeezed))
    assert ending_at(sigma_grid(10), 0.04) == pytest.approx([1 - 0.96 * i / 10 for i in range(11)])


def test_a_run_along_the_grid_is_a_run_of_as_many_steps():
    x0 = torch.randn(2, 3, dtype=torch.float64)
    times = [1 - sigma for sigma in sigma_grid(9)]
    torch.testing.assert_close(solve_ode(toy, x0, times=times), solve_ode(toy, x0, 9))
    noisy = [
        solve_sde(toy, x0, generator=torch.Generator().manual_seed(0), **grid)
        for grid in ({"times": [1 - sigma for sigma in ending_at(sigma_grid(9), 0.04)]}, {"steps": 9})
    ]
    torch.testing.assert_close(*noisy)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: sigma_grid(0), "set steps to 1 or more: got 0"),
        (lambda: sigma_grid(2.5), "got 2.5, expected a whole number"),
        (lambda: sigma_grid(True), "got True"),
        (lambda: sigma_grid(4, "karras"), "unknown spacing 'karras': expected one of uniform, cosine"),
        (lambda: sigma_grid(4, denoise=0.0), "set denoise above 0 and up to 1: got 0.0"),
        (lambda: sigma_grid(4, denoise=1.5), "got 1.5"),
        (lambda: sigma_grid(4, shift=0.0), "set shift above 0: got 0.0"),
        (lambda: sigma_grid(4, shift=math.nan), "got nan"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()
