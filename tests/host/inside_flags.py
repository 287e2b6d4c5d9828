"""A check inside a ComfyUI (see inside.py), also for hosts that were started with flags (test_host_flags.py).

The law: whatever the host stores and computes in, its picture is the core's in float32, up to what the dtype leaves.
"""

from __future__ import annotations

from inside_sampling import by_hand, drawn, grid, setting

import comfy.samplers  # isort: skip
import torch  # isort: skip

STEPS = 3
LIMITS = {  # of the distance, in standard deviations of the latent; dtype of weights -> limit
    torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-2,
    torch.float8_e4m3fn: 0.3, torch.float8_e5m2: 0.3,
    torch.float8_e8m0fnu: 2.0,  # powers of two alone: another picture, of the same size
}  # fmt: skip


def check_a_run_is_the_cores_in_the_dtype_of_the_host(pack):
    it = setting(pack)
    velocity, noise, to_vae = by_hand(pack, it)
    want = to_vae(pack.part("zigma.solvers").solve_ode(velocity, noise, STEPS, "euler"))
    got = drawn(it, comfy.samplers.sampler_object("euler"), grid(pack, STEPS)).float()
    away = (got - want).pow(2).mean().sqrt() / want.std()
    dtype = it.model.model.diffusion_model.dtype
    print("STOCK", dtype, it.model.model.manual_cast_dtype, f"{away:.2e}")
    assert got.isfinite().all() and away < LIMITS[dtype], (dtype, away)
