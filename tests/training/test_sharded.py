"""Two processes that share out the weights are one process: the same losses, weights, checkpoints and files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sharded_run import run
from test_command import COLOURS, pictures, tables, trainer_of, write_config
from test_processes import losses

from zigma.checkpoint import load_bundle, load_checkpoint
from zigma.sampling import sample
from zigma.training import sharded
from zigma.training.adapters import load_adapters
from zigma.training.outputs import export
from zigma.training.processes import OneProcess, find_processes
from zigma.training.run_folder import RunFolder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMON = {
    "run": {"steps": 4, "batch_size": 4, "ema": 0.5, "output_dtype": "fp32"}, "data": {"validation": 0.2},
    "optimizer": {"lr": 1e-3, "warmup": 0.0},
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "muon, of classes": {"optimizer": {"name": "muon", "muon_lr": 1e-3}, "text": {"encoder": "labels"}},
    "prodigy": {"optimizer": {"name": "prodigy", "lr": 1.0, "warmup": 0.3}},
    "bf16": {"run": {"precision": "bf16", "checkpointing": True, "accumulate": 2}},
    "fp16, partly frozen": {"run": {"precision": "fp16"}, "model": {"freeze": ("blocks.0.*",)}},
    "lora": {"adapter": {"kind": "lora", "rank": 2}, "optimizer": {"lr": 1e-2}},
}


def merged(*parts: dict) -> dict:
    """Tables, the later ones on top."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: {key: v for part in parts for key, v in part.get(name, {}).items()} for name in names}


def start(arguments: list[str], **environment: str) -> list[subprocess.Popen]:
    """Two processes, as torchrun starts them, and accelerate configured by its variables."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    shared = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What they printed. One that fails, or hangs, leaves the other waiting: both end."""
    deadline = time.monotonic() + 180
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in printed)
    return printed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every variant as one process and as two: straight, and in two halves; reports of both processes."""
    pytest.importorskip("accelerate")
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip(f"NOT TESTED: sharded weights: torch {torch.__version__} is older than 2.6")
    root = tmp_path_factory.mktemp("sharded")
    texts, classes = pictures(root / "pictures"), root / "classes"
    for index, name in enumerate(COLOURS):
        (classes / ("light", "dark")[index % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(texts / f"{name}.png", classes / ("light", "dark")[index % 2])
    base = trainer_of(root / "base", texts)
    with torch.random.fork_rng():
        base.resume()
    lora = {"model": {"start_from": str(export(base)), "config": {}}}

    def settings(folder: str, variant: str) -> dict:
        data = classes if variant.endswith("classes") else texts
        found = tables(root / folder / variant, data, **merged(COMMON, VARIANTS[variant]))
        return merged(found, lora) | {"model": lora["model"]} if variant == "lora" else found

    jobs, one, process = {}, {}, OneProcess(torch.device("cpu"))
    for name in VARIANTS:
        if name == "prodigy":
            try:
                import prodigyopt  # noqa: F401
            except ImportError:
                continue
        jobs[f"straight/{name}"] = {"tables": settings("straight", name), "steps": 4}
        jobs[f"begun/{name}"] = {"tables": settings("halves", name), "steps": 2}
        jobs[f"resumed/{name}"] = {"tables": settings("halves", name), "steps": 2}
        one[name] = run({"tables": settings("one", name), "steps": 4}, process)
        run({"tables": settings("from_one", name), "steps": 2}, process)
        jobs[f"from_one/{name}"] = {"tables": settings("from_one", name), "steps": 2}
    often = {"run": {"save_steps": 1, "steps": 12}, "samples": {"every": 0.005}}
    command = merged(tables(root / "straight" / "command", texts, **COMMON), often)
    jobs["command"] = {"tables": command}
    for name, more in {"compile": {"run": {"compile": True}}, "8bit": {"optimizer": {"name": "adamw8bit"}}}.items():
        jobs[name] = {"tables": tables(root / name, texts, **more), "steps": 1}
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    finish(start([str(HERE / "sharded_run.py"), str(root / "jobs.json"), str(root / "report")]))
    reports = [json.loads((root / f"report.{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    return root, one, reports, command


@pytest.fixture(params=VARIANTS)
def variant(request, runs):
    if request.param not in runs[1]:
        pytest.skip(f"NOT TESTED: {request.param}: its package is not installed")
    return request.param


def near(variant: str) -> float:
    """How far shares of a batch may be from the batch, relative."""
    return 1e-2 if variant[:4] in ("bf16", "fp16") else 1e-4


def close(variant: str) -> dict[str, float]:
    """The same of numbers; Muon orthogonalises in bfloat16."""
    return {"rtol": 1e-3, "atol": {"bf16": 4e-3, "fp16": 4e-3, "muon": 1e-3}.get(variant[:4], 1e-4)}


def checkpoint(folder: Path) -> dict:
    return RunFolder(folder).read_last()[1]


def flat(state, prefix: str = "") -> dict:
    """Everything in a checkpoint but the clock, by its path."""
    if isinstance(state, dict):
        state = state.items()
    elif isinstance(state, (list, tuple)):
        state = enumerate(state)
    else:
        return {prefix: state}
    found = {}
    for key, value in state:
        if key not in ("seconds", "folder"):
            found |= flat(value, f"{prefix}/{key}")
    return found


def assert_same(a: dict, b: dict) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys() and len(a) > 50
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def test_the_loss_curve_and_the_weights_are_those_of_one_process(runs, variant):
    root, one, (first, second), _ = runs
    straight, alone = first[f"straight/{variant}"], one[variant]
    for what in ("losses", "validation", "next_loss"):
        assert straight[what] == pytest.approx(alone[what], rel=near(variant)), what
        assert straight[what] == second[f"straight/{variant}"][what]  # of all, on each
    states = [checkpoint(root / folder / variant) for folder in ("one", "straight")]
    assert flat(states[0]).keys() == flat(states[1]).keys()
    for part in ("learning", "average"):
        got, wanted = (flat(state[part]) for state in (states[1], states[0]))
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value, **close(variant))
    got, wanted = (flat(state["optimizer"]) for state in (states[1], states[0]))
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor):  # Prodigy keeps zeros as one number, where all are
            assert (got[key] - value).abs().max() <= 50 * near(variant) * value.abs().max() + 1e-12, key
        elif isinstance(value, float):
            assert got[key] == pytest.approx(value, rel=10 * near(variant)), key
        else:
            assert got[key] == value, key
    moved = [abs(a - b) for a, b in zip(alone["losses"], alone["losses"][2:], strict=False)]
    assert max(moved) > 1e-3  # there is a curve


def test_each_process_has_its_part(runs, variant):
    shares = [report[f"straight/{variant}"]["share"] for report in runs[2]]
    assert sum(shares) == pytest.approx(1) and max(shares) <= 0.6


def test_what_is_no_number_in_one_part_is_refused_by_all(runs, variant):
    for report in runs[2]:
        scale, after, strange, moved = report[f"straight/{variant}"]["poisoned"]
        assert not moved
        assert (after == scale / 2 and strange == 0) if variant.startswith("fp16") else strange == 1


def test_resumed_is_straight_bit_for_bit(runs, variant):
    root, _, (first, _), _ = runs
    straight, begun, resumed = (first[f"{name}/{variant}"] for name in ("straight", "begun", "resumed"))
    assert resumed["resumed"] and not begun["resumed"]
    assert begun["losses"] + resumed["losses"] == straight["losses"]
    assert resumed["next_loss"] == straight["next_loss"]
    assert_same(checkpoint(root / "straight" / variant), checkpoint(root / "halves" / variant))


def test_a_checkpoint_goes_on_in_one_process_and_one_of_its_in_two(runs, variant, tmp_path):
    root, one, (first, _), _ = runs
    shutil.copytree(root / "halves" / variant, tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / "checkpoints" / "0000004")
    job = {"tables": settings_of(first, root, variant, tmp_path / "here"), "steps": 2}
    here, there = run(job, OneProcess(torch.device("cpu"))), first[f"from_one/{variant}"]
    assert here["resumed"] and there["resumed"]
    for found in (here, there):
        assert found["losses"] == pytest.approx(one[variant]["losses"][2:], rel=near(variant))
        assert found["next_loss"] == pytest.approx(one[variant]["next_loss"], rel=near(variant))


def settings_of(first: dict, root: Path, variant: str, folder: Path) -> dict:
    job = json.loads((root / "jobs.json").read_text(encoding="utf-8"))[f"straight/{variant}"]
    return merged(job["tables"], {"run": {"folder": str(folder)}})


def test_sheet_and_file_are_whole_and_written_once(runs, variant):
    root, one, (first, second), _ = runs
    found, alone = first[f"straight/{variant}"], one[variant]
    assert found["sheet"] and alone["sheet"] and not second[f"straight/{variant}"]["sheet"]
    assert found["file"] == second[f"straight/{variant}"]["file"]
    if variant == "lora":
        base = root / "base" / "model.safetensors"
        states = [load_adapters(load_checkpoint(base), report["file"]).state_dict() for report in (found, alone)]
    else:
        bundles = [load_bundle(report["file"]) for report in (found, alone)]
        states = [bundle.model.state_dict() for bundle in bundles]
        prompts = ["dark"] if variant.endswith("classes") else ["a red square"]
        pictures_of = [sample(bundle, prompts) for bundle in bundles]
        torch.testing.assert_close(*pictures_of, rtol=0, atol=20 * close(variant)["atol"])
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, **close(variant))


def test_a_run_that_is_killed_ends_as_the_straight_one(runs, tmp_path):
    """By the script, as users start it; kill -9 of both processes."""
    root, _, (first, second), command = runs
    assert second["command"]["lines"] == []  # the first process speaks for all
    config = write_config(tmp_path / "a.toml", merged(command, {"run": {"folder": str(tmp_path / "run")}}))
    arguments = [str(ROOT / "scripts" / "finetune.py"), str(config), "--quiet"]
    killed = start(arguments)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "0000002").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in killed:
        process.kill()
        process.communicate()
    begun = RunFolder(tmp_path / "run").read_last()[0].step
    assert 2 <= begun < 12
    printed = finish(start(arguments))
    assert f"at step {begun}," in printed[0]
    assert all(f"part {rank} of 2 of each is here" in text for rank, text in enumerate(printed, 1))
    assert losses(tmp_path / "run") == losses(root / "straight" / "command")
    assert_same(checkpoint(root / "straight" / "command"), checkpoint(tmp_path / "run"))
    ends = [Path(lines.splitlines()[-1]) for lines in (printed[0].strip(), first["command"]["lines"][-1])]
    files = [load_bundle(path).model.state_dict() for path in ends]
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    assert (tmp_path / "run" / "report.html").is_file()
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) > 1  # on the way, when a clock says so


def test_what_does_not_go_together_is_one_sentence(runs, monkeypatch):
    first = runs[2][0]
    assert "[run] compile and sharded weights" in first["compile"]["error"]
    assert "would cut: take 'adamw'" in first["8bit"]["error"]
    for name, value, words in (
        ("FSDP_VERSION", "1", "version 1 of FSDP, expected version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params .* is not supported"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"\[run\] checkpointing to true"),
    ):
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=words):
            sharded.ShardedProcesses()
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DeepSpeed, expected MULTI_GPU or FSDP version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "configured for Megatron-LM"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "has tp_size 2, expected none of them or dp_shard_size alone"),
        (
            {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
            "has dp_replicate_size 2 and dp_shard_size 2",
        ),
    ],
)
def test_other_ways_to_share_the_work_are_refused(variables, words, monkeypatch):
    """accelerate would set some of them up and leave the others out without a word."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        find_processes("cpu")


def test_the_parts_of_all_processes_are_the_whole():
    """Also of rows that they do not divide, and of fewer rows than processes."""
    for rows, count in ((7, 3), (1, 2), (4, 4), (5, 4)):
        whole = torch.arange(rows * 6.0).view(rows, 2, 3)
        key = torch.nn.Parameter(torch.empty(0))
        found = []
        for rank in range(count):
            shards = sharded.Shards(rank, count)
            shards._owners[key] = whole
            found.append([shards.part(layout, key) for layout in (whole, whole.flatten(1), whole.flatten())])
        for layout, pieces in zip((whole, whole.flatten(1), whole.flatten()), zip(*found, strict=True), strict=True):
            assert torch.equal(torch.cat(pieces), layout)
