"""Which backend runs: chosen by device and dtype, or forced by name; said once through logging.

A backend is a module with NAME and these functions; scan and conv as in custom_ops.py, without autograd:

    unavailable() -> str | None         why it cannot run on this machine, with the remedy
    unsupported(*tensors) -> str | None why it cannot take tensors of these devices and dtypes; a tensor may be None
    MAX_STATES, MAX_CONV_WIDTH          optional: the most states per channel and taps of a convolution that it takes
    describe() -> str                   what exactly runs, for the log line
    states_shape(b, l, d, n)            shape of what scan_forward keeps for backward
    scan_forward, scan_backward, conv_forward, conv_backward
    scan_over, conv_over_x              optional: the result in the memory of an input that nobody needs any more
    norm_forward, norm_backward         optional: the pass between two mixers, as in stream.py
    norm_into                           optional: norm_forward with its results in memory that nobody needs any more
"""

from __future__ import annotations

import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import mamba_backend, native, reference, torch_backend, triton_backend

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {
    module.NAME: module for module in (mamba_backend, triton_backend, native, torch_backend, reference)
}
ENVIRONMENT_VARIABLE = "ZIGMA_SCAN_BACKEND"

# The first that can run does, or else torch, which always can. What is not named here (MPS, XPU, ...) has torch alone.
# "cuda" is also what torch calls AMD's GPUs, where mamba-ssm's kernels say that they cannot run.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("native",), "cuda": ("mamba-ssm", "triton")}

TAKEN_BY_ALL, NO_LIMITS = (16, 4), (0, 0)  # states per channel, taps of a convolution

_said: set[str] = set()
_chosen: dict[tuple, str] = {}  # the choice looks at files and environment, and a layer asks for it several times


class _Kind(NamedTuple):
    """What of a tensor decides: a constant while a graph is traced, which a tensor is not."""

    device: torch.device
    dtype: torch.dtype


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine now, fastest first."""
    return tuple(name for name, module in BACKENDS.items() if module.unavailable() is None)


def explain_backends() -> dict[str, str]:
    """Every backend by name, fastest first: what exactly would run, or why it cannot and the remedy."""
    reasons = {name: module.unavailable() for name, module in BACKENDS.items()}
    return {
        name: BACKENDS[name].describe() if reason is None else f"cannot run here: {reason}"
        for name, reason in reasons.items()
    }


def select_backend(name: str | None, *tensors: Tensor | None, states: int = 0, conv_width: int = 0) -> str:
    """The backend for these inputs. `name`, or else ZIGMA_SCAN_BACKEND, forces one.

    states, conv_width: states per channel of a scan, taps of a convolution.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot run here or cannot take these inputs.
    """
    # What every backend takes decides nothing, and a tracer need not know it.
    limits = NO_LIMITS
    if states > TAKEN_BY_ALL[0] or conv_width > TAKEN_BY_ALL[1]:
        limits = (states, conv_width)
    return _select(name, limits, *dict.fromkeys((t.device, t.dtype) for t in tensors if t is not None))


def _select(name: str | None, limits: tuple[int, int], *kinds: tuple[torch.device, torch.dtype]) -> str:
    key = (name, os.environ.get(ENVIRONMENT_VARIABLE), limits, *kinds)
    if key not in _chosen:
        _chosen[key] = _choose(name, limits, tuple(_Kind(*kind) for kind in kinds))
    return _chosen[key]


# What torch.compiler.assume_constant_result does, without importing the compiler: a traced graph keeps the choice.
_select._dynamo_marked_constant = True


def forget_choices() -> None:
    """Choose, and say, anew from the next call on: after a library or the environment has changed."""
    _chosen.clear()
    _said.clear()


def _unsupported(module: ModuleType, limits: tuple[int, int], kinds: tuple[_Kind, ...]) -> str | None:
    states, conv_width = limits
    if states > (most := getattr(module, "MAX_STATES", states)):
        return f"takes at most {most} states per channel, not {states}"
    if conv_width > (most := getattr(module, "MAX_CONV_WIDTH", conv_width)):
        return f"takes convolutions of at most {most} taps, not {conv_width}"
    return module.unsupported(*kinds)


def _choose(name: str | None, limits: tuple[int, int], kinds: tuple[_Kind, ...]) -> str:
    source = "asked for by the caller" if name else f"set by {ENVIRONMENT_VARIABLE}"
    name = name or os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        return _forced(name, source, limits, kinds)
    device, broken, passed_over = kinds[0].device.type, [], []
    for candidate in PREFERENCE.get(device, ()):
        module = BACKENDS[candidate]
        if (reason := module.unavailable()) is not None:
            broken.append(f"the {candidate} kernel%s cannot run: {reason}")
        elif (reason := _unsupported(module, limits, kinds)) is not None:
            passed_over.append(f"the {candidate} kernel {reason}")
        else:
            here = f"the tensors are on {device} ({module.describe()})"
            return _say(logging.INFO, candidate, "; ".join([here, *(text % "" for text in broken), *passed_over]))
    # Slower than this machine could be: never in silence.
    level = logging.WARNING if broken else logging.INFO
    reasons = [text % ", several times faster," for text in broken] + passed_over
    return _say(level, "torch", "; ".join(reasons) or f"the tensors are on {device}, which has no kernel here")


def _forced(name: str, source: str, limits: tuple[int, int], kinds: tuple[_Kind, ...]) -> str:
    if name not in BACKENDS:
        raise ValueError(f"selective scan backend {name!r} ({source}) is unknown, choose from {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable() or _unsupported(BACKENDS[name], limits, kinds)
    if reason is not None:
        raise RuntimeError(f"selective scan backend {name!r} ({source}) cannot run: {reason}")
    return _say(logging.INFO, name, source)


def _say(level: int, name: str, reason: str) -> str:
    message = f"selective scan runs on the {name} backend: {reason}"
    if message not in _said:
        _said.add(message)
        logger.log(level, "%s", message)
    return name
