"""Which layers of a model an adapter goes onto: glob patterns on their names, and a word for those that mean none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["DEFAULT_TARGETS", "target_layers"]

# What mixes tokens, of whichever kind: a model has only some of them. Not the step sizes (dt_proj), the convolution, A
# and D, which hold the dynamics of the scan.
DEFAULT_TARGETS = (
    "*.mixer.in_proj", "*.mixer.out_proj", "*.mixer.x_proj", "*.mixer.x_proj_b", "ssm.x_proj", "ssm.x_proj_b",
    "*.mixer.qkv", "*.mixer.proj", "*.msa.to_q", "*.msa.to_k", "*.msa.to_v", "*.msa.to_out.0",
)  # fmt: skip


def target_layers(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """Name -> layer of all linear layers that any pattern matches, in the order of the model.

    A pattern of DEFAULT_TARGETS may match nothing, for no model has all of these; one of them has to.

    Raises:
        ValueError: a pattern matches no layer, or one that is not linear, or a parameter such as A_log and D.
    """
    layers = {name: module for name, module in model.named_modules() if [*module.parameters(recurse=False)]}
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    # Parameters that belong to no layer: A_log and D stand beside layers, the position embedding in the model itself.
    loose = [
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[0] not in layers or any(layers[name.rpartition(".")[0]].children())
    ]
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in layers if fnmatchcase(name, pattern)]
        wrong = [name for name in matched if name not in linear]
        if parameters := [name for name in loose if fnmatchcase(name, pattern)]:
            raise ValueError(
                f"got the target {pattern!r}, which matches the parameter {parameters[0]}, but adapters go onto linear "
                f"layers, never onto A_log, D or embeddings: use {_kinds(linear)}"
            )
        if wrong:
            raise ValueError(
                f"got the target {pattern!r}, which matches {wrong[0]}, a {type(layers[wrong[0]]).__name__}, but "
                f"adapters go onto linear layers only: use {_kinds(linear)}"
            )
        if not matched and pattern not in DEFAULT_TARGETS:
            raise ValueError(f"got the target {pattern!r}, which matches no layer: {_advice(pattern, linear)}")
        chosen.update(matched)
    if not chosen:
        raise ValueError(f"got the targets {list(patterns)}, none of which this model has: use {_kinds(linear)}")
    return {name: layer for name, layer in linear.items() if name in chosen}


def _advice(pattern: str, linear: dict[str, nn.Linear]) -> str:
    """The pattern that was meant, if one is close; and all that there are."""
    tails = {_tail(kind): kind for kind in _patterns_of(linear)}
    close = difflib.get_close_matches(_tail(pattern), tails, n=1)
    return (f"did you mean {tails[close[0]]}? It can be " if close else "use ") + _kinds(linear)


def _kinds(linear: dict[str, nn.Linear]) -> str:
    return ", ".join(_patterns_of(linear))


def _patterns_of(linear: dict[str, nn.Linear]) -> list[str]:
    """The names of layers with the number of their block left open."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in linear))


def _tail(name: str) -> str:
    """The last part of a name that is a word: to_out of "blocks.0.msa.to_out.0"."""
    words = [part for part in name.split(".") if not re.fullmatch(r"[\d*?]*", part)]
    return words[-1] if words else name
