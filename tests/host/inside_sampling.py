"""Checks inside a ComfyUI (see inside.py): our samplers in the host's nodes, and the host's nodes around our model.

The law behind most: a run through the host is `solve_ode` or `solve_sde` of the core, driven by hand.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

from host_process import close, empty, encode, loaded, refused, stock

import comfy.cli_args  # isort: skip
import comfy.model_management as management  # isort: skip
import comfy.samplers  # isort: skip
import comfy.utils  # isort: skip
import latent_preview  # isort: skip
import torch  # isort: skip
from comfy_extras import nodes_custom_sampler as custom  # isort: skip
from comfy_extras import nodes_differential_diffusion as differential  # isort: skip
from comfy_extras import nodes_model_advanced as advanced  # isort: skip

CFG, SEED = 2.0, 3
SIGMA_MIN = 1e-3  # where a velocity is asked for at the data, it is taken there


def result(out) -> tuple:
    """Of a node of either kind."""
    return getattr(out, "result", out)


def setting(pack, **latent) -> SimpleNamespace:
    """A model with two conditions and an empty latent."""
    model, clip, vae = loaded(pack)
    return SimpleNamespace(
        model=model, vae=vae, red=encode(clip, "red fox"), none=encode(clip, ""), latent=empty(pack, model, **latent)
    )


def ode(pack, solver="euler", rtol=1e-3, atol=1e-6):
    return pack.node("ZigMaODESampler").execute(solver, rtol, atol).result[0]


def sde(pack, solver="euler-maruyama", diffusion="sigma", norm=1.0, last_step="mean", last_step_size=0.04):
    node = pack.node("ZigMaSDESampler")
    return node.execute(solver, diffusion, norm, last_step, last_step_size).result[0]


def grid(pack, steps=10, denoise=1.0, spacing="uniform", shift=1.0) -> torch.Tensor:
    return pack.node("ZigMaScheduler").execute(steps, denoise, spacing, shift).result[0]


def every_sampler(pack) -> dict:
    solvers, parts = pack.part("zigma.solvers"), {}
    for solver in solvers.ODE_SOLVERS:
        parts[solver] = ode(pack, solver, 1e-2, 1e-2)  # so that dopri5 takes few steps
    for solver in solvers.SDE_SOLVERS:
        for last_step in (*solvers.LAST_STEPS, "none"):
            parts[f"{solver}, {last_step}"] = sde(pack, solver, last_step=last_step)
    return parts


def guided(it, cfg=CFG):
    return result(custom.CFGGuider().get_guider(it.model, it.red, it.none, cfg))[0]


def advanced_run(it, sampler, sigmas, latent=None, guider=None, seed: int | None = SEED) -> list[dict]:
    """SamplerCustomAdvanced: [output, denoised output]. No seed: DisableNoise."""
    noise = result(custom.DisableNoise().get_noise() if seed is None else custom.RandomNoise().get_noise(seed))[0]
    node = custom.SamplerCustomAdvanced()
    return list(result(node.sample(noise, guider or guided(it), sampler, sigmas, latent or it.latent)))


def drawn(it, sampler, sigmas, **more) -> torch.Tensor:
    return advanced_run(it, sampler, sigmas, **more)[0]["samples"]


def all_in_one(pack, it, solver="euler", steps=10, denoise=1.0, latent=None, **more) -> torch.Tensor:
    node = pack.node("ZigMaSampler")
    latent = latent or it.latent
    return node.execute(it.model, it.red, it.none, latent, SEED, steps, CFG, solver, denoise, **more).result[0][
        "samples"
    ]


def by_hand(pack, it):
    """(velocity of the plain network with guidance, the run's starting noise, latents of the model -> the host's)."""
    bundle = pack.checkpoint.load_bundle(pack.file)
    y, null = bundle.text_encoder.encode(["red fox"]), bundle.text_encoder.encode([""])
    velocity = pack.part("zigma.guidance").classifier_free(bundle.model, y, null, CFG)
    noise = torch.randn(it.latent["samples"].shape, generator=torch.Generator().manual_seed(SEED))
    return lambda x, t: velocity(x, t.clamp(max=1 - SIGMA_MIN)), noise, bundle.latent.to_vae


def check_every_solver_is_the_cores(pack):
    it = setting(pack)
    velocity, noise, to_vae = by_hand(pack, it)
    solvers = pack.part("zigma.solvers")
    for method in solvers.FIXED_STEP:
        close(drawn(it, ode(pack, method), grid(pack)), to_vae(solvers.solve_ode(velocity, noise, 10, method)), 1e-4)
    for method in solvers.SDE_SOLVERS:
        for diffusion, norm, last_step, size in (
            ("sigma", 1.0, "mean", 0.04), ("constant", 0.3, "tweedie", 0.1), ("linear", 0.7, "none", 0.04),
            ("increasing-decreasing", 2.0, "euler", 0.02), ("decreasing", 0.5, "mean", 0.04),
            ("sbdm", 0.01, "mean", 0.04),
        ):  # fmt: skip
            got = drawn(it, sde(pack, method, diffusion, norm, last_step, size), grid(pack))
            expected = solvers.solve_sde(
                velocity, noise, 10, method, diffusion=diffusion, norm=norm, t0=0.0,
                last_step=None if last_step == "none" else last_step, last_step_size=size,
                generator=torch.Generator().manual_seed(SEED + 1),
            )  # fmt: skip
            close(got, to_vae(expected), 1e-4)


def check_every_solver_follows_the_sigmas(pack):
    it = setting(pack)
    velocity, noise, to_vae = by_hand(pack, it)
    solvers = pack.part("zigma.solvers")
    sigmas = grid(pack, 8, 1.0, "cosine", 2.0)
    for part in (sigmas, sigmas[:6]):
        # The host takes a latent that is still noisy as (1 - sigma) times what it hands on.
        ends = lambda x, sigma=part[-1]: to_vae(x / (1 - sigma))  # noqa: E731
        times = (1 - part.double()).tolist()
        for method in solvers.FIXED_STEP:
            expected = solvers.solve_ode(velocity, noise, method=method, times=times)
            close(drawn(it, ode(pack, method), part), ends(expected), 1e-4)
        for method in solvers.SDE_SOLVERS:
            generator = torch.Generator().manual_seed(SEED + 1)
            expected = solvers.solve_sde(
                velocity, noise, method=method, times=times, last_step=None, generator=generator
            )
            limit = 1e-4 * ends(expected).abs().max()
            close(drawn(it, sde(pack, method, last_step="none"), part), ends(expected), limit)
            if part is not sigmas:  # which end above 0, so that there is no last step to take
                close(drawn(it, sde(pack, method), part), ends(expected), limit)


def check_dopri5_is_the_cores(pack):
    """On a part of the path: over the whole of it this model turns a millionth of noise into hundredths of dopri5."""
    it = setting(pack)
    velocity, noise, to_vae = by_hand(pack, it)
    solve_ode, sigmas = pack.part("zigma.solvers").solve_ode, torch.tensor([1.0, 0.95, 0.8])
    for rtol, atol in ((1e-2, 1e-2), (1e-4, 1e-5)):
        expected = solve_ode(velocity, noise, method="dopri5", rtol=rtol, atol=atol, t1=0.2)
        close(drawn(it, ode(pack, "dopri5", rtol, atol), sigmas), to_vae(expected / 0.2), 1e-4)
    exact = to_vae(solve_ode(velocity, noise, 200, "rk4"))
    close(drawn(it, ode(pack, "dopri5", 1e-5, 1e-5), grid(pack)), exact, 2e-2)


def check_our_euler_and_heun_are_the_stock_ones(pack):
    it = setting(pack, batch=2)
    for sigmas in (grid(pack), grid(pack, 7, 0.6, "quadratic", 3.0), grid(pack)[:6]):
        close(drawn(it, ode(pack), sigmas), drawn(it, comfy.samplers.sampler_object("euler"), sigmas), 1e-5)
    part = grid(pack)[:8]  # at sigma 0 the stock sampler takes a step of Euler
    close(drawn(it, ode(pack, "heun"), part), drawn(it, comfy.samplers.sampler_object("heun"), part), 1e-5)


def check_the_scheduler_is_the_stock_one_where_they_mean_the_same(pack):
    model = setting(pack).model
    stock_grid = lambda model, *settings: result(custom.BasicScheduler().get_sigmas(model, *settings))[0]  # noqa: E731
    for steps in (1, 2, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000):
        assert torch.equal(grid(pack, steps), stock_grid(model, "simple", steps, 1.0)), steps
    for steps, denoise in ((10, 0.5), (10, 0.25), (30, 0.6), (50, 0.1)):
        close(grid(pack, steps, denoise), stock_grid(model, "simple", steps, denoise), 1e-6)
    shifted = result(advanced.ModelSamplingAuraFlow().patch_aura(model, 3.0))[0]
    close(grid(pack, 20, 1.0, "uniform", 3.0), stock_grid(shifted, "simple", 20, 1.0), 1e-6)
    close(grid(pack, 10, 0.5, "uniform", 3.0), stock_grid(shifted, "simple", 10, 0.5), 1e-6)
    for steps in (2, 10, 50):
        close(grid(pack, steps, 1.0, "linear-quadratic"), stock_grid(model, "linear_quadratic", steps, 1.0), 1e-6)


def check_the_all_in_one_sampler_is_our_nodes_bit_for_bit(pack):
    it = setting(pack, batch=2)
    for solver in ("euler", "heun", "midpoint", "heun3", "rk4", "rk4-3/8", "dopri5"):
        assert torch.equal(all_in_one(pack, it, solver), drawn(it, ode(pack, solver), grid(pack))), solver
    for solver in ("euler-maruyama", "heun"):
        assert torch.equal(all_in_one(pack, it, f"sde-{solver}"), drawn(it, sde(pack, solver), grid(pack))), solver
    own = sde(pack, "heun", "constant", 0.5, "tweedie", 0.1)
    got = all_in_one(pack, it, "euler", spacing="cosine", shift=2.0, sampler=own)
    assert torch.equal(got, drawn(it, own, grid(pack, 10, 1.0, "cosine", 2.0)))
    stock_one = comfy.samplers.sampler_object("dpmpp_2m")
    assert torch.equal(all_in_one(pack, it, sampler=stock_one), drawn(it, stock_one, grid(pack)))
    latent = {"samples": torch.randn(2, 4, 4, 6), "noise_mask": torch.rand(1, 32, 48), "batch_index": [4, 1]}
    for sampler, solver in ((ode(pack), "euler"), (sde(pack), "sde-euler-maruyama")):
        got = all_in_one(pack, it, solver, denoise=0.7, latent=latent)
        assert torch.equal(got, drawn(it, sampler, grid(pack, 10, 0.7), latent=latent))
    custom_node = custom.SamplerCustom()
    got = custom_node.sample(it.model, True, SEED, CFG, it.red, it.none, ode(pack, "rk4"), grid(pack), it.latent)
    assert torch.equal(result(got)[0]["samples"], all_in_one(pack, it, "rk4"))


def check_two_halves_of_split_sigmas_are_the_whole(pack):
    it = setting(pack)
    for sampler, limit in ((ode(pack), 1e-5), (ode(pack, "rk4"), 1e-5), (ode(pack, "dopri5", 1e-5, 1e-5), 2e-2)):
        sigmas = grid(pack)
        high, low = result(custom.SplitSigmas().get_sigmas(sigmas, 4))
        first = advanced_run(it, sampler, high)[0]
        close(drawn(it, sampler, low, latent=first, seed=None), drawn(it, sampler, sigmas), limit)


def check_every_stock_guider_drives_our_samplers(pack):
    it = setting(pack)
    basic = result(custom.BasicGuider().get_guider(it.model, it.red))[0]
    dual = result(custom.DualCFGGuider().get_guider(it.model, it.red, it.none, it.none, CFG, 1.5, "regular"))[0]
    euler = comfy.samplers.sampler_object("euler")
    for guider in (basic, guided(it, 1.0), guided(it, 3.0), dual):
        close(drawn(it, ode(pack), grid(pack), guider=guider), drawn(it, euler, grid(pack), guider=guider), 1e-5)
        assert drawn(it, sde(pack), grid(pack), guider=guider).isfinite().all()
    same = drawn(it, ode(pack), grid(pack), guider=guided(it, 1.0))
    close(drawn(it, ode(pack), grid(pack), guider=basic), same, 1e-6)


def check_in_painting_keeps_what_the_mask_leaves(pack):
    it = setting(pack)
    source = torch.randn(1, 4, 4, 6)
    mask = torch.zeros(1, 32, 48)
    mask[:, :, 24:] = 1
    latent = {"samples": source, "noise_mask": mask}
    for denoise in (1.0, 0.5):
        for name, sampler in every_sampler(pack).items():
            got = drawn(it, sampler, grid(pack, 10, denoise), latent=latent)
            close(got[..., :3], source[..., :3], 1e-5)
            assert (got[..., 3:] - source[..., 3:]).abs().mean() > 0.01, name
    for solver in ("euler", "rk4", "sde-heun"):
        close(all_in_one(pack, it, solver, latent=latent)[..., :3], source[..., :3], 1e-5)


def check_a_soft_mask_is_what_stock_samplers_make_of_it(pack):
    it = setting(pack)
    soft = {"samples": torch.randn(1, 4, 4, 6), "noise_mask": torch.rand(1, 32, 48)}
    fading = SimpleNamespace(**vars(it))
    fading.model = result(differential.DifferentialDiffusion().execute(it.model))[0]
    stock_samplers = {name: comfy.samplers.sampler_object(name) for name in ("euler", "heun")}
    for run in (it, fading):
        largest = drawn(run, stock_samplers["euler"], grid(pack), latent=soft).abs().max()
        for name, sampler in stock_samplers.items():
            close(
                drawn(run, ode(pack, name), grid(pack), latent=soft), drawn(run, sampler, grid(pack), latent=soft), 1e-4
            )
        for name, sampler in every_sampler(pack).items():
            got = drawn(run, sampler, grid(pack), latent=soft)
            assert got.abs().max() < 3 * largest, name  # nothing explodes


def check_image_to_image_comes_closer_with_less_denoise(pack):
    it = setting(pack)
    latent = {"samples": torch.randn(1, 4, 4, 6)}
    for name, sampler in every_sampler(pack).items():
        away = [
            (drawn(it, sampler, grid(pack, 10, denoise), latent=latent) - latent["samples"]).abs().mean().item()
            for denoise in (0.05, 0.3, 1.0)
        ]
        assert away == sorted(away) and away[0] < 0.2 * away[2], (name, away)


def check_a_batch_is_its_pictures_alone(pack):
    """With batch_index the host draws each picture's starting noise for itself; noise on the way is the batch's."""
    it = setting(pack, batch=3)
    indexed = {**it.latent, "batch_index": [0, 1, 2]}
    for solver in pack.part("zigma.solvers").FIXED_STEP:
        together = drawn(it, ode(pack, solver), grid(pack), latent=indexed)
        for i in range(3):
            alone = {"samples": it.latent["samples"][i : i + 1], "batch_index": [i]}
            close(drawn(it, ode(pack, solver), grid(pack), latent=alone), together[i : i + 1], 1e-4)
            close(all_in_one(pack, it, solver, latent=alone), together[i : i + 1], 1e-4)


def check_a_seed_repeats_and_another_differs(pack):
    it = setting(pack)
    for name, sampler in every_sampler(pack).items():
        first, again, other = (drawn(it, sampler, grid(pack, 5), seed=seed) for seed in (5, 5, 6))
        assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-2), name
    noiseless = [drawn(it, sde(pack, norm=0.0), grid(pack), seed=seed) for seed in (5, 5)]
    assert torch.equal(*noiseless)


def check_an_sdes_noise_is_not_the_noise_it_starts_from(pack):
    drew, part = [], pack.part("zigma.solvers")
    plain, it = part.randn_like, setting(pack)

    def noted(x, generator=None):
        drew.append(plain(x, generator))
        return drew[-1]

    part.randn_like = noted
    high, low = result(custom.SplitSigmas().get_sigmas(grid(pack, 8), 4))
    try:
        drawn(it, sde(pack), low, latent=advanced_run(it, sde(pack), high, seed=0)[0], seed=None)
        assert not any(torch.equal(a, b) for a in drew[:4] for b in drew[4:]) and len(drew) == 8
        drew.clear()
        drawn(it, sde(pack), grid(pack, 20))
    finally:
        part.randn_like = plain
    start = torch.randn(it.latent["samples"].shape, generator=torch.Generator().manual_seed(SEED))
    pairs = [(a.flatten(), b.flatten()) for i, a in enumerate([start, *drew]) for b in [start, *drew][i + 1 :]]
    assert len(drew) == 20 and all(torch.corrcoef(torch.stack(pair))[0, 1].abs() < 0.6 for pair in pairs)
    big = drawn(it, sde(pack), grid(pack), seed=2**64 - 1)  # the largest that a seed widget gives
    assert big.isfinite().all()


@contextlib.contextmanager
def evaluations(model, stop_in: int | None = None):
    """Sigmas of the network's evaluations; Stop is pressed while number `stop_in` runs."""
    seen = []

    def note(_network, arguments, keywords):
        seen.append(float(arguments[1][0]))
        if len(seen) == stop_in:
            management.interrupt_current_processing(True)

    handle = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
        management.interrupt_current_processing(False)


def check_stop_stops_within_one_evaluation(pack):
    it = setting(pack)
    stock_names = ("euler", "heun", "dpm_2", "dpmpp_2m", "dpm_adaptive", "uni_pc", "lms")
    samplers = every_sampler(pack) | {name: comfy.samplers.sampler_object(name) for name in stock_names}
    for name, sampler in samplers.items():
        before = drawn(it, sampler, grid(pack, 3))
        with evaluations(it.model) as all_of_them:
            drawn(it, sampler, grid(pack, 3))
        assert len(all_of_them) >= 3, name
        for number in {1, 2, 3, 4, 7, len(all_of_them) - 1} & set(range(1, len(all_of_them))):
            with evaluations(it.model, stop_in=number) as seen:
                try:
                    drawn(it, sampler, grid(pack, 3))
                    raise AssertionError(f"{name}: nothing was stopped")
                except management.InterruptProcessingException:
                    pass
            assert len(seen) == number, (name, number, len(seen))
        assert torch.equal(drawn(it, sampler, grid(pack, 3)), before), name
    for solver in ("rk4", "dopri5", "sde-heun"):
        with evaluations(it.model, stop_in=2) as seen:
            try:
                all_in_one(pack, it, solver)
                raise AssertionError(f"{solver}: nothing was stopped")
            except management.InterruptProcessingException:
                pass
        assert len(seen) == 2
    with evaluations(it.model, stop_in=2) as seen:
        try:
            stock.common_ksampler(it.model, SEED, 5, CFG, "heun", "simple", it.red, it.none, it.latent)
            raise AssertionError("KSampler was not stopped")
        except management.InterruptProcessingException:
            pass
    assert len(seen) == 2


def check_solvers_cost_what_their_tooltips_say(pack):
    it = setting(pack)
    steps = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "rk4-3/8": 4}
    for solver, cost in steps.items():
        with evaluations(it.model) as seen:
            drawn(it, ode(pack, solver), grid(pack, 6))
        assert len(seen) == 6 * cost, solver
    for solver, cost in {"euler-maruyama": 1, "heun": 2}.items():
        for last_step in ("mean", "tweedie", "euler", "none"):
            with evaluations(it.model) as seen:
                drawn(it, sde(pack, solver, last_step=last_step), grid(pack, 6))
            assert len(seen) == 6 * cost + (last_step != "none"), (solver, last_step)
    counts = {}
    for steps in (1, 20):
        with evaluations(it.model) as seen:
            drawn(it, ode(pack, "dopri5"), grid(pack, steps))
        counts[steps] = len(seen)
    assert counts[1] == counts[20] and (counts[1] - 2) % 6 == 0, counts


def check_each_report_shows_its_own_picture_and_the_right_progress(pack):
    it = setting(pack)
    red = encode(loaded(pack)[1], "red fox")
    guider = result(custom.BasicGuider().get_guider(it.model, red))[0]
    _, noise, _ = by_hand(pack, it)
    bundle = pack.checkpoint.load_bundle(pack.file)
    y = bundle.text_encoder.encode(["red fox"])
    totals = {name: 8 if "," not in name else 8 + ("none" not in name) for name in every_sampler(pack)}
    totals["dopri5"] = 100
    for sigmas, whole in ((grid(pack, 8), True), (torch.cat([grid(pack, 12)[:9], grid(pack, 12)[8:9]]), False)):
        for name, sampler in every_sampler(pack).items():
            reports, total = [], totals[name] if whole else min(totals[name], 100 if name == "dopri5" else 8)
            with evaluations(it.model) as seen:

                def note(step, x0, x, of, seen=seen, reports=reports):
                    sigma = torch.full((1,), seen[-1])
                    close(x0, x + seen[-1] * bundle.model(x, 1 - sigma, y), 1e-4)
                    reports.append((step, of))

                guider.sample(noise, it.latent["samples"], sampler, sigmas, callback=note, seed=SEED)
            shown = [step for step, _ in reports]
            assert {of for _, of in reports} == {total}, (name, reports)
            assert shown == sorted(shown) and shown[0] == 0 and shown[-1] == total - 1, (name, shown)
            if name != "dopri5":
                assert shown == list(range(total)), (name, shown)


def check_dopri5_shows_how_far_it_has_come(pack):
    it = setting(pack)
    noise, reports = torch.randn(1, 4, 4, 6), []
    with evaluations(it.model) as seen:
        guided(it).sample(
            noise, it.latent["samples"], ode(pack, "dopri5", 1e-5, 1e-6), grid(pack, 1), seed=SEED,
            callback=lambda step, x0, x, of: reports.append((step, 1 - seen[-1])),
        )  # fmt: skip
    assert len(reports) > 4
    assert all(abs((step + 1) / 100 - covered) < 0.011 for step, covered in reports), reports


def check_previews_reach_the_host(pack):
    it, sent = setting(pack), []
    arguments = comfy.cli_args.args
    before, hook = arguments.preview_method, comfy.utils.PROGRESS_BAR_HOOK
    arguments.preview_method = latent_preview.LatentPreviewMethod.Latent2RGB
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: sent.append((value, total, preview)))
    try:
        for solver, total in (("euler", 6), ("rk4", 6), ("sde-euler-maruyama", 7), ("dopri5", 100)):
            sent.clear()
            all_in_one(pack, it, solver, steps=6)
            assert {of for _, of, _ in sent} == {total} and sent[-1][0] == total, (solver, sent)
            assert all(preview[1].size == (6, 4) for *_, preview in sent), sent
            if total < 10:
                assert [value for value, *_ in sent] == list(range(1, total + 1))
    finally:
        arguments.preview_method = before
        comfy.utils.set_progress_bar_global_hook(hook)


def check_the_denoised_output_is_the_expected_picture(pack):
    it = setting(pack)
    for sampler in (ode(pack), ode(pack, "rk4"), comfy.samplers.sampler_object("euler")):
        out, denoised = advanced_run(it, sampler, grid(pack, 40))
        assert (out["samples"] - denoised["samples"]).abs().max() < 0.2
    high = grid(pack)[:6]
    close(
        advanced_run(it, ode(pack), high)[1]["samples"],
        advanced_run(it, comfy.samplers.sampler_object("euler"), high)[1]["samples"], 1e-4,
    )  # fmt: skip


def check_sigmas_that_are_no_flows_are_named(pack):
    it = setting(pack)
    karras = torch.tensor([14.6, 5.0, 1.0, 0.0])
    for sampler in (ode(pack), ode(pack, "dopri5"), sde(pack)):
        refused(lambda s=sampler: drawn(it, s, karras), "connect ZigMa Scheduler", "BasicScheduler", "from 14.6")
        refused(lambda s=sampler: drawn(it, s, grid(pack).flip(0)), "ZigMa Scheduler", "fall", "[0, 0.1,")
        refused(lambda s=sampler: drawn(it, s, torch.tensor([1.0, 0.4, 0.6, 0.0])), "fall in each step")
        refused(lambda s=sampler: drawn(it, s, torch.tensor([0.5, -0.1])), "not below 0")
        refused(lambda s=sampler: drawn(it, s, torch.tensor([float("nan"), 0.0])), "fall")
        refused(lambda s=sampler: drawn(it, s, grid(pack)[:1]), "at least two different sigmas", "SplitSigmas")
        # As the stock samplers: none leaves the latent alone, and one only noises it.
        latent = {"samples": torch.randn(1, 4, 4, 6)}
        assert torch.equal(drawn(it, sampler, grid(pack)[:0], latent=latent), latent["samples"])
        euler = comfy.samplers.sampler_object("euler")
        for one in (grid(pack)[5:6], grid(pack)[-1:]):
            assert torch.equal(drawn(it, sampler, one, latent=latent), drawn(it, euler, one, latent=latent))
        repeated = grid(pack).repeat_interleave(2)
        assert torch.equal(drawn(it, sampler, repeated), drawn(it, sampler, grid(pack)))
        rounded = torch.cat([torch.tensor([1 + 5e-5]), grid(pack)])  # as a schedule in half precision may start
        assert drawn(it, sampler, rounded).isfinite().all()
    refused(lambda: grid(pack, 0), "set steps to 1 or more: got 0")
    refused(lambda: all_in_one(pack, it, steps=0), "set steps to 1 or more: got 0")
    refused(lambda: grid(pack, 10, 0.0), "set denoise above 0")


def check_models_that_count_otherwise_are_named(pack):
    it = setting(pack)
    sd3 = result(advanced.ModelSamplingSD3().patch(it.model, 3.0))[0]
    other = SimpleNamespace(**{**vars(it), "model": sd3})
    for sampler in (ode(pack), comfy.samplers.sampler_object("euler")):
        refused(lambda s=sampler: drawn(other, s, grid(pack)), "use ModelSamplingAuraFlow", "1000")
    aura = result(advanced.ModelSamplingAuraFlow().patch_aura(it.model, 3.0))[0]
    other = SimpleNamespace(**{**vars(it), "model": aura})
    assert torch.equal(drawn(other, ode(pack), grid(pack)), drawn(it, ode(pack), grid(pack)))
    eps = result(advanced.ModelSamplingDiscrete().patch(it.model, "eps", False))[0]
    other = SimpleNamespace(**{**vars(it), "model": eps})
    for sampler in (ode(pack), sde(pack)):
        refused(lambda s=sampler: drawn(other, s, grid(pack)), "connect a ZigMa MODEL", "no flow")


def check_an_error_in_a_run_leaves_the_next_one_alone(pack):
    it = setting(pack)
    before = drawn(it, ode(pack, "rk4"), grid(pack))

    def broken(step, x0, x, of):
        raise RuntimeError("a preview that fails")

    for sampler in (ode(pack, "rk4"), ode(pack, "dopri5"), sde(pack)):
        with contextlib.suppress(RuntimeError):
            guided(it).sample(torch.randn(1, 4, 4, 6), it.latent["samples"], sampler, grid(pack), callback=broken)
            raise AssertionError("the error was swallowed")
    assert torch.equal(drawn(it, ode(pack, "rk4"), grid(pack)), before)


def check_a_model_of_another_path_is_asked_on_the_linear_one(pack):
    """What the host gets of a model that predicts noise on the GVP path is the velocity of the linear path."""
    bundle, flow = pack.checkpoint.load_bundle(pack.file), pack.part("zigma.flow")
    path = pack.file.with_name("gvp.safetensors")
    pack.checkpoint.save_checkpoint(
        bundle.model, path, {"zigma.flow": '{"path": "gvp", "prediction": "noise"}'}, text_encoder=bundle.text_encoder,
        autoencoder=bundle.autoencoder, latent=bundle.latent, condition=bundle.condition,
    )  # fmt: skip
    try:
        model = loaded(pack, "gvp.safetensors")[0]
        x, t, y = torch.randn(3, 4, 4, 6), torch.tensor([0.1, 0.5, 0.9]), bundle.text_encoder.encode(["red fox"] * 3)
        got = model.model.diffusion_model(x, 1 - t, y)

        def predict(x, t):
            return bundle.model(x, t, y)

        close(got, -flow.linear_velocity(predict, flow.GVPPath(), "noise")(x, t), 1e-4)
        assert (got + predict(x, t)).abs().max() > 0.1
    finally:
        path.unlink()
