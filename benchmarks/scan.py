"""How long the selective scan takes beside the matrix products of its mixer, and beside other ways to write it.

d_model 768 (1536 channels, 16 states), batch 1, float32, 256, 1024 and 4096 tokens: these shapes and no others.
"""

from __future__ import annotations

import functools
import itertools
import statistics

import measure
import torch
import torch.nn.functional as F
from measure import STATES, WIDTH, Held, Options, Report, Run
from torch import Tensor

from zigma.mixer import Mamba
from zigma.model import ZigMa
from zigma.scan_orders import LayerSchedule
from zigma.scratch import Scratch
from zigma.selective_scan import native, ordered_conv1d_silu, selective_scan_gathered

D_INNER = 2 * WIDTH
FOUR = "four GEMMs"
LOOP, PUBLISHED, MAMBAPY, TORCH, ADDCMUL = (
    "plain loop", "published loop", "mambapy", "torch backend", "torch scan, autograd"
)  # fmt: skip


class Problem:
    """Random inputs of one scan, and the ways to compute it."""

    def __init__(self, l: int, gradients: bool = False):
        g = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.empty(size).normal_(generator=g).requires_grad_(gradients)

        wide, narrow = (1, l, D_INNER), (1, l, STATES)
        A = -torch.arange(1.0, STATES + 1).repeat(D_INNER, 1).requires_grad_(gradients)
        D = torch.ones(D_INNER, requires_grad=gradients)
        bias = torch.full((D_INNER,), -4.0, requires_grad=gradients)
        self.inputs = (draw(*wide), draw(*wide), A, draw(*narrow), draw(*narrow), D, draw(*wide), bias)
        self.d_out = torch.randn(wide, generator=g) if gradients else None

    def _both_ways(self, out: Tensor) -> Tensor | tuple:
        return out if self.d_out is None else torch.autograd.grad(out, self.inputs, self.d_out)

    def scan(self, backend: str) -> Tensor | tuple:
        return self._both_ways(selective_scan_gathered(*self.inputs, backend=backend))

    def addcmul(self) -> Tensor | tuple:
        """One addcmul a step on tensors that torch prepares for all steps at once: what autograd can go through."""
        u, delta, A, B, C, D, z, bias = self.inputs
        dt = F.softplus(delta + bias)
        decay = torch.exp(dt[..., None] * A).unbind(1)
        drive = ((dt * u)[..., None] * B[:, :, None]).unbind(1)
        states = [drive[0]]
        for a, x in zip(decay[1:], drive[1:], strict=True):
            states.append(torch.addcmul(x, a, states[-1]))
        y = (torch.stack(states, 1) @ C[..., None]).squeeze(-1)
        return self._both_ways((y + D * u) * F.silu(z))

    def published(self) -> Tensor:
        """As the reference in Mamba's own package goes: channels before tokens, all steps laid out, then the loop."""
        u, delta, A, B, C, D, z, bias = self.turned
        dt = F.softplus(delta + bias[:, None])
        decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
        drive = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
        state, ys = torch.zeros_like(decay[:, :, 0]), []
        for k in range(u.shape[2]):
            state = decay[:, :, k] * state + drive[:, :, k]
            ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, k]))
        return (torch.stack(ys, dim=2) + u * D[:, None]) * F.silu(z)

    @functools.cached_property
    def turned(self) -> list[Tensor]:
        """The inputs in the layout (b, d, l)."""
        return [t.transpose(1, 2).contiguous() if t.dim() == 3 else t for t in self.inputs]

    def mambapy(self) -> Tensor | tuple:
        """As mambapy's MambaBlock calls its parallel scan, with softplus before and the gate after it."""
        from mambapy.pscan import pscan

        u, delta, A, B, C, D, z, bias = self.inputs
        dt = F.softplus(delta + bias)[..., None]
        states = pscan(torch.exp(dt * A), dt * B[:, :, None] * u[..., None])
        return self._both_ways(((states @ C[..., None]).squeeze(3) + D * u) * F.silu(z))

    def ways(self, *names: str) -> dict[str, Run]:
        """Those of the names that this machine has, by name; every instruction set of the native kernel beside them."""
        ways: dict[str, Run] = {
            measured: measure.with_instruction_set(measured, functools.partial(self.scan, "native"))
            for measured in measure.instruction_sets()
        }
        known = {
            TORCH: functools.partial(self.scan, "torch"),
            LOOP: functools.partial(self.scan, "reference"),
            PUBLISHED: self.published,
            ADDCMUL: self.addcmul,
        }
        if has_mambapy():
            known[MAMBAPY] = self.mambapy
        return ways | {name: known[name] for name in names if name in known}


class InMixer:
    """A scan as a mixer calls it in inference: u and z are the halves of in_proj's result, after the convolution wrote
    over the first, and the step sizes, which dt_proj wrote just before, make room for the result."""

    def __init__(self, problem: Problem, instruction_set: str):
        u, delta, self.A, self.B, self.C, self.D, z, self.bias = problem.inputs
        l, rank = delta.shape[1], -(-WIDTH // 16)
        self.scratch, projection = Scratch(), torch.randn(2 * D_INNER, WIDTH) * WIDTH**-0.5
        self.u, self.z = self.scratch.linear(torch.randn(1, l, WIDTH), projection, place="x and z").chunk(2, dim=-1)
        self.u.copy_(u)
        self.z.copy_(z)
        self.dt, self.weight = torch.randn(1, l, rank), torch.randn(D_INNER, rank) * rank**-0.5
        self.run = measure.with_instruction_set(instruction_set, self.scan)

    def prepare(self) -> None:
        self.delta = self.scratch.linear(self.dt, self.weight, place="step sizes")

    def scan(self) -> None:
        rest = (self.A, self.B, self.C, self.D, self.z, self.bias)
        selective_scan_gathered(self.u, self.delta, *rest, backend="native", overwrite_delta=True)

    def __call__(self) -> None:
        self.run()


def in_mixer(instruction_set: str) -> str:
    return f"{instruction_set}, in a mixer"


def has_mambapy() -> bool:
    try:
        import mambapy.pscan  # noqa: F401
    except ImportError:
        return False
    return True


def others() -> tuple[str, ...]:
    """The ways to compare the native kernel with that this machine has."""
    return (TORCH, LOOP, PUBLISHED, MAMBAPY) if has_mambapy() else (TORCH, LOOP, PUBLISHED)


def run(options: Options) -> Report:
    """Every table of this file."""
    report = Report()
    if not measure.instruction_sets():
        report.say(f"The native kernel cannot run here: {native.unavailable()}. Nothing was measured.")
        return report
    forward(report, options)
    backward(report, options)
    orders(report, options)
    memory(report, options)
    threads(report, options)
    return report


def forward(report: Report, options: Options) -> None:
    lengths = (256,) if options.quick else (256, 1024, 4096)
    fastest = measure.instruction_sets()[0]
    with torch.no_grad():
        rows = {l: _forward(l, fastest, options) for l in lengths}
    sets = measure.instruction_sets()
    names = [FOUR, *sets, *map(in_mixer, sets), "exponentials", *others()]
    cells = [[f"L {l}", f"{row[FOUR]:.1f}", *(_share(row[name], row[FOUR]) for name in names[1:])]
             for l, row in rows.items()]  # fmt: skip
    last = rows[lengths[-1]]
    text = (
        "CPU milliseconds, in brackets in per cent of the four GEMMs of the same mixer (in_proj, x_proj, dt_proj, "
        "out_proj), which is what a scan has to hide behind. `in a mixer`: as a mixer calls it in inference, where the "
        "step sizes, just written, make room for the result; else the result comes in new memory. `plain loop` is the "
        "definition in `selective_scan/reference.py`; `published loop` goes as the reference in Mamba's own package "
        "does, which lays out all steps before it starts. `exponentials`: as many as the scan needs at least, one "
        f"for each channel, token and state, by the {fastest} kernel's own exp2 in the cache: its floor. The GEMMs run "
        f"at {last['rate']:.0f} GFLOP/s, a square product of 1536 at {last['peak']:.0f}."
    )
    if not has_mambapy():
        text += " mambapy is not installed (extra `bench`), so that its parallel scan was not measured."
    report.table("The scan, forward", ["", *names], cells, text)
    report.data["forward"] = {str(l): {name: row[name] for name in names} for l, row in rows.items()}
    _hold_forward(report, rows, fastest)


def _share(ms: float, whole: float) -> str:
    return f"{ms:.1f} ({ms / whole:.1%})" if ms < 10 * whole else f"{ms:.0f} ({ms / whole:.0%})"


def _forward(l: int, fastest: str, options: Options) -> dict[str, float]:
    problem = Problem(l)
    products, work = measure.mixer_products(1, l)
    square, square_work = measure.square_product()
    candidates: dict[str, Run] = {FOUR: products, "square": square}
    candidates["exponentials"] = measure.exponentials(D_INNER * l * STATES, fastest)
    candidates |= {in_mixer(name): InMixer(problem, name) for name in measure.instruction_sets()}
    candidates |= problem.ways(*others())
    row = measure.medians(candidates, options.rounds, at_most=dict.fromkeys((LOOP, PUBLISHED, MAMBAPY), 3))
    return row | {"rate": 1000 * work / row[FOUR], "peak": 1000 * square_work / row["square"]}


def _hold_forward(report: Report, rows: dict[int, dict[str, float]], fastest: str) -> None:
    avx512 = "zen4" if fastest == "zen4" else "avx512"  # AVX-512 as well, for AMD's processors
    shares = ((avx512, 0.08, 0.04), ("avx2", 0.15, 0.09))
    for (name, required, aim), kind in itertools.product(shares, (str, in_mixer)):
        for l, row in rows.items():
            if l == 256 and len(rows) > 1:
                continue
            value = row[kind(name)] / row[FOUR] if name in row else None
            limit = row["exponentials"] / row[FOUR] if name == fastest else None
            note = "" if name in row else f"this CPU has no {name}"
            what = f"native scan ({kind(name)}) / GEMMs, L {l}"
            report.held.append(Held(what, value, required, aim, limit=limit, form="{:.1%}", note=note))
    l = 1024 if 1024 in rows else 256
    row, times = rows[l], {"at_least": True, "form": "{:.1f}×"}
    # The requirement is stated against the loop that lays out all steps first; the other is there for comparison.
    for loop, required, aim in ((PUBLISHED, 35, 70), (LOOP, None, None)):
        what, floor = f"{loop} / native scan ({fastest}), forward, L {l}", row[loop] / row["exponentials"]
        report.held.append(Held(what, row[loop] / row[fastest], required, aim, limit=floor, **times))
    for loop, required, aim in ((PUBLISHED, 4, 8), (LOOP, None, None)):
        what = f"{loop} / torch backend, forward, L {l}"
        report.held.append(Held(what, row[loop] / row[TORCH], required, aim, **times))


def backward(report: Report, options: Options) -> None:
    l, fastest = 256 if options.quick else 1024, measure.instruction_sets()[0]
    problem = Problem(l, gradients=True)
    candidates = {"3 × four GEMMs": _three_times(measure.mixer_products(1, l)[0])}
    candidates |= problem.ways(TORCH, ADDCMUL, MAMBAPY)
    row = measure.medians(candidates, options.rounds, at_most=dict.fromkeys((ADDCMUL, MAMBAPY), 3))
    whole = row["3 × four GEMMs"]
    cells = [[f"L {l}", f"{whole:.1f}", *(_share(row[name], whole) for name in list(row)[1:])]]
    text = (
        "CPU milliseconds and per cent of three times the GEMMs, which is what training makes of them. The torch scan "
        "prepares decay and drive of all steps at once, does one addcmul a step, and autograd goes back through that."
    )
    report.table("The scan, forward and backward", ["", *row], cells, text)
    report.held.append(
        Held(f"autograd through the torch scan / native scan ({fastest}), forward and backward, L {l}",
             row[ADDCMUL] / row[fastest], 20, 45, at_least=True, form="{:.1f}×")
    )  # fmt: skip


def _three_times(run: Run) -> Run:
    def thrice() -> None:
        for _ in range(3):
            run()

    return thrice


@torch.no_grad()
def orders(report: Report, options: Options) -> None:
    """What reading in zigzag costs beside reading the rows as they lie."""
    cells = []
    for l in (256,) if options.quick else (1024, 4096):
        side = round(l**0.5)
        zigzag = LayerSchedule("zigzagN8", 8).orders(side, side)
        mixer, tokens = measure.layer(Mamba, l), torch.randn(1, l, WIDTH)
        ratios = [
            _order_cost(_pair(l), zigzag, options.fewer(5)),
            _order_cost(functools.partial(mixer, tokens), zigzag, options.fewer(3)),
            _blocks_cost(l, options.fewer(7 if l < 4096 else 3)),
        ]
        cells.append([f"L {l}", *(f"{ratio:+.1%}" for ratio in ratios)])
        for what, ratio in zip(("inside the mixer", "in the model's blocks"), ratios[1:], strict=True):
            report.held.append(
                Held(f"zigzag-8 / no order {what}, L {l}: more", ratio, 0.04, 0.01, limit=0.0, form="{:.1%}")
            )
    text = (
        "How much more time the eight zigzag orders take on average than reading the rows as they lie: convolution and "
        "scan alone, each gathering and scattering by the order; the whole mixer given the order; and a model of eight "
        "blocks, zigzagN8 beside sweepN1, where rows move in the norms between the mixers. Medians of "
        "the rounds' own ratios."
    )
    report.table("Token orders", ["", "convolution and scan", "mixer", "eight blocks"], cells, text)


def _pair(l: int) -> Run:
    _, delta, A, B, C, D, _, bias = Problem(l).inputs
    xz, weight, conv_bias = torch.randn(1, l, 2 * D_INNER), torch.randn(D_INNER, 4), torch.randn(D_INNER)

    def run(order: Tensor | None) -> None:
        mixed = ordered_conv1d_silu(xz[..., :D_INNER], weight, conv_bias, order)
        selective_scan_gathered(mixed, delta, A, B, C, D, xz[..., D_INNER:], bias, order=order)

    return run


def _order_cost(run: Run, zigzag: list[Tensor], rounds: int) -> float:
    """Of the orders on average, beside none."""
    plain = functools.partial(run, None)
    return statistics.mean(measure.ratio(functools.partial(run, order), plain, rounds) for order in zigzag) - 1


def _blocks_cost(l: int, rounds: int) -> float:
    candidates = {}
    for scan_type in ("zigzagN8", "sweepN1"):
        config = measure.config(l, 8, scan_type=scan_type)
        x, t = torch.randn(1, 4, *config.img_dim), torch.full((1,), 0.5)
        candidates[scan_type] = functools.partial(ZigMa(config).eval(), x, t)
    return measure.ratio(*candidates.values(), rounds) - 1


def prepare_scan(way: str, l: int) -> Run:
    """For `measure.peak_growth`: a scan whose library is loaded and whose code has run."""
    torch.set_grad_enabled(False)
    Problem(16).ways(*others())[way]()
    problem = Problem(l)
    if way == PUBLISHED:
        problem.inputs = problem.turned
    return problem.ways(*others())[way]


def memory(report: Report, options: Options) -> None:
    l, fastest = 1024 if options.quick else 4096, measure.instruction_sets()[0]
    output = 4 * D_INNER * l
    names = (fastest, *others())
    grown = {name: measure.peak_growth(prepare_scan, name, l) for name in names}
    if None in grown.values():
        report.held.append(Held("memory of the scan", None, 2, 1, note="this system does not tell a process's peak"))
        return
    report.table(
        "Memory of the scan, forward", ["", *names],
        [[f"L {l}", *(f"{size / 1e6:.0f} MB ({size / output:.2f}×)" for size in grown.values())]],
        "How much the resident memory of a process of its own grows at its peak, inputs left out, the output included; "
        f"in brackets in units of the output ({output / 1e6:.0f} MB).",
    )  # fmt: skip
    report.held.append(
        Held(f"memory of the scan / its output, L {l}", grown[fastest] / output, 2, 1.0, limit=1.0, form="{:.2f}×")
    )


@torch.no_grad()
def threads(report: Report, options: Options) -> None:
    cells = []
    for l in (256,) if options.quick else (1024, 4096):
        problem = Problem(l)
        candidates = {"scan": functools.partial(problem.scan, "native"), FOUR: measure.mixer_products(1, l)[0]}
        faster = measure.speed_up(candidates, options.rounds)
        ratio = faster["scan"] / faster[FOUR]
        cells.append([f"L {l}", *(f"{faster[name]:.2f}×" for name in candidates), f"{ratio:.2f}"])
        report.held.append(Held(f"1 → 2 threads: scan's speed-up / GEMMs', L {l}", ratio, 0.9, 1.0, at_least=True))
    report.table(
        "One thread and two",
        ["", "scan", FOUR, "scan / GEMMs"],
        cells,
        "Speed-up in wall time, of threads that are awake.",
    )


if __name__ == "__main__":
    measure.main("scan", __doc__, run)
