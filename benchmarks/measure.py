"""What the benchmarks share: clocks, medians, memory, tables, and the sizes of a ZigMa's mixer.

All sides of a comparison take turns, in another order each round, in one process, with the same dtype and number of
threads. One thread is measured in the process's CPU time, which other programs disturb less; where numbers of threads
are compared, in wall time. Absolute times move from machine to machine and with the load; ratios are what to look at.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zigma.config import ZigMaConfig
from zigma.selective_scan import native, native_library

Run = Callable[[], Any]
WIDTH, STATES = 768, 16


@dataclass
class Options:
    """rounds: of each comparison. quick: the smallest sizes alone, to see that a script runs."""

    rounds: int = 7
    quick: bool = False

    def fewer(self, rounds: int) -> int:
        """For what takes long."""
        return min(self.rounds, rounds)


@dataclass
class Held:
    """A figure beside what it is held to.

    Attributes:
        what: the figure's name.
        value: None where this machine cannot show it; then `note` says why.
        required, aim: None where there is none.
        at_least: whether more is better.
        limit: what nothing can surpass, as measured in the same run; or a word for it.
        form: of the numbers.
    """

    what: str
    value: float | None
    required: float | None
    aim: float | None
    at_least: bool = False
    limit: float | str | None = None
    form: str = "{:.2f}"
    note: str = ""

    def row(self) -> str:
        sign = "≥ " if self.at_least else "≤ "
        required, aim = ("–" if x is None else sign + self.form.format(x) for x in (self.required, self.aim))
        limit = "–" if self.limit is None else self.limit
        limit = limit if isinstance(limit, str) else self.form.format(limit)
        value = "not measured" if self.value is None else self.form.format(self.value)
        return f"| {self.what} | {value} | {required} | {aim} | {limit} | {self.verdict()} |"

    def verdict(self) -> str:
        if self.value is None:
            return self.note
        if self.required is None and self.aim is None:
            return "for comparison"
        sign = 1 if self.at_least else -1
        reached = [x is not None and sign * self.value >= sign * x for x in (self.required, self.aim)]
        verdict = "aim met" if reached[1] else "required met" if reached[0] else "**missed**"
        return f"{verdict}; {self.note}" if self.note else verdict


@dataclass
class Report:
    """What a script found: Markdown, the figures that are held to something, and numbers for the plots."""

    parts: list[str] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        self.parts.append(text.rstrip())

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text: str = "") -> None:
        """A Markdown table under a heading; the first column is left-aligned."""
        lines = [f"### {title}", ""] + [text, ""] * bool(text)
        lines += [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
        self.say("\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]))

    def markdown(self) -> str:
        return "\n\n".join(self.parts) + "\n"


HELD_COLUMNS = "| figure | measured | required | aim | limit | |\n|---|---:|---:|---:|---:|---|"


def held_table(held: Sequence[Held]) -> str:
    return "\n".join([HELD_COLUMNS, *(figure.row() for figure in held)])


def fetch_memory(size: int) -> None:
    """Touches so many bytes, in large pages where there are native kernels, and gives them back.

    A virtual machine gives memory that it does not use back to its host, and to get it again can take longer than to
    compute what it is for; who came after whom would decide the figure.
    """
    if not size:
        return
    memory = torch.empty(size, dtype=torch.uint8)
    if native.unavailable() is None:
        native_library.load().use_huge_pages(memory)
    memory.zero_()


def fetched(tokens: int) -> int:
    """Bytes for the `memory` of `turns`, of a mixer or a step of so many float32 tokens: twice the ten times their size
    that it asks for, as a system may hand out other memory than it just got back."""
    return 20 * tokens * WIDTH * 4


def turns(
    candidates: Mapping[Any, Run], rounds: int, clock: Callable[[], float] = time.process_time,
    at_most: Mapping[Any, int] | None = None, memory: Mapping[Any, int] | None = None,
) -> dict[Any, list[float]]:  # fmt: skip
    """Milliseconds of each candidate in each of the rounds, in which all of them take their turn, in a new order.

    A first round is not counted. `at_most` is for candidates that take long: so many rounds, and where that is below
    3, no first one. What a candidate has to `prepare` for each of its turns is not counted either.

    Nobody's neighbour is always the same, for what one leaves behind the next one finds. `memory`: of candidates that
    ask for much, the bytes of it that are fetched before each of their turns.
    """
    at_most, turn = at_most or {}, random.Random(0)
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds + 1):
            for name, run in turn.sample(list(candidates.items()), len(candidates)):
                if number > at_most.get(name, rounds) or (number == 0 and at_most.get(name, 3) < 3):
                    continue
                fetch_memory((memory or {}).get(name, 0))
                if prepare := getattr(run, "prepare", None):
                    prepare()
                start = clock()
                run()
                if number:
                    times[name].append(1000 * (clock() - start))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return times


def medians(candidates: Mapping[Any, Run], rounds: int, *arguments: Any, **settings: Any) -> dict[Any, float]:
    """The median of each candidate's `turns`, in milliseconds."""
    times = turns(candidates, rounds, *arguments, **settings)
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(run: Run, other: Run, rounds: int) -> float:
    """run / other: the median of the rounds' own ratios, for differences smaller than the drift of a machine."""
    times = turns({"run": run, "other": other}, rounds)
    return statistics.median(a / b for a, b in zip(times["run"], times["other"], strict=True))


class WithThreads:
    """run with that many threads, woken before: within a model a layer finds those of the layer before it awake."""

    def __init__(self, threads: int, run: Run):
        self.threads, self.run, self.product = threads, run, square_product(768)[0]

    def prepare(self) -> None:
        self._with_threads(self.product)

    def __call__(self) -> None:
        self._with_threads(self.run)

    def _with_threads(self, run: Run) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            run()
        finally:
            torch.set_num_threads(before)


def speed_up(candidates: Mapping[str, Run], rounds: int, threads: int = 2) -> dict[str, float]:
    """How many times faster each candidate is with that many threads than with one, in wall time, which others disturb
    more: in three times the rounds."""
    ways = {(name, n): WithThreads(n, run) for name, run in candidates.items() for n in (1, threads)}
    times = medians(ways, 3 * rounds, time.perf_counter)
    return {name: times[name, 1] / times[name, threads] for name in candidates}


def with_instruction_set(name: str, run: Run) -> Run:
    """run with that variant of the native kernel."""
    library = native_library.load()

    def forced() -> None:
        before, library.instruction_set = library.instruction_set, name
        try:
            run()
        finally:
            library.instruction_set = before

    return forced


def instruction_sets() -> tuple[str, ...]:
    """Of the native kernel on this CPU, fastest first; empty where there is no native kernel."""
    return () if native.unavailable() is not None else native_library.load().instruction_sets()


def exponentials(count: int, instruction_set: str) -> Run:
    """So many exponentials as the kernel computes its decays, on a buffer that stays in the first-level cache."""
    library, size = native_library.load(), 2048
    x, y = torch.linspace(-20, 0, size), torch.empty(size)
    return lambda: library.exp2(instruction_set, x, y, as_decays=max(count // size, 1))


def square_product(size: int = 1536) -> tuple[Run, float]:
    """A matrix product that shows the machine's peak, and its GFLOP."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return lambda: torch.mm(a, b, out=out), 2e-9 * size**3


def mixer_products(b: int, l: int, width: int = WIDTH) -> tuple[Run, float]:
    """in_proj, x_proj, dt_proj and out_proj of a mixer of that width, and their GFLOP."""
    d, rank = 2 * width, -(-width // 16)
    sizes = ((width, 2 * d), (d, rank + 2 * STATES), (rank, d), (d, width))
    pairs = [(torch.randn(b, l, n), torch.randn(m, n) * n**-0.5) for n, m in sizes]

    @torch.no_grad()
    def run() -> None:
        for x, weight in pairs:
            F.linear(x, weight)

    return run, 2e-9 * b * l * sum(n * m for n, m in sizes)


def config(tokens: int, depth: int, **fields: Any) -> ZigMaConfig:
    """A ZigMa as wide as B/2, on a square latent of that many tokens."""
    side = round(tokens**0.5) * 2
    return ZigMaConfig(
        in_channels=4, embed_dim=WIDTH, depth=depth, img_dim=side, patch_size=2, drop_path_rate=0.0, **fields
    )


def layer(kind: type[nn.Module], tokens: int, **options: Any) -> nn.Module:
    """A mixer of that class with its initial values, which the model would give it."""
    sizes = config(tokens, 1)
    made = kind(sizes, **options).eval()
    made.reset_parameters(sizes)
    return made


def _peak_growth(prepare: Callable[..., Run], arguments: tuple) -> float:
    torch.set_num_threads(1)
    run = prepare(*arguments)
    gc.collect()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def field_of_status(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return float(line.split()[1]) * 1024

    before = field_of_status("VmRSS")
    reset.write_text("5")  # sets the peak back to what is resident now
    run()
    return field_of_status("VmHWM") - before


def peak_growth(prepare: Callable[..., Run], *arguments: Any) -> float | None:
    """Bytes by which the resident memory of a process of its own grows at its peak while it runs prepare(*arguments)().

    `prepare` makes the inputs, which do not count; what the run returns does. None where there is no /proc.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_growth, (prepare, arguments))


def cpu_flags() -> set[str]:
    """Of /proc/cpuinfo; empty where there is none."""
    return set(_cpuinfo().get("flags", _cpuinfo().get("Features", "")).split())


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def machine() -> str:
    """The processor, what of it is used, and torch."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    name += "".join(f", {key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    sets = ", ".join(instruction_sets()) or f"none ({native.unavailable()})"
    return f"{name}, {os.cpu_count()} cores; native kernel for {sets}; torch {torch.__version__}"


def measured(name: str, run: Callable[[Options], Report], options: Options) -> Report:
    """run(options) on one thread, with the machine and its load before and after at the top."""
    torch.set_num_threads(1)
    before, start = load(), time.perf_counter()
    report = run(options)
    took = time.perf_counter() - start
    rounds = "the smallest sizes once" if options.quick else f"{options.rounds} rounds, fewer for what is slow"
    report.parts.insert(
        0, f"`benchmarks/{name}.py`: {machine()}. Load average {before} before, {load()} after, {took:.0f} s; {rounds}."
    )
    return report


def options_from(doc: str, arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of each comparison; what takes long has fewer")
    parser.add_argument("--quick", action="store_true", help="one round of the smallest sizes: does it run?")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"got --rounds {given.rounds}, but expected at least 1")
    return Options(1 if given.quick else given.rounds, given.quick)


def main(name: str, doc: str, run: Callable[[Options], Report]) -> None:
    """Of a script: measure and print."""
    report = measured(name, run, options_from(doc))
    sys.stdout.write(report.markdown() + "\n### Held to\n\n" + held_table(report.held) + "\n")
