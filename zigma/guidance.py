"""Classifier-free guidance: one velocity field made from a conditional and an unconditional one.

Ho and Salimans 2022 (arXiv 2207.12598) guide the score. Score and velocity at a given x and t are related by an affine
map (SiT, arXiv 2401.08740, (9)), which an extrapolation passes through, so the same rule holds for the velocity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .flow import Velocity, expand_time

ConditionalModel = Callable[..., Tensor]  # (x (b, ...), t (b,), y (b, ...) or None) -> v (b, ...)


def _encoded(model: ConditionalModel, y: Tensor | None):
    """What the model needs of y at every step, computed once if it can do that (`ZigMa.encode_condition`)."""
    encode = getattr(model, "encode_condition", None)
    return y if y is None or encode is None else encode(y)


def _null_like(null: Tensor, cond: Tensor) -> Tensor:
    """null, given for one sample or for all, as one row for each row of cond."""
    if null.ndim == cond.ndim - 1:
        null = null.unsqueeze(0)
    if null.shape[1:] != cond.shape[1:] or len(null) not in (1, len(cond)):
        raise ValueError(
            f"guidance evaluates both conditions in one batch: expected a null condition of shape {tuple(cond.shape)} "
            f"or of one row of it, got {tuple(null.shape)}"
        )
    return null.to(cond).expand_as(cond)


def _rescale(guided: Tensor, cond: Tensor, amount: float) -> Tensor:
    """Lin et al. 2023 (arXiv 2305.08891) section 3.4: bring the guided deviation back towards the conditional one."""
    dims = tuple(range(1, cond.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-12)
    return guided * (1 + amount * (ratio - 1))


def classifier_free(
    model: ConditionalModel,
    cond: Tensor | None,
    null: Tensor | None,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Velocity:
    """velocity(x, t) = v_null + scale (v_cond - v_null), both evaluated by `model(x, t, y)` in one batch.

    cond      labels (b,) or text features (b, n, d) of the batch; null the same for the trained null condition, or a
              single row of it. None where the model takes no condition, which scale must then be 1.
    scale     1 is no guidance and one evaluation of `cond` alone; 0 is unconditional.
    interval  guide only where low <= t <= high (Kynkäänniemi et al. 2024, arXiv 2404.07724); a step where no sample is
              inside costs one evaluation, like scale 1.
    rescale   from 0 (off) to 1, how far to undo the growth of the velocity's standard deviation.
    """
    if scale == 1:
        encoded = _encoded(model, cond)
        return lambda x, t: model(x, t, encoded)
    if cond is None or null is None:
        missing = "condition" if cond is None else "null condition"
        raise ValueError(f"guidance at scale {scale:g} got no {missing}: give one, or use scale 1")
    null = _null_like(null, cond)
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"the guidance interval runs from low to high t: expected low <= high, got {interval}")

    both, alone = _encoded(model, torch.cat([cond, null])), None if interval is None else _encoded(model, cond)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if len(cond) != len(x):
            raise ValueError(f"got {len(cond)} conditions for a batch of {len(x)}: expected one for each sample")
        inside = None if interval is None else (interval[0] <= t) & (t <= interval[1])
        if inside is not None and not inside.any():
            return model(x, t, alone)
        v_cond, v_null = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        v = v_null + scale * (v_cond - v_null)
        if rescale:
            v = _rescale(v, v_cond, rescale)
        return v if inside is None else torch.where(expand_time(inside, x), v, v_cond)

    return velocity
