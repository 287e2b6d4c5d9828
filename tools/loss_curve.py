"""Draw the loss of training runs: `python tools/loss_curve.py runs/first runs/second --out loss.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def read_log(run: Path) -> tuple[list[float], list[float]]:
    """Minutes and losses of a run's log.jsonl."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    entries = [entry for entry in entries if entry.get("loss") is not None]  # without those of the validation
    return [entry["minutes"] for entry in entries], [entry["loss"] for entry in entries]


def main() -> None:
    """One line per run, the runs one after another in time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--names", nargs="*", help="one for each run")
    parser.add_argument("--until", type=float, nargs="*", help="minutes of each run to show; 0 for all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = pyplot.subplots(figsize=(7, 3.2), dpi=110, layout="constrained")
    start = 0.0
    for number, run in enumerate(options.runs):
        minutes, losses = read_log(run)
        limit = options.until[number] if options.until else 0
        shown = [(m, loss) for m, loss in zip(minutes, losses, strict=True) if not limit or m <= limit]
        axes.plot([start + m for m, _ in shown], [loss for _, loss in shown], linewidth=1.2,
                  label=options.names[number] if options.names else run.name)  # fmt: skip
        start += shown[-1][0]
    axes.set(xlabel="minutes", ylabel="flow loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
