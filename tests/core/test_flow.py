"""Laws of the interpolants: limits, inverses, the exact Gaussian case, and the published code's recorded losses."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from zigma.flow import (
    PATHS,
    GVPPath,
    LinearPath,
    VPPath,
    as_velocity,
    expand_time,
    flow_loss,
    linear_velocity,
    loss_weight,
    sample_time,
)
from zigma.solvers import diffusion_coefficient

DATA = Path(__file__).parents[1] / "data"
each_path = pytest.mark.parametrize("path", [LinearPath(), GVPPath(), VPPath()], ids=lambda p: type(p).__name__)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def toy(x, t):
    """The model that transport.safetensors was recorded with."""
    return 0.7 * torch.sin(x) - 0.3 * x + 0.5 * expand_time(t, x)


class Gaussian:
    """Everything in closed form for data N(m, s^2): p_t = N(alpha m, alpha^2 s^2 + sigma^2)."""

    def __init__(self, path, m=1.5, s=0.4):
        self.path, self.m, self.s = path, m, s

    def moments(self, t):
        return self.path.alpha(t) * self.m, (self.path.alpha(t) * self.s) ** 2 + self.path.sigma(t) ** 2

    def score(self, x, t):
        mean, var = self.moments(expand_time(t, x))
        return -(x - mean) / var

    def noise(self, x, t):
        return -self.path.sigma(expand_time(t, x)) * self.score(x, t)

    def data(self, x, t):
        alpha = self.path.alpha(expand_time(t, x))
        return self.m - alpha * self.s**2 * self.score(x, t)

    def velocity(self, x, t):
        t = expand_time(t, x)
        alpha, d_alpha = self.path.alpha(t), self.path.d_alpha(t)
        # sigma sigma' without sigma' (infinite at the end of the VP path): from alpha^2 + sigma^2 = 1 on two paths.
        sigma_d_sigma = t - 1 if isinstance(self.path, LinearPath) else -alpha * d_alpha
        mean, var = self.moments(t)
        return d_alpha * self.m + (alpha * d_alpha * self.s**2 + sigma_d_sigma) / var * (x - mean)


# --- coefficients


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paths_begin_in_noise_and_end_in_data(path, dtype):
    x0, x1 = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    start, end = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    assert torch.equal(path.interpolate(x0, x1, end), x1)
    assert path.sigma(end).eq(0).all() and path.alpha(end).eq(1).all()
    assert torch.allclose(path.sigma(start), end, atol=1e-4)
    if isinstance(path, VPPath):
        assert torch.allclose(path.alpha(start), torch.full_like(start, math.exp(-5.025)))
    else:
        assert torch.equal(path.interpolate(x0, x1, start), x0)


@each_path
def test_derivatives_and_determinant_belong_to_the_coefficients(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    d_alpha = torch.autograd.grad(path.alpha(t).sum(), t)[0]
    d_sigma = torch.autograd.grad(path.sigma(t).sum(), t)[0]
    determinant = d_alpha * path.sigma(t) - path.alpha(t) * d_sigma
    torch.testing.assert_close(path.d_alpha(t), d_alpha)
    torch.testing.assert_close(path.d_sigma(t), d_sigma)
    torch.testing.assert_close(path.determinant(t), determinant)
    torch.testing.assert_close(
        path.kl_diffusion(t), d_alpha / path.alpha(t) * path.sigma(t) ** 2 - path.sigma(t) * d_sigma
    )


@each_path
def test_target_is_the_time_derivative_of_the_interpolant(path):
    x0, x1 = torch.randn(2, 5, 3, dtype=torch.float64)
    t, h = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 1e-6
    difference = (path.interpolate(x0, x1, t + h) - path.interpolate(x0, x1, t - h)) / (2 * h)
    torch.testing.assert_close(path.target(x0, x1, t), difference, rtol=1e-6, atol=1e-6)


@each_path
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_nothing_is_infinite_at_the_ends(path, end, dtype):
    f, x = torch.randn(2, 3, 5, dtype=dtype)
    t = torch.full((3,), end, dtype=torch.promote_types(dtype, torch.float32))
    for name in ("alpha", "sigma", "d_alpha", "d_sigma", "determinant", "kl_diffusion"):
        assert getattr(path, name)(t).isfinite().all(), name
    for name in [n for n in dir(path) if "_from_" in n] + ["interpolate", "target"]:
        assert getattr(path, name)(f, x, t).isfinite().all(), name
    for weighting in (None, "velocity", "likelihood"):
        weight = loss_weight(path, t, weighting)
        assert weight.isfinite().all() and (weight > 0).all()


# --- conversions


@given(
    path=st.sampled_from([LinearPath(), GVPPath(), VPPath(), VPPath(0.5, 4.0)]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    pair=st.sampled_from([("velocity", "noise"), ("velocity", "score"), ("noise", "score")]),
    unit=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_conversions_are_inverses_of_each_other(path, shape, pair, unit, seed):
    f, x = torch.randn((2, *shape), generator=seeded(seed), dtype=torch.float64)
    t = torch.full(shape[:1], path.t_min + (path.t_max - path.t_min) * unit, dtype=torch.float64)
    for a, b in (pair, pair[::-1]):
        there = getattr(path, f"{b}_from_{a}")(f, x, t)
        torch.testing.assert_close(getattr(path, f"{a}_from_{b}")(there, x, t), f, rtol=1e-8, atol=1e-8)


@each_path
def test_each_sample_has_its_own_time(path):
    f, x = torch.randn(2, 4, 2, 3)
    t = torch.tensor([0.0, 0.3, 0.8, 1.0])
    for name in [n for n in dir(path) if "_from_" in n] + ["interpolate", "target"]:
        convert = getattr(path, name)
        single = torch.stack([convert(f[i], x[i], t[i]) for i in range(4)])
        torch.testing.assert_close(convert(f, x, t), single, msg=name)


@each_path
def test_conversions_are_exact_for_gaussian_data(path):
    """The regular conversions on all of [0, 1], the singular ones inside."""
    g, x = Gaussian(path), torch.randn(41, 6, dtype=torch.float64)
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    v = g.velocity(x, t)
    torch.testing.assert_close(path.noise_from_velocity(v, x, t), g.noise(x, t))
    torch.testing.assert_close(path.data_from_velocity(v, x, t), g.data(x, t))
    torch.testing.assert_close(path.noise_from_score(g.score(x, t), x, t), g.noise(x, t))
    x, v, t = x[1:-1], v[1:-1], t[1:-1]
    torch.testing.assert_close(path.score_from_velocity(v, x, t), g.score(x, t))
    torch.testing.assert_close(path.score_from_noise(g.noise(x, t), x, t), g.score(x, t))
    torch.testing.assert_close(path.velocity_from_score(g.score(x, t), x, t), v)
    torch.testing.assert_close(path.velocity_from_noise(g.noise(x, t), x, t), v)


def test_velocity_and_score_of_the_vp_path_are_exact_at_both_ends():
    path, t = VPPath(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    g, x = Gaussian(path), torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(path.score_from_velocity(g.velocity(x, t), x, t), g.score(x, t))
    torch.testing.assert_close(path.velocity_from_score(g.score(x, t), x, t), g.velocity(x, t))


@each_path
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_as_velocity_hides_what_a_model_predicts(path, prediction):
    g, x = Gaussian(path), torch.randn(7, 3, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    torch.testing.assert_close(as_velocity(getattr(g, prediction), path, prediction)(x, t), g.velocity(x, t))


# --- losses


@each_path
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_exact_prediction_minimises_the_loss(path, prediction):
    """The gradient vanishes along 1 and along x_t, the two directions in which a Gaussian's answer could be wrong."""
    g, n = Gaussian(path), 40_000
    x1 = g.m + g.s * torch.randn(n, 1, generator=seeded(0), dtype=torch.float64)
    x0 = torch.randn(n, 1, generator=seeded(1), dtype=torch.float64)
    t = torch.full((n,), 0.35, dtype=torch.float64)

    def loss(a, b):
        def model(x, t):
            return getattr(g, prediction)(x, t) + a + b * x

        return flow_loss(model, x1, path=path, prediction=prediction, x0=x0, t=t, reduction="none")

    for a, b in ((0.1, 0.0), (0.0, 0.1)):
        gradient = (loss(a, b) - loss(-a, -b)) / 0.2  # exact: the loss is quadratic in a and b
        assert gradient.mean().abs() < 4.5 * gradient.std() / math.sqrt(n)
        assert loss(a, b).mean() > loss(0, 0).mean() < loss(-a, -b).mean()


@each_path
def test_losses_of_the_three_predictions_are_one_up_to_their_weights(path):
    x1, t = torch.randn(6, 3, 4, dtype=torch.float64), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    kwargs = {"path": path, "x0": torch.randn_like(x1), "t": t, "reduction": "none"}
    velocity = flow_loss(toy, x1, **kwargs)
    noise = flow_loss(
        lambda x, t: path.noise_from_velocity(toy(x, t), x, t), x1, prediction="noise", weighting="velocity", **kwargs
    )
    score = flow_loss(
        lambda x, t: path.score_from_velocity(toy(x, t), x, t), x1, prediction="score", weighting="velocity", **kwargs
    )
    torch.testing.assert_close(noise, velocity)
    torch.testing.assert_close(score, velocity)


def test_loss_is_a_mean_over_samples_that_do_not_touch_each_other():
    x1, x0, t = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.rand(4)
    per_sample = flow_loss(toy, x1, x0=x0, t=t, reduction="none")
    assert per_sample.shape == (4,)
    torch.testing.assert_close(flow_loss(toy, x1, x0=x0, t=t), per_sample.mean())
    single = torch.stack([flow_loss(toy, x1[i : i + 1], x0=x0[i : i + 1], t=t[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(per_sample, single)


def test_loss_of_half_precision_data_is_float32_and_the_model_sees_the_data_type():
    seen = []

    def model(x, t):
        seen.append((x.dtype, t.dtype))
        return toy(x, t).to(x.dtype)

    loss = flow_loss(model, torch.randn(2, 3, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32 and seen == [(torch.bfloat16, torch.float32)]


def test_generator_alone_decides_the_loss():
    x1 = torch.randn(3, 4)
    before = torch.get_rng_state()
    first, again, other = (flow_loss(toy, x1, generator=seeded(s)) for s in (5, 5, 6))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_published_losses():
    tensors, entries = load_file(DATA / "transport.safetensors"), json.loads((DATA / "transport.json").read_text())
    assert len(entries["loss"]) == 27
    for entry, recorded in zip(entries["loss"], tensors["loss"], strict=True):
        path = PATHS[entry["path"].lower()]()
        kwargs = {k: entry[k] for k in ("prediction", "weighting")}
        loss = flow_loss(toy, tensors["x1"], path=path, generator=seeded(11), reduction="none", **kwargs)
        torch.testing.assert_close(loss, recorded, rtol=1e-5, atol=0, msg=lambda m, e=entry: f"{e}: {m}")


@each_path
def test_published_conversions(path):
    tensors = load_file(DATA / "transport.safetensors")
    name = next(n for n, p in PATHS.items() if isinstance(path, p))
    own = {k.removeprefix(f"conversion.{name}."): v for k, v in tensors.items() if k.startswith(f"conversion.{name}.")}
    x, t, close = own["x"], own["t"], {"rtol": 1e-5, "atol": 1e-5}
    given = x / 2 + 1
    torch.testing.assert_close(path.score_from_velocity(given, x, t), own["score_from_given"], **close)
    torch.testing.assert_close(path.noise_from_velocity(given, x, t), own["noise_from_given"], **close)
    torch.testing.assert_close(path.velocity_from_score(given, x, t), own["velocity_from_given"], **close)
    torch.testing.assert_close(path.interpolate(x, tensors["x1"], t), own["x_t"], **close)
    torch.testing.assert_close(path.target(x, tensors["x1"], t), own["u_t"], **close)
    forms = {k.rpartition(".")[2]: v for k, v in own.items() if k.startswith("diffusion_1.3")}
    assert len(forms) == 6
    for form, w in forms.items():
        torch.testing.assert_close(diffusion_coefficient(form, t, path, 1.3), w.expand(3), **close)


# --- times


@given(low=st.floats(0, 0.5), width=st.floats(0, 0.5), method=st.sampled_from(["uniform", "logit-normal"]))
@settings(deadline=None)
def test_times_stay_in_their_interval(low, width, method):
    t = sample_time(64, method, (low, low + width), generator=seeded(0))
    assert t.shape == (64,) and t.dtype == torch.float32
    assert (t >= low - 1e-6).all() and (t <= low + width + 1e-6).all()


@pytest.mark.parametrize("method", ["uniform", "logit-normal"])
def test_times_follow_their_distribution(method):
    n, mean, std = 20_000, -0.5, 0.8
    t = sample_time(n, method, mean=mean, std=std, generator=seeded(0)).sort().values.double()
    z = (torch.logit(t) - mean) / std
    cdf = t if method == "uniform" else 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    ranks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (cdf - ranks).abs().max() < 1.63 / math.sqrt(n)  # Kolmogorov and Smirnov at 1 %


# --- mistakes


@pytest.mark.parametrize(
    ("mistake", "known"),
    [
        (lambda: flow_loss(toy, torch.randn(2, 3), prediction="x0"), "velocity, noise, score"),
        (lambda: flow_loss(toy, torch.randn(2, 3), prediction="noise", weighting="snr"), "velocity, likelihood"),
        (lambda: flow_loss(toy, torch.randn(2, 3), time_sampling="beta"), "uniform, logit-normal"),
        (lambda: flow_loss(toy, torch.randn(2, 3), reduction="sum"), "mean, none"),
        (lambda: as_velocity(toy, prediction="eps"), "velocity, noise, score"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(mistake, known):
    with pytest.raises(ValueError, match="unknown .*expected one of .*" + known):
        mistake()


def test_a_model_of_the_wrong_shape_is_refused_rather_than_broadcast():
    with pytest.raises(ValueError, match=r"shape \(4, 1\): expected that of the data, \(4, 3\)"):
        flow_loss(lambda x, t: t[:, None], torch.randn(4, 3))


@pytest.mark.parametrize("path", [LinearPath(), GVPPath(), VPPath()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_every_model_becomes_a_velocity_of_the_linear_path(path, prediction):
    """Of data N(m, s^2): the exact prediction of any kind and path, turned, is the exact velocity of the linear one."""
    m, s = 0.7, 0.5

    def exact(path, x, t):
        alpha, sigma = expand_time(path.alpha(t), x), expand_time(path.sigma(t), x)
        variance = (alpha * s) ** 2 + sigma**2
        data = m + alpha * s**2 / variance * (x - alpha * m)
        noise = sigma / variance * (x - alpha * m)
        return {
            "velocity": expand_time(path.d_alpha(t), x) * data + expand_time(path.d_sigma(t), x) * noise,
            "noise": noise, "score": -(x - alpha * m) / variance,
        }  # fmt: skip

    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.02 if prediction == "velocity" else 0.05, 0.98, 50, dtype=torch.float64)
    turned = linear_velocity(lambda x, t: exact(path, x, t)[prediction], path, prediction)
    torch.testing.assert_close(turned(x, t), exact(LinearPath(), x, t)["velocity"], rtol=1e-4, atol=1e-4)
    for end in (0.0, 1.0):
        assert turned(x.float(), torch.full((50,), end)).isfinite().all()
    ratio = torch.tensor([0.02, 0.5, 1.0, 3.0, 100.0], dtype=torch.float64)
    times = path.time_of_ratio(ratio)
    torch.testing.assert_close(path.alpha(times) / path.sigma(times), ratio, rtol=1e-6, atol=1e-9)
