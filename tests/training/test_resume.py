"""A resumed run is the straight run, bit for bit, whatever ended it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from tiny_run import numbers, tiny_trainer

from zigma.training.run_folder import RunFolder

HERE = Path(__file__).parent
KILLS = int(os.environ.get("ZIGMA_KILLS", "3"))  # 50 in a long run: ZIGMA_KILLS=50 make test ARGS="-k killed"


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


PACKAGES = {"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}
VARIANTS = {
    "plain": {},
    "muon": {"optimizer": {"name": "muon"}},
    "prodigy": {"optimizer": {"name": "prodigy", "lr": 1.0}},
    "adamw8bit": {"optimizer": {"name": "adamw8bit"}},
    "accumulated": {"run": {"accumulate": 2}},
    "bf16": {"run": {"precision": "bf16"}},
    "fp16": {"run": {"precision": "fp16"}},
    "without an average": {"run": {"ema": 0.0}},
    "noise": {"flow": {"path": "gvp", "prediction": "noise", "weighting": "min-snr", "time_sampling": "logit-normal"}},
    "frozen": {"model": {"freeze": ("blocks.0.*",)}},
    "recomputed": {"run": {"checkpointing": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_a_straight_one(tmp_path, variant):
    if package := PACKAGES.get(variant):
        pytest.importorskip(package)
    tables = VARIANTS[variant]
    straight = tiny_trainer(tmp_path / "straight", held_out=1, **tables)
    straight.resume()
    losses = [straight.train_step() for _ in range(6)]

    first = tiny_trainer(tmp_path / "resumed", held_out=1, **tables)
    assert first.resume() is False
    assert [first.train_step() for _ in range(3)] == losses[:3]
    first.validate()  # looks, and changes nothing
    first.save()
    torch.manual_seed(99)  # another process stands anywhere
    random.seed(99)
    numpy.random.seed(99)
    second = tiny_trainer(tmp_path / "resumed", held_out=1, **tables)
    assert second.resume() is True and second.step == 3 and second.validation == first.validation
    assert [second.train_step() for _ in range(3)] == losses[3:]
    assert_same(numbers(straight), numbers(second))


def test_every_generator_stands_where_it_stood(tmp_path):
    first = tiny_trainer(tmp_path)
    first.resume()
    first.train_step()
    first.save()
    expected = [torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()]
    tiny_trainer(tmp_path).resume()
    assert [torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()] == expected


def test_a_run_that_is_killed_again_and_again_ends_as_the_straight_one(tmp_path):
    """kill -9 at random moments, also in the middle of a checkpoint: one is written after every step."""
    steps, draw = str(20 + 10 * KILLS), random.Random(KILLS)
    command = [sys.executable, str(HERE / "tiny_run.py")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    subprocess.run([*command, str(tmp_path / "straight"), steps], env=environment, check=True)
    folder, kills = tmp_path / "killed", 0
    while kills < KILLS:
        begun = checkpoints_in(folder)
        process = subprocess.Popen([*command, str(folder), steps, "0.02"], env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while checkpoints_in(folder) == begun and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))
        assert process.poll() is None, process.stderr.read().decode()
        process.kill()
        process.communicate()
        kills += 1
    subprocess.run([*command, str(folder), steps], env=environment, check=True)
    ends = [RunFolder(path).read_last() for path in (tmp_path / "straight", folder)]
    assert ends[0][0].step == ends[1][0].step == int(steps)
    for part in ("learning", "average"):
        assert_same(*(flat(state[part]) for _, state in ends))


def checkpoints_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*") if path.suffix != ".partial"}


def flat(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for key, value in state.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: torch.as_tensor(value)}
    return found


def test_other_settings_are_refused_or_listed(tmp_path, caplog):
    first = tiny_trainer(tmp_path)
    first.resume()
    first.train_step()
    first.save()
    with pytest.raises(ValueError, match=r"other settings \(\[text\] width: 16 -> 32\): put them back"):
        tiny_trainer(tmp_path, text={"width": 32}).resume()
    other = tiny_trainer(tmp_path, data={"validation": 0.3})
    other.examples.digest = "another"  # as it is with other examples held out
    with pytest.raises(ValueError, match=r"other settings \(\[data\] validation: 0.0 -> 0.3\): put them back"):
        other.resume()
    longer = tiny_trainer(tmp_path, run={"steps": 20}, optimizer={"lr": 1e-3})
    longer.resume()
    assert "[run] steps: 8 -> 20" in caplog.text and "[optimizer] lr: 0.01 -> 0.001" in caplog.text
    longer.train_step()
    assert longer.optimizer.optimizers[0].param_groups[0]["lr"] <= 1e-3  # of the new settings
    other = tiny_trainer(tmp_path)
    other.examples.digest = "another"
    with pytest.raises(ValueError, match=r"the pictures of .* have changed"):
        other.resume()
