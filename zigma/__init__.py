"""ZigMa, a diffusion model of zigzag Mamba blocks (arXiv 2403.13802), by itself: no host needed.

    from zigma import ZigMa, ZigMaConfig, load_checkpoint, save_checkpoint, CheckpointError

The rest is found in its modules: scan_orders, selective_scan, flow, solvers, guidance, text, autoencoder, sampling.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
    from .config import ZigMaConfig
    from .model import ZigMa

__all__ = ["CheckpointError", "ZigMa", "ZigMaConfig", "load_checkpoint", "save_checkpoint"]

# Found when asked for, so that `python -m zigma --help` does not wait for torch.
_MODULES = {
    "CheckpointError": ".checkpoint",
    "ZigMa": ".model",
    "ZigMaConfig": ".config",
    "load_checkpoint": ".checkpoint",
    "save_checkpoint": ".checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
