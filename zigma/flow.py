"""Interpolants between noise and data: paths, predictions, training losses.

Sources, cited below by these names:
    SiT     Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models ...", arXiv 2401.08740
    SI      Albergo, Boffi, Vanden-Eijnden 2023, "Stochastic Interpolants", arXiv 2303.08797
    ZigMa   Hu et al. 2024, arXiv 2403.13802, which trains on the linear path with velocity prediction

Direction of time. Here, as in ZigMa, t = 0 is noise and t = 1 is data. SiT's text runs the other way (its code does
not), so its equations hold with t replaced by 1 - t and the sign of every time derivative turned.

    x0  noise ~ N(0, I)             x_t = alpha x1 + sigma x0              SiT (1)
    x1  data                        u_t = alpha' x1 + sigma' x0            the regression target, SiT (7)
    v   velocity  E[u_t | x_t]      dx = v dt carries noise to data        SiT (2), (3)
    s   score     grad log p_t      s = -eps / sigma                       SiT (5)
    eps noise     E[x0 | x_t]       alpha v = alpha' x - D eps             SiT (8), (9) solved for v
    D   determinant alpha' sigma - alpha sigma' > 0, the denominator of SiT (9)

What is finite at the ends. alpha vanishes at t = 0 and sigma at t = 1 (for VP also sigma' is infinite at t = 1). The
conversions that never divide by these are exact on all of [0, 1]. The others are 0/0 at one end, where the prediction
given no longer determines the one asked for; there the vanishing denominator is taken at t_min or t_max, which keeps
the result finite and changes nothing inside [t_min, t_max].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (b, ...), t (b,)) -> v (b, ...)


def choose(table: Mapping[str, T], name: str, what: str) -> T:
    """Entry `name` of `table`, in any letter case; ValueError listing the known names otherwise."""
    key = name.lower() if isinstance(name, str) else name
    if key not in table:
        raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(table)}")
    return table[key]


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """t (b,) or () as (b, 1, ..., 1), ready to multiply x (b, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def randn_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of x's shape, drawn where the generator lives, so that a CPU seed means one noise anywhere.

    Half precisions get noise drawn in float32 and rounded: the stream of a seed does not depend on them.
    """
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=dtype).to(x)


class Path(ABC):
    """A pair of coefficients alpha(t), sigma(t) and everything that follows from them.

    Coefficients take t of any shape and keep it. The other methods take x (b, ...) with t (b,) or ().
    """

    t_min: ClassVar[float] = 1e-3  # 1/alpha is taken at max(t, t_min)
    t_max: ClassVar[float] = 1 - 1e-3  # 1/sigma is taken at min(t, t_max)
    velocity_interval: ClassVar[tuple[float, float]] = (0.0, 1.0)  # where u_t is bounded

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data: increasing, alpha(1) = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise: decreasing, sigma(1) = 0 exactly."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha by t."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma by t."""

    @abstractmethod
    def determinant(self, t: Tensor) -> Tensor:
        """D = alpha' sigma - alpha sigma', simplified so that it neither cancels nor divides zero by zero."""

    @abstractmethod
    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """t where alpha / sigma = ratio >= 0 (infinite at t = 1)."""

    def safe_alpha(self, t: Tensor) -> Tensor:
        """alpha where it stands in a denominator."""
        return self.alpha(t.clamp(min=self.t_min))

    def safe_sigma(self, t: Tensor) -> Tensor:
        """sigma where it stands in a denominator."""
        return self.sigma(t.clamp(max=self.t_max))

    def kl_diffusion(self, t: Tensor) -> Tensor:
        """sigma D / alpha = (alpha'/alpha) sigma^2 - sigma sigma': half of w^KL, SiT (13); beta/2 for the VP path."""
        return self.sigma(t) * self.determinant(t) / self.safe_alpha(t)

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x1 + sigma x0, SiT (1)."""
        t = expand_time(t, x1)
        return self.alpha(t) * x1 + self.sigma(t) * x0

    def target(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """u_t = alpha' x1 + sigma' x0, the target of SiT (7)."""
        t = expand_time(t, x1)
        return self.d_alpha(t) * x1 + self.d_sigma(t) * x0

    # Conversions: each takes (prediction, x, t) and none looks at the data. E[x_t | x_t = x] = x is SiT (8).

    def noise_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """eps = (alpha' x - alpha v) / D; exact on [0, 1]."""
        t = expand_time(t, x)
        return (self.d_alpha(t) * x - self.alpha(t) * v) / self.determinant(t)

    def velocity_from_noise(self, eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (alpha' x - D eps) / alpha; 0/0 at t = 0."""
        t = expand_time(t, x)
        return (self.d_alpha(t) * x - self.determinant(t) * eps) / self.safe_alpha(t)

    def noise_from_score(self, s: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """eps = -sigma s, SiT (5); exact on [0, 1]."""
        return -self.sigma(expand_time(t, x)) * s

    def score_from_noise(self, eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """s = -eps / sigma, SiT (5); 0/0 at t = 1."""
        return -eps / self.safe_sigma(expand_time(t, x))

    def score_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """s = (alpha v - alpha' x) / (sigma D), SiT (9); 0/0 at t = 1 but for the VP path."""
        return self.score_from_noise(self.noise_from_velocity(v, x, t), x, t)

    def velocity_from_score(self, s: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (alpha' x + sigma D s) / alpha, SiT (9) solved for v; 0/0 at t = 0 but for the VP path."""
        return self.velocity_from_noise(self.noise_from_score(s, x, t), x, t)

    def data_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """E[x1 | x_t = x] = (sigma v - sigma' x) / D; exact on [0, 1]. Tweedie's formula without the division."""
        t = expand_time(t, x)
        return (self.sigma(t) * v - self.d_sigma(t) * x) / self.determinant(t)


@dataclass(frozen=True)
class LinearPath(Path):
    """alpha = t, sigma = 1 - t, SiT (12): v = x1 - x0 along straight lines. The path of every released ZigMa."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def determinant(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return 1 - 1 / (1 + ratio)


@dataclass(frozen=True)
class GVPPath(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2), SiT (12): alpha^2 + sigma^2 = 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # not cos(pi t / 2), which is -4e-8 at t = 1 in float32

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.alpha(t)

    def determinant(self, t: Tensor) -> Tensor:
        return torch.full_like(t, math.pi / 2)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(ratio)


@dataclass(frozen=True)
class VPPath(Path):
    """The variance preserving diffusion of SiT (10), (11), with beta(t) = beta_min + (1 - t)(beta_max - beta_min).

    alpha = exp(l), sigma = sqrt(1 - exp(2 l)), l = -1/4 (1 - t)^2 (beta_max - beta_min) - 1/2 (1 - t) beta_min, hence
    l' = beta / 2. Because alpha^2 + sigma^2 = 1 the velocity is v = l' (x + s), and what relates v and s is exact on
    [0, 1]. alpha(0) = exp(-5.025), not 0: starting from pure noise leaves that much bias, as in every VP diffusion.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    t_min: ClassVar[float] = 0.0  # alpha never vanishes
    t_max: ClassVar[float] = 1 - 1e-5  # sigma' and D grow like (1 - t)^(-1/2)
    velocity_interval: ClassVar[tuple[float, float]] = (0.0, 1 - 1e-5)

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (1 - t) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - t) * self.beta_min

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """l' = beta(t) / 2, at least beta_min / 2."""
        return 0.5 * (1 - t) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.d_log_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -(self.alpha(t) ** 2) * self.d_log_alpha(t) / self.safe_sigma(t)

    def determinant(self, t: Tensor) -> Tensor:
        return self.d_alpha(t) / self.safe_sigma(t)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """Of log alpha = -1/2 log(1 + 1 / ratio^2), quadratic in 1 - t; 0 for what is noisier than alpha(0)."""
        minus = 0.5 * torch.log1p(ratio.clamp(min=1e-12) ** -2)
        a, b = 0.25 * (self.beta_max - self.beta_min), 0.5 * self.beta_min
        return (1 - (torch.sqrt(b * b + 4 * a * minus) - b) / (2 * a)).clamp(min=0)

    def kl_diffusion(self, t: Tensor) -> Tensor:
        return self.d_log_alpha(t)

    def noise_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.noise_from_score(self.score_from_velocity(v, x, t), x, t)

    def score_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return v / self.d_log_alpha(expand_time(t, x)) - x

    def velocity_from_score(self, s: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.d_log_alpha(expand_time(t, x)) * (x + s)

    def data_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (x - self.sigma(expand_time(t, x)) * self.noise_from_velocity(v, x, t)) / self.alpha(expand_time(t, x))


NOISIEST = 0.05  # alpha / sigma, of models that predict noise or score: see linear_velocity

PATHS: dict[str, type[Path]] = {"linear": LinearPath, "gvp": GVPPath, "vp": VPPath}
LINEAR = LinearPath()


def as_velocity(model: Velocity, path: Path = LINEAR, prediction: str = "velocity") -> Velocity:
    """The velocity field of a model that was trained to predict "velocity", "noise" or "score"."""
    convert = choose(
        {
            "velocity": lambda f, x, t: f,
            "noise": path.velocity_from_noise,
            "score": path.velocity_from_score,
        },
        prediction,
        "prediction",
    )
    return lambda x, t: convert(model(x, t), x, t)


def linear_velocity(model: Velocity, path: Path, prediction: str = "velocity") -> Velocity:
    """The velocity on the *linear* path of a model that was trained on another, or to predict something else.

    What two paths call x at equal ratios of data and noise differs by a factor alone (Karras et al. 2022, arXiv
    2206.00364, section 2: scale and noise level). With r = alpha / sigma the linear path stands at t = r / (1 + r), and

        x_path = (alpha + sigma) x_linear,    v_linear = E[x1] - E[x0]

    so one solver, one schedule and one host sampler serve every model. x (b, ...), t (b,) of the linear path.

    What predicts noise tells nothing about the data where there is nothing but noise: E[x1] is its error divided by
    alpha. Such models are asked at no noisier time than that of alpha / sigma = 1/20 (Stable Diffusion's noisiest is at
    0.068), where noise looks the same.
    """
    if isinstance(path, LinearPath) and prediction == "velocity":
        return model
    least, most = path.velocity_interval
    if prediction != "velocity":
        least, most = path.time_of_ratio(torch.tensor(NOISIEST)).item(), path.t_max

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        own = path.time_of_ratio(t / (1 - t).clamp(min=torch.finfo(t.dtype).tiny))
        own = own.clamp(least, most)
        scale = path.alpha(own) + path.sigma(own)
        x = expand_time(scale, x).to(x.dtype) * x
        v = as_velocity(model, path, prediction)(x, own)
        return path.data_from_velocity(v, x, own) - path.noise_from_velocity(v, x, own)

    return velocity


def sample_time(
    batch: int,
    method: str = "uniform",
    interval: tuple[float, float] = (0.0, 1.0),
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training times (batch,), float32, in `interval`, one per sample.

    "uniform", or "logit-normal": t = sigmoid(n), n ~ N(mean, std^2), Esser et al. 2024 (arXiv 2403.03206) section 3.1.
    Here t = 1 is data, so a negative mean dwells on noisy samples; there it is the other way round.
    """
    draw = choose({"uniform": torch.rand, "logit-normal": torch.randn}, method, "time sampling")
    unit = draw(batch, generator=generator, device=device if generator is None else generator.device)
    if draw is torch.randn:
        unit = torch.sigmoid(mean + std * unit)
    low, high = interval
    return (low + (high - low) * unit).to(device or unit.device)


def loss_weight(path: Path, t: Tensor, weighting: str | None) -> Tensor:
    """Weight of noise and score losses, SiT appendix A.3, of t's shape.

    None is 1; "velocity" (D / alpha)^2 makes them the velocity loss in disguise; "likelihood" D / (alpha sigma)
    bounds the likelihood. Both diverge at an end and are finite here (see the top of the file).
    """
    if weighting is None:
        return torch.ones_like(t)
    drift = path.determinant(t) / path.safe_alpha(t)  # kl_diffusion / sigma
    weights = {"velocity": lambda: drift**2, "likelihood": lambda: drift / path.safe_sigma(t)}
    return choose(weights, weighting, "loss weighting (or None)")()


def flow_loss(
    model: Velocity,
    x1: Tensor,
    *,
    path: Path = LINEAR,
    prediction: str = "velocity",
    weighting: str | None = None,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    time_sampling: str = "uniform",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Regression loss of `model(x_t, t)` on data x1 (b, ...), in float32 or better.

        velocity   |f - u_t|^2              SiT (7)
        noise      w |f - x0|^2             SiT (6) with f = -sigma s
        score      w |sigma f + x0|^2       SiT (6)

    averaged over all but the batch dimension. Conditions belong into `model` (`lambda x, t: net(x, t, y)`).
    `weighting` (see `loss_weight`) does not touch velocity prediction. Without x0 and t they are drawn from
    `generator`, noise first, t from the interval where the loss is bounded.
    Returns a scalar, or (b,) with reduction="none". ValueError if the model's output has another shape than x1.
    """
    choose(dict.fromkeys(("velocity", "noise", "score")), prediction, "prediction")
    choose(dict.fromkeys(("mean", "none")), reduction, "reduction")
    if x0 is None:
        x0 = randn_like(x1, generator)
    if t is None:
        interval = path.velocity_interval if prediction == "velocity" else (path.t_min, path.t_max)
        t = sample_time(len(x1), time_sampling, interval, generator=generator, device=x1.device)

    f = model(path.interpolate(x0, x1, t).to(x1.dtype), t)
    if f.shape != x1.shape:
        raise ValueError(f"the model returned shape {tuple(f.shape)}: expected that of the data, {tuple(x1.shape)}")
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    if prediction == "velocity":
        error, w = f - path.target(x0, x1, t), torch.ones_like(t)
    elif prediction == "noise":
        error, w = f - x0, loss_weight(path, t, weighting)
    else:
        error, w = path.sigma(expand_time(t, f)) * f + x0, loss_weight(path, t, weighting)
    per_sample = w * error.square().flatten(1).mean(1)
    return per_sample.mean() if reduction == "mean" else per_sample
