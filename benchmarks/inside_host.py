"""What host_sampler.py measures within a ComfyUI, under its interpreter: `python inside_host.py HOST BASE WHAT JSON`.

WHAT is `start`, `times` or `memory`; the JSON object has its arguments, and the last line printed is the answer. The
pack's root is not on sys.path here: beside a host it would hide the host's own nodes.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import json
import logging
import statistics
import sys
import time
from pathlib import Path

WHAT, ARGUMENTS = sys.argv[3], json.loads(sys.argv[4])
del sys.argv[3:]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/host"))

from host_process import BASE, empty, encode, load_pack, loaded, stock  # noqa: E402

import comfy.samplers  # isort: skip  # noqa: E402
import torch  # isort: skip  # noqa: E402
from comfy_extras.nodes_custom_sampler import SamplerCustom  # isort: skip  # noqa: E402

CFG, SEED = 3.0, 3


def start() -> dict:
    """Seconds to load a first pack that has nothing in it, and then ours; what was logged on the way."""
    logged: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    folder = BASE / "nothing"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    (folder / "pyproject.toml").write_text('[project]\nname = "nothing"\nversion = "1"\n')
    begun = time.perf_counter()
    asyncio.run(stock.load_custom_node(str(folder), module_parent="custom_nodes"))
    first = time.perf_counter()
    logged.clear()
    load_pack()
    return {"first": first - begun, "ours": time.perf_counter() - first, "log": logged}


class Stopwatch:
    """CPU seconds spent in the guider, which a sampler calls to have the model evaluated, and in the network."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.seconds = {"evaluations": 0.0, "network": 0.0}
        self.count, self.network = 0, network

    def timed(self, name: str, function):
        @functools.wraps(function)
        def run(*arguments, **keywords):
            begun = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[name] += time.process_time() - begun
                self.count += name == "evaluations"

        return run

    def __enter__(self) -> Stopwatch:
        self.plain = comfy.samplers.CFGGuider.__call__
        comfy.samplers.CFGGuider.__call__ = self.timed("evaluations", self.plain)
        self.network.forward = self.timed("network", self.network.forward)
        return self

    def __exit__(self, *_) -> None:
        comfy.samplers.CFGGuider.__call__ = self.plain
        del self.network.forward


def runs(pack, name: str, steps: int, size: int = 0) -> tuple[torch.nn.Module, dict]:
    """The network of a model file, and the ways to draw with it."""
    model, clip, _ = loaded(pack, name)
    latent = empty(pack, model, width=size, height=size)
    red, none = encode(clip, "red"), encode(clip, "")

    def in_one(solver: str):
        node = pack.node("ZigMaSampler")
        return lambda: node.execute(model, red, none, latent, SEED, steps, CFG, solver, 1.0)

    def custom(sampler):
        node = SamplerCustom()
        sigmas = pack.node("ZigMaScheduler").execute(steps, 1.0, "uniform", 1.0).result[0]
        return lambda: node.sample(model, True, SEED, CFG, red, none, sampler, sigmas, latent)

    ode = pack.node("ZigMaODESampler").execute
    sde = pack.node("ZigMaSDESampler").execute("euler-maruyama", "sigma", 1.0, "mean", 0.04).result[0]
    return model.model.diffusion_model, {
        "KSampler, euler (stock)": lambda: stock.common_ksampler(
            model, SEED, steps, CFG, "euler", "simple", red, none, latent
        ),
        "ZigMa Sampler, euler": in_one("euler"),
        "ZigMa Sampler, rk4": in_one("rk4"),
        "SamplerCustom, ZigMa ODE Sampler, euler": custom(ode("euler", 1e-3, 1e-6).result[0]),
        "SamplerCustom, ZigMa ODE Sampler, dopri5": custom(ode("dopri5", 1e-2, 1e-2).result[0]),
        "SamplerCustom, ZigMa SDE Sampler": custom(sde),
    }


def times(name: str, steps: int, rounds: int) -> dict:
    """For each way: whole run / evaluations in it, evaluations / network in them, their number, ms of one."""
    network, ways = runs(load_pack(), name, steps)
    found: dict[str, list] = {way: [] for way in ways}
    gc.disable()
    for number in range(rounds + 1):
        for way, run in ways.items():
            with Stopwatch(network) as watch:
                begun = time.process_time()
                run()
                whole = time.process_time() - begun
            inner, net = watch.seconds["evaluations"], watch.seconds["network"]
            if number:  # the first round is not counted
                found[way].append((whole / inner, inner / net, watch.count, 1000 * inner / watch.count))
            gc.collect()
    return {
        way: [statistics.median(column) for column in zip(*values, strict=True)] for way, values in found.items()
    }  # fmt: skip


def memory(name: str, way: str, size: int, steps: int) -> float:
    """Bytes by which the resident memory grows at its peak in a run, after one of the smallest size."""
    pack = load_pack()
    bundle = pack.checkpoint.load_bundle(pack.file.with_name(name)) if way == "core" else None

    def run_of(pixels: int):
        if bundle is None:
            return runs(pack, name, steps, pixels)[1][way]
        y, null = (bundle.text_encoder.encode([text]) for text in ("red", ""))
        velocity = pack.part("zigma.guidance").classifier_free(bundle.model, y, null, CFG)
        noise = torch.randn(1, 4, pixels // 8, pixels // 8)
        return lambda: pack.part("zigma.solvers").solve_ode(velocity, noise, steps, "euler")

    run_of(64)()
    run = run_of(size)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

    def field(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * float(next(line for line in lines if line.startswith(key)).split()[1])

    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    run()
    return field("VmHWM") - before


def main() -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():  # as the host runs nodes
        answer = {"start": start, "times": times, "memory": memory}[WHAT](**ARGUMENTS)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
