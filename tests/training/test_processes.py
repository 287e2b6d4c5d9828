"""Two processes with the same batch are one process: the same losses, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_command import pictures, tables, write_config

from zigma.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def losses(folder: Path) -> list[float]:
    entries = RunFolder(folder).log_entries()
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "muon"), (2, "adamw")])
def test_two_processes_have_the_loss_curve_of_one(tmp_path, accumulate, optimizer):
    pytest.importorskip("accelerate")
    data = pictures(tmp_path / "pictures")
    for number in range(2):  # so that eight are left when a fifth is kept for validation
        Image.new("RGB", (20, 16), (40 * number, 90, 120)).save(data / f"more {number}.png")
    run = {"steps": 6, "batch_size": 8, "accumulate": accumulate}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # As `accelerate launch` starts processes for GPUs; on one machine it knows no other way for a CPU but one process.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ends = {}
    for name, start in (("one", []), ("two", launch)):
        more = {"data": {"validation": 0.2}, "model": {"config": {"embed_dim": 32, "depth": 2, "patch_size": 2}},
                "optimizer": {"name": optimizer}}  # fmt: skip
        config = write_config(tmp_path / f"{name}.toml", tables(tmp_path / name, data, run=run, **more))
        command = [sys.executable, *start, str(ROOT / "scripts" / "finetune.py"), str(config), "--quiet"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("process 1 of 2" in done.stderr) is (name == "two"), done.stderr[-3000:]
        assert done.stdout.count("steps in an epoch") == 1  # the first process speaks for all
        ends[name] = RunFolder(tmp_path / name).read_last()[1]
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    atol = 1e-5 if optimizer == "adamw" else 3e-3  # Muon orthogonalises in bfloat16
    for key, value in ends["one"]["learning"].items():
        torch.testing.assert_close(ends["two"]["learning"][key], value, rtol=1e-3, atol=atol)


def test_a_batch_that_processes_cannot_share_is_refused():
    from zigma.training.processes import ManyProcesses

    processes = object.__new__(ManyProcesses)
    processes.count, processes.rank = 3, 1
    assert processes.share(torch.arange(6)).tolist() == [2, 3] and processes.share(None) is None
    with pytest.raises(ValueError, match="4 pictures at once do not divide among 3 processes"):
        processes.share(torch.arange(4))
