"""How long the selective scan takes beside the matrix products of its block: `python benchmarks/scan.py`.

All sides of a comparison run in turn, round after round, in one process, with the same dtype and number of threads; a
figure is the median over the rounds of the process's CPU time. Absolute times move from machine to machine and with
the load; ratios are what to look at. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zigma.selective_scan import native_library, ordered_conv1d_silu, selective_scan_gathered

N, CONV_WIDTH = 16, 4


@dataclass(frozen=True)
class Shape:
    """Batch, tokens and width of the model; the mixer is twice as wide."""

    b: int
    l: int
    width: int

    @property
    def d(self) -> int:
        return 2 * self.width

    def __str__(self) -> str:
        return f"b {self.b}, L {self.l}, d_model {self.width}"


class Problem:
    """Random inputs of one Mamba mixer, and the parts of its work as functions."""

    def __init__(self, shape: Shape, dtype: torch.dtype, gradients: bool):
        g = torch.Generator().manual_seed(0)
        b, l, d, width, rank = shape.b, shape.l, shape.d, shape.width, -(-shape.width // 16)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=g) * scale).to(dtype).requires_grad_(gradients)

        self.gradients = gradients
        self.tokens, self.mixed, self.low_rank = draw(b, l, width), draw(b, l, d), draw(b, l, rank)
        sizes = {"in": (2 * d, width), "x": (rank + 2 * N, d), "dt": (d, rank), "out": (width, d)}
        self.weights = {name: draw(*size, scale=size[1] ** -0.5) for name, size in sizes.items()}
        A = -torch.arange(1.0, N + 1).expand(d, N).clone().requires_grad_(gradients)
        D, bias = (torch.ones(d, requires_grad=gradients), torch.full((d,), -4.0, requires_grad=gradients))
        self.scan_inputs = (draw(b, l, d), draw(b, l, d), A, draw(b, l, N), draw(b, l, N), D, draw(b, l, d), bias)
        self.xz = draw(b, l, 2 * d)
        self.filter, self.filter_bias = draw(d, CONV_WIDTH), draw(d)
        self.order = torch.randperm(l, generator=g)
        self.d_out = torch.randn(b, l, d, generator=g).to(dtype)

    def _run(self, out: Tensor, leaves: tuple[Tensor, ...]) -> None:
        if self.gradients:
            torch.autograd.grad(out, leaves, self.d_out.view(-1)[: out.numel()].view(out.shape), allow_unused=True)

    def gemms(self) -> None:
        """in_proj, x_proj, dt_proj and out_proj."""
        pairs = zip((self.tokens, self.mixed, self.low_rank, self.mixed), self.weights.values(), strict=True)
        for x, weight in pairs:
            out = F.linear(x, weight)
            if self.gradients:
                torch.autograd.grad(out, (x, weight), torch.ones_like(out))

    def scan(self, backend: str, ordered: bool = True) -> None:
        order = self.order if ordered else None
        self._run(selective_scan_gathered(*self.scan_inputs, order=order, backend=backend), self.scan_inputs)

    def conv(self, backend: str) -> None:
        x = self.xz[..., : self.xz.shape[-1] // 2]
        out = ordered_conv1d_silu(x, self.filter, self.filter_bias, self.order, backend)
        self._run(out, (self.xz, self.filter, self.filter_bias))


def medians(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """CPU milliseconds of each candidate: the median over rounds in which all of them take their turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for warm_up in (True, *[False] * rounds):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            if not warm_up:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def with_instruction_set(name: str, run: Callable[[], None]) -> Callable[[], None]:
    library = native_library.load()

    def forced() -> None:
        before, library.instruction_set = library.instruction_set, name
        try:
            run()
        finally:
            library.instruction_set = before

    return forced


def measure(shape: Shape, dtype: torch.dtype, gradients: bool, rounds: int) -> dict[str, float]:
    problem = Problem(shape, dtype, gradients)
    candidates = {
        "four GEMMs": problem.gemms,
        "torch": lambda: problem.scan("torch"),
        "torch conv": lambda: problem.conv("torch"),
    }
    for name in native_library.load().instruction_sets():
        candidates[name] = with_instruction_set(name, lambda: problem.scan("native"))
    candidates["in raster order"] = lambda: problem.scan("native", ordered=False)
    candidates["conv"] = lambda: problem.conv("native")
    with torch.set_grad_enabled(gradients):
        return medians(candidates, rounds)


COLUMNS = ("four GEMMs", "avx512", "avx2", "torch", "in raster order", "conv", "torch conv")


def table(title: str, shapes: list[Shape], dtype: torch.dtype, gradients: bool, rounds: int) -> str:
    """A Markdown table of milliseconds, and of percentages of the four GEMMs in the same row."""
    rows = [measure(shape, dtype, gradients, rounds) for shape in shapes]
    names = [name for name in COLUMNS if name in rows[0]]
    lines = [f"### {title}", "", f"| shape | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for shape, row in zip(shapes, rows, strict=True):
        cells = [f"{row[name]:.2f} ({100 * row[name] / row['four GEMMs']:.1f} %)" for name in names]
        cells[0] = f"{row['four GEMMs']:.2f}"
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """The processor and what else it was doing."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get("model name", name) + "".join(
            f", {key} {fields[key]}" for key in ("cpu family", "model") if key in fields
        )
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{load}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, rounds = getattr(torch, arguments.dtype), arguments.rounds
    wide = [Shape(1, l, 768) for l in (256, 1024, 4096)]
    small = [Shape(24, 64, 160), Shape(32, 64, 192)]
    sys.stdout.write(f"{machine()}, {arguments.dtype}. CPU milliseconds, and in brackets per cent of the GEMMs.\n\n")
    sys.stdout.write(table("Forward", wide + small, dtype, False, rounds) + "\n")
    sys.stdout.write(table("Forward and backward", wide[:2] + small, dtype, True, rounds))


if __name__ == "__main__":
    main()
