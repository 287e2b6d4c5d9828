"""A step of a whole model beside the matrix products in it, in inference and in training; seconds for a demo picture.

The model is as wide as B/2 (768, patches of 2), with four of its 24 blocks where it says so: 32, 64 and 128 latent
pixels (256, 512 and 1024 of a picture; 256, 1024 and 4096 tokens), batch 1, float32, one thread.
"""

from __future__ import annotations

import functools
import os
import time

import measure
import torch
import torch.nn.functional as F
from measure import Held, Options, Report, Run
from torch import Tensor, nn

from zigma.assets import model_path
from zigma.checkpoint import load_bundle
from zigma.model import ZigMa
from zigma.sampling import sample
from zigma.selective_scan import native

FEW, ALL, TEXT = 4, 24, 77
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


class Step:
    """A model and the inputs of one velocity; the text, which every step of a run shares, is encoded before."""

    def __init__(self, tokens: int, depth: int, text: bool = False, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        fields = {"has_text": True, "d_context": 768, "n_context_token": TEXT} if text else {}
        config = measure.config(tokens, depth, **fields)
        self.model = ZigMa(config, dtype=dtype).eval()
        self.inputs = (torch.randn(1, 4, *config.img_dim, dtype=dtype), torch.full((1,), 0.5))
        self.text = torch.randn(1, TEXT, 768, dtype=dtype) if text else None
        with torch.no_grad():
            self.condition = self.model.encode_condition(self.text)

    @torch.no_grad()
    def infer(self) -> Tensor:
        return self.model(*self.inputs, self.condition)

    def train(self) -> None:
        """Forward and backward; the text is encoded in it."""
        self.model.zero_grad(set_to_none=True)
        self.model(*self.inputs, self.text).square().mean().backward()

    @torch.no_grad()
    def products(self, training: bool = False) -> Run:
        """The matrix products of all linear layers that a step calls, on random inputs of the same shapes."""
        calls: list[tuple[torch.Size, Tensor, Tensor | None]] = []

        def note(layer: nn.Module, inputs: tuple, _output: Tensor) -> None:
            calls.append((inputs[0].shape, layer.weight, layer.bias))

        hooks = [m.register_forward_hook(note) for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.model(*self.inputs, self.text if training else self.condition)
        for hook in hooks:
            hook.remove()
        made = {shape: torch.randn(shape, dtype=self.inputs[0].dtype) for shape, *_ in calls}

        @torch.no_grad()
        def run() -> None:
            for shape, weight, bias in calls:
                F.linear(made[shape], weight, bias)

        return run


def run(options: Options) -> Report:
    """Every table of this file."""
    report = Report()
    steps(report, options)
    training(report, options)
    bfloat16(report, options)
    memory(report, options)
    threads(report, options)
    pictures(report, options)
    profile(report, options)
    return report


def steps(report: Report, options: Options) -> None:
    cells, asked = [], [(256, FEW, False), (256, FEW, True)]
    if not options.quick:
        asked += [(l, FEW, text) for l in (1024, 4096) for text in (False, True)] + [(1024, ALL, False)]
    for l, depth, text in asked:
        step = Step(l, depth, text)
        rounds = options.fewer(7 if depth == FEW else 3)
        candidates = {"step": step.infer, "GEMMs": step.products()}
        times = measure.medians(candidates, rounds, memory=dict.fromkeys(candidates, measure.fetched(l)))
        ratio = times["step"] / times["GEMMs"]
        name = f"{l} tokens, {depth} blocks, {'with' if text else 'without'} text"
        cells.append([name, f"{times['step']:.0f}", f"{times['GEMMs']:.0f}", f"{ratio:.2f}"])
        report.held.append(Held(f"step / GEMMs, {name}", ratio, 1.35, 1.15, limit=1.0))
    text = (
        "CPU milliseconds of one velocity, and of nothing but the products of all linear layers in it. A step of 24 "
        f"blocks takes six times that of four. A text has {TEXT} tokens of width 768, and is encoded before."
    )
    report.table("A step and its matrix products", ["", "step", "GEMMs", "step / GEMMs"], cells, text)


def training(report: Report, options: Options) -> None:
    cells = []
    for l, text in ((256, False),) if options.quick else ((256, False), (1024, False), (1024, True)):
        step = Step(l, FEW, text)
        step.model.train()
        times = measure.medians({"step": step.train, "GEMMs": step.products(training=True)}, options.fewer(5))
        name = f"{l} tokens, {FEW} blocks, {'with' if text else 'without'} text"
        ratio = times["step"] / times["GEMMs"] / 3
        cells.append([name, f"{times['step']:.0f}", f"{3 * times['GEMMs']:.0f}", f"{ratio:.2f}"])
    text = "CPU milliseconds of forward and backward, without the optimizer, and three times those of the products."
    report.table("A training step", ["", "forward and backward", "3 × GEMMs", "ratio"], cells, text)


def bfloat16(report: Report, options: Options) -> None:
    able = bool(measure.cpu_flags() & BF16_FLAGS)
    cells = []
    for l in (1024, 4096) if able and not options.quick else (256,):
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        made = {name: Step(l, FEW, dtype=dtype) for name, dtype in kinds.items()}
        candidates = {("step", name): step.infer for name, step in made.items()}
        candidates |= {("GEMMs", name): step.products() for name, step in made.items()}
        memory = dict.fromkeys(candidates, measure.fetched(l))
        times = measure.medians(candidates, options.fewer(7 if able else 2), memory=memory)
        ratios = {what: times[what, "float32"] / times[what, "bfloat16"] for what in ("step", "GEMMs")}
        for what, ratio in ratios.items():
            cells.append([f"{l} tokens, {what}", *(f"{times[what, name]:.0f}" for name in kinds), f"{ratio:.2f}×"])
        asked = (None, None) if l == 1024 else (2, 3)
        report.held.append(
            Held(f"step in float32 / in bfloat16, {l} tokens", ratios["step"] if able else None, *asked,
                 at_least=True, limit=ratios["GEMMs"] if able else None, form="{:.1f}×",
                 note="" if able else "this CPU has no instructions for it")
        )  # fmt: skip
    has = "has" if able else "has no"
    report.table(
        "bfloat16", [f"{FEW} blocks, without text", "float32", "bfloat16", "float32 / bfloat16"], cells,
        f"CPU milliseconds. This CPU {has} instructions for bfloat16 products"
        + ("." if able else ", so that it spends more on them than on float32: use float32 on such a CPU."),
    )  # fmt: skip


def prepare_step(l: int, depth: int, text: bool, train: bool) -> Run:
    """For `measure.peak_growth`: a model whose libraries are loaded, and whose code has run on few tokens."""
    warm = Step(16, 1, text)
    (warm.train if train else warm.infer)()
    step = Step(l, depth, text)
    return step.train if train else step.infer


def memory(report: Report, options: Options) -> None:
    asked = [(256, FEW, True, False), (256, FEW, True, True)]
    if not options.quick:
        asked += [(1024, FEW, True, False), (1024, ALL, True, False), (4096, FEW, True, False)]
        asked += [(1024, FEW, True, True)]
    cells = []
    for l, depth, text, train in asked:
        grown = measure.peak_growth(prepare_step, l, depth, text, train)
        if grown is None:
            report.say("Memory was not measured: this system does not tell a process's peak.")
            return
        name = f"{l} tokens, {depth} blocks, with text, {'forward and backward' if train else 'step'}"
        cells.append([name, f"{grown / 1e6:.0f}"])
    text = (
        "Megabytes by which the resident memory of a process of its own grows at its peak, beyond weights and inputs; "
        "gradients are in it."
    )
    report.table("Memory", ["", "MB"], cells, text)


def threads(report: Report, options: Options) -> None:
    l = 256 if options.quick else 1024
    step = Step(l, FEW)
    faster = measure.speed_up({"step": step.infer, "GEMMs": step.products()}, options.fewer(5))
    ratio = faster["step"] / faster["GEMMs"]
    cells = [[f"{l} tokens, {FEW} blocks", *(f"{x:.2f}×" for x in faster.values()), f"{ratio:.2f}"]]
    columns = ["", "step", "GEMMs", "step / GEMMs"]
    report.table("One thread and two, a step", columns, cells, "Speed-up in wall time.")


def pictures(report: Report, options: Options) -> None:
    bundle = load_bundle(model_path("demo"))
    prompts = sorted(bundle.text_encoder.ids)[:8]
    counts = (1,) if options.quick else (1, 8)
    times = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        candidates = {n: measure.WithThreads(threads, functools.partial(sample, bundle, prompts[:n])) for n in counts}
        times[threads] = measure.medians(candidates, options.fewer(3), time.perf_counter, {8: 2})
    cells = [[f"{threads} thread(s)", *(f"{row[n] / 1000 / n:.2f}" for n in counts)] for threads, row in times.items()]
    columns = ["", *(f"{n} picture{'s' * (n > 1)} at once" for n in counts)]
    text = "Seconds of wall time for each picture, with the settings that the file recommends."
    report.table("The demo model", columns, cells, text)


def profile(report: Report, options: Options) -> None:
    """The native norms are no operators, so that they get a name here."""
    l, rounds = 256 if options.quick else 1024, options.fewer(3)
    step, plain = Step(l, FEW), native.norm_forward
    record = torch.profiler.record_function

    def named(*arguments):
        with record("add_norm"):
            return plain(*arguments)

    step.infer()
    native.norm_forward = named
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(rounds):
                with record("step"):
                    step.infer()
    finally:
        native.norm_forward = plain
    events = profiler.key_averages()
    whole = next(event.cpu_time_total for event in events if event.key == "step")  # of all rounds
    events = sorted((e for e in events if e.key != "step"), key=lambda e: e.self_cpu_time_total, reverse=True)[:10]
    cells = [[f"`{e.key}`", f"{e.count / rounds:.0f}", f"{e.self_cpu_time_total / whole:.1%}"] for e in events]
    rest = 1 - sum(event.self_cpu_time_total for event in events) / whole
    cells.append(["everything else, Python with it", "", f"{rest:.1%}"])
    text = f"Where a step of {l} tokens and {FEW} blocks spends its time; an operator counts without those it calls."
    report.table("Profile", ["operator", "calls in a step", "of the step"], cells, text)


if __name__ == "__main__":
    measure.main("model", __doc__, run)
