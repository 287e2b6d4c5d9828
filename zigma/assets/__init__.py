"""The models that come with the pack. Their model cards lie beside them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_models", "model_path"]

_FILES = {"demo": "emoji.safetensors"}


def available_models() -> dict[str, Path]:
    """Name -> file of every shipped model that is in place."""
    folder = Path(__file__).parent
    return {name: folder / file for name, file in _FILES.items() if (folder / file).is_file()}


def model_path(name: str) -> Path:
    """The file of a shipped model.

    Raises:
        ValueError: no model of that name is in place; lists those that are.
    """
    models = available_models()
    if name not in models:
        known = ", ".join(models) or "none; the pack was copied without its zigma/assets"
        raise ValueError(f"no shipped model is called {name!r}: expected one of: {known}")
    return models[name]
