"""dopri5 beside torchdiffeq's: the same steps to the same states, and what torchdiffeq does not promise."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zigma import dormand_prince as ours
from zigma.solvers import solve_ode


def field(bend, pull, drive):
    return lambda x, t: bend * torch.sin(3 * x) - pull * x + drive * math.cos(4 * t)


def recording(f):
    times = []

    def g(x, t):
        times.append(float(t))
        return f(x, float(t))

    return g, times


@settings(deadline=None)
@given(
    bend=st.floats(-1, 1),
    pull=st.floats(-2, 2),
    drive=st.floats(1, 3),
    ends=st.sampled_from([(0.0, 1.0), (1.0, 0.0), (0.3, 0.9), (-0.5, 1.0), (0.98, 0.01)]),
    tolerance=st.floats(-6, -1),
    shape=st.lists(st.integers(1, 3), max_size=3),
    overshoot=st.booleans(),
    seed=st.integers(0, 99),
)
def test_takes_the_steps_of_torchdiffeq(bend, pull, drive, ends, tolerance, shape, overshoot, seed):
    """The same evaluations at the same times, and the same state, to what rounding does to the lengths of steps.

    For driven fields over short times and several numbers: where nothing moves, all drifts apart, or an error passes
    through 0, rounding chooses the steps.
    """
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="pip install torchdiffeq: what dopri5 is compared with")
    x = torch.randn([*shape, 8], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rtol, atol, grid = 10**tolerance, 10 ** (tolerance - 2), torch.tensor(ends, dtype=torch.float64)
    f, times = recording(field(bend, pull, drive))
    g, expected_times = recording(field(bend, pull, drive))
    options = {} if overshoot else {"step_t": grid[1:]}
    expected = torchdiffeq.odeint(
        lambda t, x: g(x, t), x, grid, rtol=rtol, atol=atol, method="dopri5", options=options
    )[-1]  # fmt: skip
    assume(overshoot or min(ends) <= expected_times[1] <= max(ends))  # its trial may leave the interval, ours does not
    got = ours.dormand_prince(f, x, *ends, rtol, atol, overshoot=overshoot)
    torch.testing.assert_close(times, expected_times, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


def test_the_tableau_meets_the_order_conditions():
    """Row sums, and sum B C^q = 1 / (q + 1) up to order 5; the weights of the error cancel all up to order 4."""
    for row, c in zip(ours.A, ours.C, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-14)
    for q in range(5):
        assert sum(b * c**q for b, c in zip(ours.B, ours.C, strict=True)) == pytest.approx(1 / (q + 1), abs=1e-14)
        middle = sum(m * c**q for m, c in zip(ours.MIDDLE, ours.C, strict=True))
        assert q > 3 or middle == pytest.approx(0.5 ** (q + 1) / (q + 1), abs=1e-9)
    for q in range(4):
        assert sum(e * c**q for e, c in zip(ours.E, ours.C, strict=True)) == pytest.approx(0, abs=1e-14)
    assert abs(sum(e * c**4 for e, c in zip(ours.E, ours.C, strict=True))) > 1e-4


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_never_asks_beyond_the_ends(ends):
    """Nor does the trial that chooses the first step, which for so slow a field would be long."""
    x = torch.ones(3, dtype=torch.float64)
    f, times = recording(lambda x, t: 1e-3 * x)
    x = ours.dormand_prince(f, x, *ends, 1e-3, 1e-6)
    assert min(times) >= 0 and max(times) <= 1
    torch.testing.assert_close(x, torch.full_like(x, math.exp(1e-3 * (ends[1] - ends[0]))), rtol=1e-7, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("since", [0.0, 0.5])
def test_a_field_that_is_not_finite_ends_it_soon(value, since):
    times = []

    def velocity(x, t):
        times.append(t[0].item())
        return torch.full_like(x, value if times[-1] >= since else 0.1)

    with pytest.raises(RuntimeError, match=r"dopri5 cannot meet rtol=0.001 .*stay away from a singular end") as caught:
        solve_ode(velocity, torch.randn(2, 3), method="dopri5", rtol=1e-3, atol=1e-6)
    assert isinstance(caught.value.__cause__, ours.StepUnderflow)
    assert len(times) < 200


def test_an_empty_batch_stays_empty():
    assert ours.dormand_prince(lambda x, t: -x, torch.zeros(0, 3), 0.0, 1.0, 1e-3, 1e-6).shape == (0, 3)


def test_what_a_field_raises_comes_out_unchanged():
    def f(x, t):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        ours.dormand_prince(f, torch.randn(2, 3), 0.0, 1.0, 1e-3, 1e-6)
