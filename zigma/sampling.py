"""From prompts to pictures without a host: noise, guided velocity, solver, decoder.

What picture i of a prompt looks like depends on the model, the prompt, the seed and the settings, and on nothing else
that is asked for beside it: the noise of a prompt's pictures is one draw of shape (count, channels, [frames,] height,
width) from a CPU generator, as ComfyUI draws it for an empty latent of that batch size.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from .checkpoint import Bundle
from .flow import PATHS, Path, choose, linear_velocity
from .guidance import classifier_free
from .solvers import ODE_SOLVERS, solve_ode

__all__ = ["SamplingSettings", "flow_of", "initial_noise", "sample"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (steps done, of how many): the latter is 0 where the solver chooses them


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How to integrate: a file's own settings stand in its metadata under "zigma.sampling".

    Attributes:
        steps: intervals of the time grid; dopri5 chooses its own and ignores this.
        solver: one of solvers.ODE_SOLVERS.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    steps: int = 30
    solver: str = "heun"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"got {self.steps!r} steps, but expected a whole number from 1")
        if self.solver not in ODE_SOLVERS:
            raise ValueError(f"got the solver {self.solver!r}, but expected one of {', '.join(ODE_SOLVERS)}")
        number = isinstance(self.guidance, int | float) and not isinstance(self.guidance, bool)
        if not number or not abs(self.guidance) < float("inf"):
            raise ValueError(f"got the guidance {self.guidance!r}, but expected a number, such as 1 for none")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> SamplingSettings:
        """The settings that a file recommends, and this class's defaults for what it leaves open."""
        text = metadata.get("zigma.sampling", "{}")
        try:
            stated = json.loads(text)
            return cls(**{field.name: stated[field.name] for field in dataclasses.fields(cls) if field.name in stated})
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the model file recommends {text[:60]!r} as zigma.sampling, which cannot be read ({error}): give "
                "steps, solver and guidance, or write the file again"
            ) from error


@torch.no_grad()
def sample(
    bundle: Bundle,
    prompts: Sequence[str | int] | torch.Tensor | None = None,
    *,
    count: int = 1,
    seed: int = 0,
    settings: SamplingSettings | None = None,
    negative: str = "",
    batch_size: int = 8,
    noise: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Draw `count` pictures for each prompt.

    Args:
        bundle: what `load_bundle` returns.
        prompts: texts for a text model, or their features (n, tokens, width); labels for a class model, a list or
            (n,), or their names if its file has them; None for a model without conditions. Guidance needs a null
            condition, which `bundle.condition` tells of; no released model was trained on one.
        count: pictures for each prompt.
        seed: of the noise, the same for every prompt.
        settings: None takes those that the file recommends.
        negative: the text that guidance leads away from.
        batch_size: pictures computed at once: a matter of speed and memory, of the result only with dopri5, whose
            error control looks at a batch as a whole.
        noise: latents to begin from, as `initial_noise` makes them, one for each prompt, in place of count and seed.
        progress: called as progress(done, total) before each step and at the end.

    Returns:
        (len(prompts) * count, 3, H, W) float32 on the CPU, in [-1, 1], the pictures of a prompt one after another; of a
        video model (len(prompts) * count, frames, 3, H, W).

    Raises:
        ValueError: for prompts that the model cannot take, a file that lacks a part, or impossible settings.
    """
    settings = settings or SamplingSettings.from_metadata(bundle.metadata)
    if count < 1 or batch_size < 1:
        raise ValueError(f"got count {count} and batch size {batch_size}, but expected at least 1 of each")
    if not bundle.latent.pixel_space and bundle.autoencoder is None:
        raise ValueError("there is no autoencoder to decode the latents: give one, or use the file in ComfyUI")
    condition, null = _conditions(bundle, prompts, negative, settings.guidance)
    if noise is not None:
        noise = _given_noise(bundle, noise, condition, count)
    else:
        noise = initial_noise(bundle, count, seed)
        if condition is not None:
            noise = noise.repeat(len(condition), *[1] * (noise.dim() - 1))
            condition = condition.repeat_interleave(count, dim=0)

    flow, starts, done = flow_of(bundle.metadata), range(0, len(noise), batch_size), 0
    total = 0 if settings.solver == "dopri5" else len(starts) * settings.steps

    def on_step(*_) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total)
        done += 1

    pictures = []
    for start in starts:
        part = slice(start, start + batch_size)
        y = None if condition is None else condition[part]
        velocity = classifier_free(bundle.model, y, null, settings.guidance)
        velocity = linear_velocity(velocity, *flow)
        latents = solve_ode(velocity, noise[part], settings.steps, settings.solver, callback=on_step)
        pictures.append(_decode(bundle, latents).float().cpu())
    if progress is not None:
        progress(done, done)
    return torch.cat(pictures)


def _given_noise(bundle: Bundle, noise: torch.Tensor, condition: torch.Tensor | None, count: int) -> torch.Tensor:
    if count != 1 or (condition is not None and len(condition) != len(noise)):
        prompted = 0 if condition is None else len(condition)
        raise ValueError(
            f"got {len(noise)} noises for {prompted} prompts and count {count}, but expected one for each prompt and "
            "count 1"
        )
    return _for_model(bundle, noise)


def flow_of(metadata: Mapping[str, str]) -> tuple[Path, str]:
    """Path and prediction that a file's model was trained with: linear and velocity unless it says otherwise."""
    stated = json.loads(metadata.get("zigma.flow", "{}"))
    return choose(PATHS, stated.get("path", "linear"), "flow path")(), stated.get("prediction", "velocity")


def _for_model(bundle: Bundle, noise: torch.Tensor) -> torch.Tensor:
    """On the model's device, and in the dtype that its first layer takes."""
    weight = bundle.model.x_embedder.proj.weight
    return noise.to(weight.device, weight.dtype if weight.is_floating_point() else None)


def initial_noise(bundle: Bundle, count: int, seed: int) -> torch.Tensor:
    """Standard normal latents (count, [frames,] channels, height, width) on the model's device, drawn on the CPU."""
    config = bundle.model.config
    frames = [config.video_frames] * (config.video_frames > 0)
    generator = torch.Generator("cpu").manual_seed(seed)
    # Channels before frames, as ComfyUI has them: the same seed is the same noise there.
    noise = torch.randn((count, config.in_channels, *frames, *config.img_dim), generator=generator)
    noise = noise.transpose(1, 2).contiguous() if frames else noise
    return _for_model(bundle, noise)


def _conditions(
    bundle: Bundle, prompts: Sequence[str | int] | torch.Tensor | None, negative: str, guidance: float
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(condition of each prompt, null condition), as the model takes them."""
    config = bundle.model.config
    device = next(bundle.model.parameters()).device
    if config.conditioning == "none":
        if prompts is not None or negative:
            raise ValueError("got prompts, but this model takes no condition: leave them out")
        if guidance != 1:
            raise ValueError(f"got guidance {guidance:g}, but this model takes no condition to guide by: set it to 1")
        return None, None
    if config.conditioning == "class" and getattr(prompts, "ndim", None) == 1:  # labels of numpy or torch
        prompts = prompts.tolist()
    if isinstance(prompts, torch.Tensor):
        if not config.has_text or prompts.dim() != 3 or prompts.shape[2] != config.d_context:
            raise ValueError(
                f"got text features of shape {tuple(prompts.shape)}, but this model takes "
                + (f"(n, tokens, {config.d_context})" if config.has_text else f"the condition {config.conditioning!r}")
            )
        if guidance == 1:
            return prompts.to(device), None
        if bundle.text_encoder is None:
            raise ValueError(f"got guidance {guidance:g}, but the features come without a null condition: set it to 1")
        return prompts.to(device), bundle.text_encoder.encode([negative])
    if not prompts:
        wanted = "a text" if config.conditioning == "text" else f"a label from 0 to {config.num_classes - 1}"
        raise ValueError(f"got no prompts, but this model takes {wanted} for each picture: give at least one")
    if config.conditioning == "class":
        return _label_conditions(bundle, prompts, negative, guidance)
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"got the prompts {list(prompts)}, but this model takes texts")
    if bundle.text_encoder is None:
        raise ValueError(
            f"the file carries no text encoder: its model takes text features of width {config.d_context} from another "
            "one, such as CLIP, which the option --clip and ComfyUI can load"
        )
    if guidance != 1 and not negative and not bundle.condition.has_null:
        log.warning(
            "guidance %g leads away from the empty text, which this model was not trained on as far as its file says: "
            "pictures may be worse than with guidance 1", guidance,
        )  # fmt: skip
    # Each text once: a product may round otherwise for several equal ones than for one of them.
    places = {text: place for place, text in enumerate(dict.fromkeys(prompts))}
    features = bundle.text_encoder.encode(list(places))[[places[prompt] for prompt in prompts]]
    return features, bundle.text_encoder.encode([negative])


def _label_conditions(
    bundle: Bundle, labels: Sequence[str | int], negative: str, guidance: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    facts, count = bundle.condition, bundle.model.config.num_classes
    device = next(bundle.model.parameters()).device
    if guidance != 1 and not facts.has_null:
        raise ValueError(f"got guidance {guidance:g}, but this class model has no null label: set guidance to 1")
    chosen = torch.tensor([facts.label(label, count) for label in labels], device=device)
    if guidance == 1:
        return chosen, None
    away_from = facts.label(negative, count) if negative else facts.null
    return chosen, torch.tensor([away_from], device=device)


def _decode(bundle: Bundle, latents: torch.Tensor) -> torch.Tensor:
    """Latents of the model (b, [f,] c, h, w) -> images (b, [f,] 3, H, W) in [-1, 1], frame by frame."""
    if not latents.isfinite().all():
        raise ValueError(
            "the model made latents that are no numbers: `python -m zigma inspect` says whether its file is sound; "
            "else take a smaller guidance, or float32"
        )
    if bundle.latent.pixel_space:
        return latents.clamp(-1, 1)
    latents = bundle.latent.to_vae(latents)
    if latents.dim() == 4:
        return bundle.autoencoder.decode(latents)
    return torch.stack([bundle.autoencoder.decode(frame) for frame in latents.unbind(1)], dim=1)
