"""Which backend runs: chosen by device and dtype, or forced by name; said once through logging.

A backend is a module with `scan`, `conv1d_silu`, `unavailable()` (why it cannot run on this machine, with the remedy,
or None) and `unsupported(*tensors)` (why it cannot take these inputs, or None).
"""

from __future__ import annotations

import logging
import os
from types import ModuleType

from torch import Tensor

from . import native, reference, torch_backend

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {"native": native, "torch": torch_backend, "reference": reference}
ENVIRONMENT_VARIABLE = "ZIGMA_SCAN_BACKEND"

_said: set[str] = set()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine now, fastest first."""
    return tuple(name for name, module in BACKENDS.items() if module.unavailable() is None)


def select_backend(name: str | None, *tensors: Tensor | None) -> ModuleType:
    """The backend for these inputs. `name`, or else ZIGMA_SCAN_BACKEND, forces one.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot run here or cannot take these inputs.
    """
    source = "asked for by the caller" if name else f"set by {ENVIRONMENT_VARIABLE}"
    name = name or os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        return _forced(name, source, tensors)
    device = tensors[0].device.type
    if device != "cpu":
        return _say(logging.INFO, "torch", f"the tensors are on {device}")
    reason = native.unavailable()
    if reason is not None:
        return _say(logging.WARNING, "torch", f"the native kernel, several times faster, cannot run: {reason}")
    reason = native.unsupported(*tensors)
    if reason is not None:
        return _say(logging.INFO, "torch", f"the native kernel {reason}")
    return _say(logging.INFO, "native", f"the tensors are on the CPU ({native.describe()})")


def _forced(name: str, source: str, tensors: tuple[Tensor | None, ...]) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"selective scan backend {name!r} ({source}) is unknown, choose from {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable() or BACKENDS[name].unsupported(*tensors)
    if reason is not None:
        raise RuntimeError(f"selective scan backend {name!r} ({source}) cannot run: {reason}")
    return _say(logging.INFO, name, source)


def _say(level: int, name: str, reason: str) -> ModuleType:
    message = f"selective scan runs on the {name} backend: {reason}"
    if message not in _said:
        _said.add(message)
        logger.log(level, "%s", message)
    return BACKENDS[name]
