"""What the trainer adds to a step: data, noise, clipping, average and log beside forward, backward and optimiser.

The bare step is what anybody would write: the same network, batch, loss and optimiser, on tensors that are there
already. Both take turns on one thread in CPU time, in float32, with latents of 8 channels: the demo model's size at
8 x 8 with 32 pictures, and one of width 384 and 12 blocks at 16 x 16 with 4. Memory is the peak growth of a process of
its own, from the making of the optimiser's state on.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import measure
import torch
from measure import Held, Options, Report, Run

from zigma.flow import flow_loss
from zigma.latent_format import LatentFormat
from zigma.training.captions import Described, Texts
from zigma.training.settings import settings_from
from zigma.training.subject import make_subject
from zigma.training.trainer import Examples, Trainer

TIME, MEMORY = 1.05, 1.10
STEPS = 4  # in a turn
SIZES = {
    "the demo model, 32 pictures": ({"embed_dim": 176, "depth": 8}, 8, 32),
    "384 wide, 12 blocks, 4 pictures": ({"embed_dim": 384, "depth": 12}, 16, 4),
}


def trainer_of(size: str, folder: Path, ema: float = 0.999) -> Trainer:
    """A run of that size on random latents with captions."""
    model, side, batch = SIZES[size]
    settings = settings_from({
        "run": {"folder": str(folder), "batch_size": batch, "precision": "fp32", "device": "cpu", "ema": ema},
        "data": {"path": "none"}, "model": {"config": model}, "text": {"dropout": 0.1},
    })  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    latents = [[torch.randn(8, side, side, generator=generator)] for _ in range(4 * batch)]
    described = [Described((f"word{i % 50} other{i % 7}",)) for i in range(len(latents))]
    subject = make_subject(settings, None, described, (), 8, (side, side))
    names = [str(i) for i in range(len(latents))]
    examples = Examples(names, latents, [[False]] * len(latents), [], LatentFormat(8))
    return Trainer(settings, subject, examples, Texts.of_words(described, settings.text, subject.net.text_encoder))


def bare_step(trainer: Trainer) -> Run:
    """Forward, backward and the optimiser's step on one batch that is there."""
    _, latents, words = trainer.next_batch()
    x0, t = trainer.objective.draw(latents, trainer.generator)
    optimizer, net = trainer.optimizer.optimizers[0], trainer.net

    def run() -> None:
        net.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            flow_loss(lambda x, t: net(x, t, words), latents, x0=x0, t=t).backward()
            optimizer.step()

    return run


def trainer_steps(trainer: Trainer) -> Run:
    """The same number of steps of the trainer."""

    def run() -> None:
        for _ in range(STEPS):
            trainer.train_step()

    return run


def in_memory(size: str, bare: bool) -> Run:
    """For a process of its own: the run and its first steps."""
    folder = Path(tempfile.mkdtemp())
    trainer = trainer_of(size, folder, ema=0.0 if bare else 0.999)
    return bare_step(trainer) if bare else trainer_steps(trainer)


def run(options: Options) -> Report:
    """Both tables."""
    report, rows = Report(), []
    for size in list(SIZES)[: 1 if options.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(size, Path(folder))
            ways = {"bare": bare_step(trainer), "trainer": trainer_steps(trainer)}
            for way in ways.values():
                way()
            times = measure.turns(ways, options.rounds)
        ratio = statistics.median(b / a for a, b in zip(times["bare"], times["trainer"], strict=True))
        grown = {way: measure.peak_growth(partial(in_memory), size, way == "bare") for way in ways}
        memory = None if None in grown.values() else grown["trainer"] / grown["bare"]
        milliseconds = [statistics.median(times[way]) / STEPS for way in ways]
        megabytes = ["–" if grown[way] is None else f"{grown[way] / 1e6:.0f}" for way in ways]
        rows.append([size, *(f"{ms:.1f}" for ms in milliseconds), f"{ratio:.3f}", *megabytes])
        report.held.append(Held(f"trainer's step / bare step, {size}", ratio, TIME, None, limit=1.0, form="{:.3f}"))
        note = "" if memory is not None else "this system does not tell a process's peak"
        report.held.append(
            Held(f"trainer's memory / bare, {size}", memory, MEMORY, None, limit=1.0, form="{:.3f}", note=note)
        )
    columns = ["", "bare, ms", "trainer, ms", "ratio", "bare, MB", "trainer, MB"]
    report.table("A training step", columns, rows)
    return report


if __name__ == "__main__":
    measure.main("trainer", __doc__, run)
