"""Runs, one after another, in one of several processes that are started as torchrun starts them.

    python tests/training/sharded_run.py JOBS.json REPORT       # writes REPORT.<rank>.json

A job is {"tables": settings, "steps": how many}; without steps it is the whole command.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from zigma.training.assemble import make_plan, make_trainer
from zigma.training.command import train
from zigma.training.outputs import export, save_sheet
from zigma.training.processes import OneProcess, find_processes
from zigma.training.settings import settings_from
from zigma.training.trainer import Trainer


def run(job: dict, processes: OneProcess) -> dict:
    """Go on with a job's run, save it, and look at everything that is made of its weights."""
    settings = settings_from(job["tables"])
    if "steps" not in job:
        return {"lines": list(train(settings, processes=processes, show=False))}
    trainer = make_trainer(make_plan(settings), processes)
    found = {"resumed": trainer.resume(), "losses": [trainer.train_step() for _ in range(job["steps"])]}
    found["validation"] = trainer.validate()
    trainer.save()
    weights = [(p.numel(), getattr(p, "_local_tensor", p).numel()) for p in trainer.net.parameters()]
    found["share"] = sum(here for _, here in weights) / sum(whole for whole, _ in weights)
    found["sheet"], found["file"] = save_sheet(trainer) is not None, str(export(trainer))
    found["next_loss"] = trainer.gradients()[0]  # which the averages that were in place must not touch
    found["poisoned"] = poisoned_step(trainer)
    return found


def poisoned_step(trainer: Trainer) -> tuple[float, float, int, bool]:
    """An update with an infinity in the part of the last process: scale before and after, and what came of it."""
    take = trainer.processes.take_gradients

    def poisoned() -> None:
        take()
        if trainer.processes.rank == trainer.processes.count - 1:
            next(p.grad for _, p in trainer.parts if p.grad is not None and p.numel()).view(-1)[0] = float("inf")

    before, scale = [p.detach().clone() for _, p in trainer.parts], trainer.scaler.get_scale()
    trainer.processes.take_gradients = poisoned
    trainer.train_step()
    trainer.processes.take_gradients = take
    moved = any(not torch.equal(p, b) for (_, p), b in zip(trainer.parts, before, strict=True))
    return scale, trainer.scaler.get_scale(), trainer.strange, moved


def main() -> None:
    jobs, report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2]
    processes = find_processes("cpu")
    found = {}
    for name, job in jobs.items():
        try:
            found[name] = run(job, processes)
        except (ValueError, ImportError) as error:
            found[name] = {"error": str(error)}
    Path(f"{report}.{processes.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
