"""The flags of a ComfyUI that choose what models are stored and computed in, each in a process of its own.

Those for memory on a GPU (--lowvram, --novram and the like) exclude --cpu: inside_weights.py offloads by hand.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from found_hosts import NEEDS_HOST, hosts
from test_host import INSIDE

CHECK = "check_a_run_is_the_cores_in_the_dtype_of_the_host"
OTHERS = " --fast --disable-smart-memory --deterministic --force-channels-last"  # together, in the process of float32

pytestmark = [pytest.mark.host, NEEDS_HOST]


def flags_of(host) -> list[str]:
    """Those of the groups --force-fp32 and --fp32-unet, as the host's parser has them."""
    text = (host / "comfy/cli_args.py").read_text(encoding="utf-8")
    found = re.findall(r'^(?:fp|fpunet)_group\.add_argument\("(--[\w-]+)"', text, re.MULTILINE)
    assert {"--force-fp32", "--bf16-unet", "--fp8_e4m3fn-unet"} <= set(found), found
    return [flag + OTHERS * (flag == "--force-fp32") for flag in found]


def test_a_run_is_the_cores_under_every_flag(host, base):
    for flags in flags_of(host):
        done = subprocess.run(
            [hosts.interpreter(host), INSIDE, host, base, CHECK], capture_output=True, text=True, timeout=120,
            cwd=base, env={**os.environ, "ZIGMA_HOST_FLAGS": flags},
        )  # fmt: skip
        assert f'"name": "{CHECK}", "problem": null' in done.stdout, f"{flags}:\n{done.stdout}\n{done.stderr[-3000:]}"
