"""Checks inside a ComfyUI (see inside.py): the host's own samplers and schedulers on our model, every one that it has.

The law: whatever KSampler offers runs, repeats with its seed, shows its progress and stops. A sampler that adds no
noise of its own integrates the flow of the model: all of them come to one picture, that of our dopri5.
"""

from __future__ import annotations

import contextlib
import inspect

from host_process import close, empty, loaded, stock
from inside_sampling import CFG, SEED, all_in_one, evaluations, setting

import comfy.cli_args  # isort: skip
import comfy.k_diffusion.sampling as k_diffusion  # isort: skip
import comfy.model_management as management  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip
import comfy.utils  # isort: skip
import latent_preview  # isort: skip
import torch  # isort: skip

SAMPLERS, SCHEDULERS = list(comfy.samplers.KSampler.SAMPLERS), list(comfy.samplers.KSampler.SCHEDULERS)
STEPS, MANY = 6, 60
TIMES_EULER = 3  # a sampler may be so much farther from the flow's own picture than euler is in as many steps
TIMES_SIMPLE = 4  # and a scheduler so much farther than simple: exponential takes large steps near the noise


def ksampler(it, sampler="euler", scheduler="simple", steps=STEPS, seed=SEED, latent=None) -> torch.Tensor:
    return stock.common_ksampler(
        it.model, seed, steps, CFG, sampler, scheduler, it.red, it.none, latent or it.latent
    )[0]["samples"]  # fmt: skip


def pairs() -> list[tuple[str, str]]:
    """Each sampler with simple and with a scheduler in turn, each scheduler with euler."""
    turns = [(name, SCHEDULERS[i % len(SCHEDULERS)]) for i, name in enumerate(SAMPLERS)]
    plain = [(name, "simple") for name in SAMPLERS] + [("euler", name) for name in SCHEDULERS]
    return list(dict.fromkeys(plain + turns))


def check_every_stock_sampler_and_scheduler_runs(pack):
    """None is left out."""
    it = setting(pack)
    two = empty(pack, it.model, batch=2)
    for pair in pairs():
        first, again, other = (ksampler(it, *pair, seed=seed) for seed in (3, 3, 4))
        assert first.shape == it.latent["samples"].shape and first.isfinite().all(), pair
        assert torch.equal(first, again) and (first - other).abs().max() > 0.01, pair
        both = ksampler(it, *pair, latent=two)
        assert both.shape == two["samples"].shape and both.isfinite().all(), pair
        assert (both[0] - both[1]).abs().max() > 0.01, pair


def check_every_stock_sampler_runs_on_a_class_model(pack):
    model, *_ = loaded(pack, "class_null.safetensors")
    positive, negative = pack.node("ZigMaLabelConditioning").execute(model, "fox").result[:2]
    for name in SAMPLERS:
        got = stock.common_ksampler(model, 3, 3, CFG, name, "simple", positive, negative, empty(pack, model))[0]
        assert got["samples"].isfinite().all(), name


@contextlib.contextmanager
def readers_of_the_negative():
    """What asks for the output of the negative condition by itself: the samplers of CFG++."""
    asked, plain = [], comfy.model_patcher.set_model_options_post_cfg_function

    def noted(*arguments, **keywords):
        asked.append(True)
        return plain(*arguments, **keywords)

    comfy.model_patcher.set_model_options_post_cfg_function = noted
    try:
        yield asked
    finally:
        comfy.model_patcher.set_model_options_post_cfg_function = plain


def kinds(it) -> dict[str, str]:
    """Sampler -> what it is: "noisy", when noise of another seed gives another picture from the same start; "CFG++"
    when it reads the negative condition's output; else "ODE"."""
    noise, found = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(SEED)), {}
    for name in SAMPLERS:
        with readers_of_the_negative() as asked:
            one, other = (
                comfy.sample.sample(
                    it.model, noise, STEPS, CFG, name, "simple", it.red, it.none, torch.zeros_like(noise), seed=seed
                )
                for seed in (1, 2)
            )  # fmt: skip
        found[name] = "noisy" if not torch.equal(one, other) else "CFG++" if asked else "ODE"
    return found


def gap(a, b) -> float:
    return (a - b).pow(2).mean().sqrt().item()


def check_stock_samplers_without_noise_draw_the_flows_picture(pack):
    """Those of CFG++ where both conditions are the same: otherwise they add the guidance once in each step, whatever
    its length, so that more steps are more guidance and there is no picture that they come to."""
    it = setting(pack)
    same = setting(pack)
    same.none = same.red
    kind = kinds(it)
    assert {"euler", "heun", "dpmpp_2m", "uni_pc"} <= {name for name in kind if kind[name] == "ODE"}, kind
    for run, wanted in ((it, "ODE"), (same, "CFG++")):
        want = all_in_one(pack, run, "dopri5")
        own = gap(ksampler(run, steps=MANY), want)
        assert own < 0.05 * want.std(), own
        for name in [name for name in kind if kind[name] == wanted]:
            away = gap(ksampler(run, name, steps=MANY), want)
            assert away < TIMES_EULER * own, (name, away, own)
        for name in SCHEDULERS:
            away = gap(ksampler(run, "euler", name, MANY), want)
            assert away < TIMES_SIMPLE * own, (name, away, own)


def check_ksampler_advanced_in_two_halves_is_the_whole_run(pack):
    it, node = setting(pack), stock.KSamplerAdvanced()

    def part(scheduler, latent, noise, start, end, leftover):
        return node.sample(
            it.model, noise, SEED, 10, CFG, "euler", scheduler, it.red, it.none, latent, start, end, leftover
        )[0]  # fmt: skip

    for scheduler in SCHEDULERS:
        first = part(scheduler, it.latent, "enable", 0, 5, "enable")
        second = part(scheduler, first, "disable", 5, 10000, "disable")["samples"]
        close(second, ksampler(it, "euler", scheduler, 10), 1e-5)


@contextlib.contextmanager
def progress():
    """(value, total, preview) of each report that reaches the host's front."""
    sent, arguments = [], comfy.cli_args.args
    method, hook = arguments.preview_method, comfy.utils.PROGRESS_BAR_HOOK
    arguments.preview_method = latent_preview.LatentPreviewMethod.Latent2RGB
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: sent.append((value, total, preview)))
    try:
        yield sent
    finally:
        arguments.preview_method = method
        comfy.utils.set_progress_bar_global_hook(hook)


def chooses_its_own_steps(name: str) -> bool:
    """It gets the ends of the sigmas alone: dpm_fast and dpm_adaptive."""
    function = getattr(k_diffusion, f"sample_{name}", None)
    return function is not None and "sigmas" not in inspect.signature(function).parameters


def check_every_stock_sampler_shows_each_step(pack):
    it = setting(pack)
    for name in SAMPLERS:
        with progress() as sent:
            ksampler(it, name)
        values = [value for value, *_ in sent]
        assert all(total == STEPS and preview[1].size == (6, 4) for _, total, preview in sent), (name, sent)
        if chooses_its_own_steps(name):
            assert values and values == sorted(values), (name, values)
        else:
            assert values == list(range(1, STEPS + 1)), (name, values)


def check_every_stock_sampler_stops_within_one_evaluation(pack):
    it = setting(pack)
    for name in SAMPLERS:
        for number in (1, 2):
            with evaluations(it.model, stop_in=number) as seen:
                try:
                    ksampler(it, name, steps=3)
                    raise AssertionError(f"{name}: nothing was stopped")
                except management.InterruptProcessingException:
                    pass
            assert len(seen) == number, (name, number, len(seen))
