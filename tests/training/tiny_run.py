"""A run small enough for tests: six pictures of 3 x 4 x 4 numbers, a model of two layers.

    python tests/training/tiny_run.py FOLDER STEPS [SECONDS_A_STEP]     # what the tests that kill a process start
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from zigma.latent_format import LatentFormat
from zigma.training.captions import Described, Texts
from zigma.training.settings import Settings, settings_from
from zigma.training.subject import make_subject
from zigma.training.trainer import Examples, Trainer

WORDS = ("red", "green", "blue", "black", "white", "grey")
MODEL = {"embed_dim": 16, "depth": 2, "patch_size": 2, "drop_path_rate": 0.3}
TABLES = {
    "run": {"steps": 8, "batch_size": 4, "precision": "fp32", "ema": 0.5, "save_every": 0, "device": "cpu"},
    "data": {"path": "pictures"},
    "model": {"config": MODEL},
    "text": {"width": 16, "length": 4},
    "optimizer": {"lr": 1e-2, "warmup": 0.1},
}


def tiny_settings(folder: Path, **tables: dict) -> Settings:
    """TABLES with those given on top."""
    merged = {name: {**TABLES.get(name, {}), **tables.get(name, {})} for name in {*TABLES, *tables}}
    merged["run"]["folder"] = str(folder)
    return settings_from(merged)


def tiny_examples(count: int = 6, held_out: int = 0) -> Examples:
    """Pictures in pixel space; every second one has a mirrored variant."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.rand(3, 4, 4, generator=generator) * 2 - 1 for _ in range(count)]
    return Examples(
        [f"{WORDS[i % 6]}-{i}.png" for i in range(count)],
        [[x] if i % 2 else [x, x.flip(-1)] for i, x in enumerate(plain)],
        [[False] if i % 2 else [False, True] for i in range(count)],
        list(range(count - held_out, count)), LatentFormat(3, downscale=1), digest="tiny",
    )  # fmt: skip


def tiny_trainer(folder: Path, *, count: int = 6, held_out: int = 0, **tables: dict) -> Trainer:
    """A trainer of text-conditioned pictures."""
    settings, examples = tiny_settings(folder, **tables), tiny_examples(count, held_out)
    described = [Described((f"{WORDS[i % 6]} square", WORDS[i % 6]), style="flat") for i in range(count)]
    subject = make_subject(settings, None, described, (), 3, (4, 4))
    conditions = Texts.of_words(described, settings.text, subject.net.text_encoder)
    return Trainer(settings, subject, examples, conditions)


def numbers(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every number that a run has learned."""
    averages = trainer.average.state_dict()["values"]
    weights = {name: p.detach().clone() for name, p in trainer.learning()}
    return weights | {f"average.{name}": value.clone() for name, value in averages.items()}


def main() -> None:
    """Go on with the run in a folder, to its end."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    torch.set_num_threads(1)
    trainer = tiny_trainer(folder, run={"steps": steps, "save_steps": 1})
    with trainer.folder.locked():
        trainer.resume()
        trainer.run(lambda *_: time.sleep(pause))


if __name__ == "__main__":
    main()
