"""What sampling through a real ComfyUI costs beside the model itself, and what the pack adds to a host's start.

Hosts are found as the tests find them: COMFYUI_PATH, or the usual places. The nodes run in the host's own process and
interpreter (inside_host.py), on one thread of the CPU, each model with the same prompt; a figure is a ratio within one
run of a node, and its median over the rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
from measure import Held, Options, Report

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import host as hosts  # noqa: E402 - tools/host.py
import torch  # noqa: E402

from zigma.checkpoint import LatentFormat, save_checkpoint  # noqa: E402
from zigma.config import ZigMaConfig  # noqa: E402
from zigma.model import ZigMa  # noqa: E402
from zigma.text import TextEncoderConfig, WordTextEncoder  # noqa: E402

BIG = "big.safetensors"
STOCK = "KSampler, euler (stock)"
OVERHEAD, MEMORY, START, LINES = 1.02, 1.1, 0.3, 1.0


def run(options: Options) -> Report:
    """Every host's tables."""
    report = Report()
    found = hosts.find_hosts()
    if not found:
        report.say("NOT MEASURED: no ComfyUI was found; set COMFYUI_PATH.")
    for host in found:
        with tempfile.TemporaryDirectory(prefix="zigma-bench-") as folder:
            base = hosts.make_base(Path(folder))
            _write_model(base)
            name = _version(host)
            start(report, options, host, base, name)
            times(report, options, host, base, name)
            memory(report, options, host, base, name)
    return report


def _write_model(base: Path) -> None:
    """A random model of width 384 and 12 blocks, for 256 tokens."""
    torch.manual_seed(0)
    text = WordTextEncoder(TextEncoderConfig(("red", "fox"), length=16, width=64))
    config = ZigMaConfig(
        in_channels=4, embed_dim=384, depth=12, img_dim=32, patch_size=2, use_pe=2, has_text=True, d_context=64
    )
    save_checkpoint(
        ZigMa(config), base / "models/diffusion_models" / BIG, text_encoder=text, latent=LatentFormat(4, scale=1.0)
    )


def _version(host: Path) -> str:
    line = next(line for line in (host / "comfyui_version.py").read_text().splitlines() if "__version__" in line)
    return "ComfyUI " + line.split('"')[1]


def _ask(host: Path, base: Path, what: str, **arguments) -> dict | float:
    command = [hosts.interpreter(host), ROOT / "benchmarks/inside_host.py", host, base, what, json.dumps(arguments)]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=base, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} failed in {host}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def start(report: Report, options: Options, host: Path, base: Path, name: str) -> None:
    """Each time a fresh process."""
    answers = [_ask(host, base, "start") for _ in range(options.fewer(5))]
    ours, first = (statistics.median(a[key] for a in answers) for key in ("ours", "first"))
    lines = max(len(a["log"]) for a in answers)
    report.say(
        f"### {name}: start\n\nThe pack takes {ours:.2f} s to load and logs {lines} lines of its own. A first pack "
        f"with nothing in it takes {first:.2f} s, which the host spends on reading what a pack says of itself."
    )
    report.held.append(Held(f"{name}: seconds that the pack adds to a start", ours, START, None))
    report.held.append(Held(f"{name}: lines that it logs there", lines, LINES, None, form="{:.0f}"))


def times(report: Report, options: Options, host: Path, base: Path, name: str) -> None:
    asked = [(BIG, 6)] if options.quick else [("demo", 30), (BIG, 10)]
    for model, steps in asked:
        rows = _ask(host, base, "times", name=model, steps=steps, rounds=options.rounds)
        cells = [[way, f"{whole:.4f}", f"{inner:.4f}", f"{count:.0f}", f"{ms:.1f}"]
                 for way, (whole, inner, count, ms) in rows.items()]  # fmt: skip
        title = (
            f"{name}: {'the demo model' if model == 'demo' else 'a model of width 384 and 12 blocks'}, {steps} steps"
        )
        columns = ["", "run / evaluations", "evaluations / network", "evaluations", "ms of one"]
        text = (
            "CPU time of the whole node over that of the evaluations in it, as the sampler asks the host's guider for "
            "them; and of these over the network's. An evaluation has the prompt and the negative prompt in it."
        )
        report.table(title, columns, cells, text)
        worst = max(whole for way, (whole, *_) in rows.items() if way != STOCK)
        what = f"{name}: run / evaluations, {model}, worst of our nodes"
        report.held.append(Held(what, worst, OVERHEAD, None, limit=rows[STOCK][0], form="{:.4f}"))


def memory(report: Report, options: Options, host: Path, base: Path, name: str) -> None:
    """Each way in fresh processes, in turns. One peak lies up to 15 % from another: malloc keeps more or less."""
    if not Path("/proc/self/clear_refs").exists():
        report.say("Memory was not measured: this system does not tell a process's peak.")
        return
    size = 256 if options.quick else 512
    ways = ("core", STOCK, "ZigMa Sampler, euler")
    answers = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            answers[way].append(_ask(host, base, "memory", name=BIG, way=way, size=size, steps=3))
    grown = {way: statistics.median(peaks) for way, peaks in answers.items()}
    cells = [[way, f"{value / 1e6:.0f}", f"{value / grown['core']:.3f}"] for way, value in grown.items()]
    text = f"Megabytes by which the resident memory grows at its peak, at {size} pixels; core is `solve_ode` alone."
    report.table(f"{name}: memory", ["", "MB", "/ core"], cells, text)
    ratio = grown["ZigMa Sampler, euler"] / grown["core"]
    report.held.append(Held(f"{name}: peak memory, ZigMa Sampler / core", ratio, MEMORY, None, form="{:.3f}"))


if __name__ == "__main__":
    measure.main("host_sampler", __doc__, run)
