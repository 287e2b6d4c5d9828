"""Runs in one of several processes with sharded weights, started as torchrun starts them.

    python tests/training/sharded_run.py JOBS.json REPORT       # writes REPORT.<rank>.json

A job is {"tables": settings, "steps": how many, "command": whether it is the whole command in place of the steps}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from zigma.training.assemble import make_plan, make_trainer
from zigma.training.command import train
from zigma.training.outputs import export, save_sheet
from zigma.training.processes import find_processes
from zigma.training.settings import settings_from


def run(job: dict, processes) -> dict:
    """Go on with a job's run, and save it."""
    settings = settings_from(job["tables"])
    if job["command"]:
        return {"lines": list(train(settings, processes=processes, show=False))}
    trainer = make_trainer(make_plan(settings), processes)
    found = {"resumed": trainer.resume(), "losses": [trainer.train_step() for _ in range(job["steps"])]}
    found["validation"] = trainer.validate()
    found["after_validation"] = trainer.gradients()[0]  # which the averages in between must not touch
    trainer.save()
    found["share"] = sum(p.numel() for _, p in trainer.parts) / sum(p.numel() for _, p in trainer.learning())
    found["sheet"], found["file"] = str(save_sheet(trainer)), str(export(trainer))
    return found


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
