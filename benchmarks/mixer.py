"""The Mamba mixer against attention at the same width, and how each grows with the number of tokens.

Width 768, batch 1, float32, one thread: 256, 1024, 4096 and 16384 tokens (latents of 256, 512, 1024 and 2048 pixels).
"""

from __future__ import annotations

import functools

import measure
import torch
from measure import WIDTH, Held, Options, Report, Run

from zigma.mixer import Attention, Mamba
from zigma.scratch import Scratch

MIXER, IN_A_MODEL, GEMMS, ATTENTION = NAMES = "Mamba mixer", "the same in a model", "its GEMMs", "attention"


@torch.no_grad()
def run(options: Options) -> Report:
    """Every table of this file."""
    report, lengths = Report(), (256, 1024) if options.quick else (256, 1024, 4096, 16384)
    candidates: dict[tuple[str, int], Run] = {}
    for l in lengths:
        tokens = torch.randn(1, l, WIDTH)
        mamba, shared = measure.layer(Mamba, l), Scratch.for_inference(tokens)
        candidates[MIXER, l] = functools.partial(mamba, tokens)
        candidates[IN_A_MODEL, l] = functools.partial(mamba, tokens, scratch=shared)
        candidates[GEMMS, l] = measure.mixer_products(1, l)[0]
        candidates[ATTENTION, l] = functools.partial(measure.layer(Attention, l), tokens)
    # All lengths in one set of rounds, for the growth is a ratio too.
    slow = {**{(name, 16384): 5 for name in NAMES}, (ATTENTION, 4096): 5, (ATTENTION, 16384): 2}
    memory = {(name, l): measure.fetched(l) for name, l in candidates}
    times = measure.medians(candidates, options.rounds, at_most=slow, memory=memory)
    rows = {l: {name: times[name, l] for name in NAMES} for l in lengths}
    report.data["mixer"] = {str(l): row for l, row in rows.items()}
    cells = [
        [
            str(l), *(f"{row[name]:.1f}" for name in NAMES), f"{row[MIXER] / row[GEMMS]:.2f}",
            *(f"{row[ATTENTION] / row[name]:.2f}" for name in (MIXER, IN_A_MODEL, GEMMS)),
        ]
        for l, row in rows.items()
    ]  # fmt: skip
    columns = [
        "tokens", *NAMES, "mixer / GEMMs", "attention / mixer", "attention / mixer in a model", "if the scan were free"
    ]  # fmt: skip
    text = (
        "CPU milliseconds. Attention is `zigma.mixer.Attention`, with torch's fused kernel. `in a model`: in the "
        "memory that the layer before it used, as from 1 MB of tokens on; a mixer alone asks the system for new one, "
        "which was fetched from a virtual machine's host before. "
        "`if the scan were free`: attention / the mixer's GEMMs, which no mixer of this shape can surpass."
    )
    report.table("The mixer against attention", columns, cells, text)
    first, last = lengths[-2:] if options.quick else (1024, 16384)
    grown = {name: rows[last][name] / rows[first][name] for name in NAMES}
    cells = [[f"{first} → {last}", *(f"{ratio:.1f}×" for ratio in grown.values())]]
    report.table("Growth", ["tokens", *grown], cells, f"{last // first} times the tokens.")
    _hold(report, rows, grown)
    return report


def _hold(report: Report, rows: dict[int, dict[str, float]], grown: dict[str, float]) -> None:
    left_out, value, limit = "" if 16384 in rows else "left out by --quick", None, None
    mixers = {"mixer": MIXER, "mixer in a model": IN_A_MODEL}
    for label, name in mixers.items():
        if not left_out:
            value, limit = grown[name], grown[GEMMS]
        what = f"{label}, 1024 → 16384 tokens"
        report.held.append(Held(what, value, 18, 16.2, limit=limit, form="{:.1f}×", note=left_out))
    for l, required, aim in ((4096, 2.2, 2.4), (16384, 6.3, 7.2)):
        for label, name in mixers.items():
            if not left_out:
                value, limit = (rows[l][ATTENTION] / rows[l][side] for side in (name, GEMMS))
            what = f"attention / {label}, {l} tokens"
            report.held.append(Held(what, value, required, aim, at_least=True, limit=limit, note=left_out))


if __name__ == "__main__":
    measure.main("mixer", __doc__, run)
