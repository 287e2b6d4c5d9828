"""The scan's backends, the mixer against attention, and a model's step on a GPU: `python benchmarks/gpu.py`.

Times are those of CUDA events (ROCm has them under the same name), medians of rounds in which all candidates take
their turn. Width 768, batch 1; the model is B/2 with text, in bfloat16. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Mapping

import measure
import torch
from measure import STATES, WIDTH, Report, Run
from torch import Tensor

from zigma.mixer import Attention, Mamba
from zigma.model import ZigMa
from zigma.selective_scan import dispatch, selective_scan_gathered

D_INNER, TEXT = 2 * WIDTH, 77


def milliseconds(run: Run, device: torch.device) -> float:
    """Of one call, on the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def medians(candidates: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """As `measure.medians`; three rounds first, in which kernels are compiled and tuned, are not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 3):
        for name, run in candidates.items():
            taken = milliseconds(run, device)
            if number >= 3:
                times[name].append(taken)
    return {name: float(torch.tensor(values).median()) for name, values in times.items()}


def scan_inputs(l: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    A = -torch.arange(1.0, STATES + 1, device=device).repeat(D_INNER, 1)
    wide, narrow = (1, l, D_INNER), (1, l, STATES)
    D, bias = torch.ones(D_INNER, device=device), torch.full((D_INNER,), -4.0, device=device)
    return draw(*wide), draw(*wide), A, draw(*narrow), draw(*narrow), D, draw(*wide), bias


def backends(inputs: tuple[Tensor, ...]) -> list[str]:
    """Those that can run here and take these tensors; the reference is no candidate."""
    return [
        name for name, module in dispatch.BACKENDS.items()
        if name != "reference" and module.unavailable() is None and module.unsupported(*inputs) is None
    ]  # fmt: skip


def scans(report: Report, lengths: tuple[int, ...], rounds: int, dtype: torch.dtype, device: torch.device) -> None:
    for gradients in (False, True):
        cells, names = [], backends(scan_inputs(1, dtype, device))
        for l in lengths:
            inputs = [t.requires_grad_(gradients) for t in scan_inputs(l, dtype, device)]
            order = torch.randperm(l, device=device)

            def scan(backend: str, inputs=inputs, order=order, gradients=gradients) -> None:
                out = selective_scan_gathered(*inputs, order=order, backend=backend)
                if gradients:
                    torch.autograd.grad(out, inputs, torch.ones_like(out))

            times = medians({name: functools.partial(scan, name) for name in names}, rounds, device)
            cells.append([f"L {l}", *(f"{times[name]:.3f}" for name in names)])
        title = "The scan, forward and backward" if gradients else "The scan, forward"
        report.table(title, ["", *names], cells, f"Milliseconds, {dtype}, in a random order.")


@torch.no_grad()
def mixers(report: Report, lengths: tuple[int, ...], rounds: int, dtype: torch.dtype, device: torch.device) -> None:
    cells = []
    for l in lengths:
        tokens = torch.randn(1, l, WIDTH, device=device, dtype=dtype)
        layers = [measure.layer(kind, l, device=device, dtype=dtype) for kind in (Mamba, Attention)]
        times = medians({type(layer).__name__: functools.partial(layer, tokens) for layer in layers}, rounds, device)
        mamba, attention = times["Mamba"], times["Attention"]
        cells.append([str(l), f"{mamba:.3f}", f"{attention:.3f}", f"{attention / mamba:.2f}"])
    columns = ["tokens", "Mamba mixer", "attention", "attention / mixer"]
    report.table("The mixer against attention", columns, cells, f"Milliseconds, {dtype}.")


@torch.no_grad()
def steps(report: Report, lengths: tuple[int, ...], depth: int, rounds: int, device: torch.device) -> None:
    cells = []
    for l in lengths:
        config = measure.config(l, depth, has_text=True, d_context=WIDTH, n_context_token=TEXT)
        candidates: dict[str, Run] = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = ZigMa(config, device=device, dtype=dtype).eval()
            condition = model.encode_condition(torch.randn(1, TEXT, WIDTH, device=device, dtype=dtype))
            x = torch.randn(1, 4, *config.img_dim, device=device, dtype=dtype)
            candidates[str(dtype)] = functools.partial(model, x, torch.full((1,), 0.5, device=device), condition)
        times = medians(candidates, rounds, device)
        single, half = times.values()
        cells.append([f"{l} tokens, {depth} blocks", f"{single:.2f}", f"{half:.2f}", f"{single / half:.2f}×"])
    columns = ["", "float32", "bfloat16", "float32 / bfloat16"]
    report.table("A step of B/2 with text", columns, cells, "Milliseconds of one velocity.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two rounds of the smallest sizes: does it run?")
    parser.add_argument("--device", default="cuda", help="cpu is there to try the script, not for its figures")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stdout.write("gpu: NOT MEASURED, torch finds no GPU on this machine.\n")
        return
    rounds, lengths = (2, (64,)) if options.quick else (options.rounds, (256, 1024, 4096, 16384))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report = Report()
    report.say(f"`benchmarks/gpu.py`: {name}, torch {torch.__version__}, {rounds} rounds.")
    if device.type == "cuda":
        unable = {n: m.unavailable() for n, m in dispatch.BACKENDS.items() if n in dispatch.PREFERENCE["cuda"]}
        for name, reason in unable.items():
            if reason is not None:
                report.say(f"Not measured: {name} ({reason}).")
    for dtype in (torch.float32, torch.bfloat16):
        scans(report, lengths[:3], rounds, dtype, device)
        mixers(report, lengths, rounds, dtype, device)
    steps(report, lengths[:3], 2 if options.quick else 24, rounds, device)
    sys.stdout.write(report.markdown())


if __name__ == "__main__":
    main()
