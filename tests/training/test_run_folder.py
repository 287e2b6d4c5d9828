"""A checkpoint is whole or not there; a folder belongs to one process; what is damaged is found out."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from zigma.training import run_folder
from zigma.training.run_folder import RunFolder, RunInUseError


def state(step: int) -> dict:
    return {"step": step, "weights": torch.full((10,), float(step))}


def steps_in(folder: RunFolder) -> list[int]:
    return [checkpoint.step for checkpoint in folder.whole()]


def test_the_last_ones_and_the_best_stay(tmp_path):
    folder = RunFolder(tmp_path / "run", keep_last=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.2]):
        folder.write(state(step), step, loss)
    assert steps_in(folder) == [1, 3, 4] and folder.best().step == 1
    checkpoint, read = folder.read_last()
    assert checkpoint.step == 4 and torch.equal(read["weights"], torch.full((10,), 4.0))
    without = RunFolder(tmp_path / "run", keep_last=1, keep_best=False)
    without.write(state(5), 5)
    assert steps_in(without) == [5]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog):
    folder = RunFolder(tmp_path)
    folder.write(state(1), 1)
    last = folder.write(state(2), 2).path / "state.pt"
    content = last.read_bytes()
    if damage == "gone":
        last.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        last.write_bytes({"cut": content[:middle], "changed": changed, "empty": b""}[damage])
    checkpoint, _ = folder.read_last()
    assert checkpoint.step == 1 and "0000002" in caplog.text and "not as it was written" in caplog.text


def test_without_a_readable_checkpoint_nothing_starts_anew(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_last() is None
    (folder.write(state(1), 1).path / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints .* can be read: put one back"):
        folder.read_last()
    (folder.checkpoints / "0000001" / run_folder.MARKER).write_text("{")
    with pytest.raises(ValueError, match=r"none of the 1 checkpoints .* can be read: put one back"):
        folder.read_last()


def test_a_damaged_checkpoint_pushes_out_no_new_one(tmp_path):
    """The run goes on from the one before it, so that what is written then has smaller steps."""
    folder = RunFolder(tmp_path, keep_last=1)
    folder.write(state(500), 500, 1.0)
    (folder.write(state(1000), 1000, 2.0).path / "state.pt").write_bytes(b"damaged")
    assert folder.read_last()[0].step == 500 and folder.best().step == 500
    for step in (600, 700):
        assert folder.write(state(step), step).path.exists()
    assert steps_in(folder) == [500, 700, 1000] and RunFolder(tmp_path).read_last()[0].step == 700


def test_half_a_checkpoint_is_none(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.write(state(1), 1)
    partial = folder.checkpoints / "0000002.partial"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    unmarked = folder.checkpoints / "0000003"
    unmarked.mkdir()
    assert steps_in(folder) == [1] and "marker cannot be read" in caplog.text
    folder.remove_partial()
    assert not partial.exists()
    folder.write(state(2), 2)
    assert steps_in(folder) == [1, 2]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left: unexpected pos 1 vs 2")]
)
def test_a_full_disk_costs_nothing(tmp_path, monkeypatch, error):
    folder = RunFolder(tmp_path)
    folder.write(state(1), 1)

    def full(_state, file):
        file.write(b"some")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(run_folder.torch, "save", full)
        with pytest.raises(OSError, match=r"step 2 could not be written \(No space left.*make room, and resume"):
            folder.write(state(2), 2)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["0000001"]
    assert folder.read_last()[0].step == 1


def test_a_folder_is_held_by_one_process_and_let_go_when_it_dies(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from zigma.training.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            expected = f"in use by process {other.pid}: stop that run"
            with pytest.raises(RunInUseError, match=expected), RunFolder(tmp_path).locked():
                pytest.fail("two processes hold one folder")
        finally:
            other.kill()
            other.wait()
    with RunFolder(tmp_path).locked():
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()}"


def test_the_log_goes_on_after_the_step_that_a_resumed_run_began_at(tmp_path):
    folder = RunFolder(tmp_path)
    for step, loss in [(1, 0.5), (2, 0.4), (3, 0.3), (2, 0.41), (3, 0.31)]:
        folder.log_entry({"step": step, "loss": loss})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.2})[:-4])  # killed in the middle of a line
    assert [(entry["step"], entry["loss"]) for entry in folder.log_entries()] == [(1, 0.5), (2, 0.41), (3, 0.31)]
