"""The set-up of .venv refuses what cannot work with one sentence, and before it writes anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "environment.py"


def run(tmp_path, prelude="", arguments=(".venv",), **environment):
    """The script, after a few lines that play an interpreter which lacks something."""
    code = f"import runpy, sys\n{prelude}\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "prelude, sentence",
    [
        ("sys.version_info = (3, 9, 2)", "is Python 3.9.2, but 3.10 or newer is needed"),
        ("sys.modules['ensurepip'] = None", "apt install python3-venv"),
        ("sys.modules['venv'] = None", "has no module 'venv'"),
    ],
)
def test_an_unfit_interpreter_gets_a_sentence(tmp_path, prelude, sentence):
    done = run(tmp_path, prelude)
    assert done.returncode == 1
    assert sentence in done.stderr and sys.executable in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "something was written before the check"


def test_a_failed_step_names_the_command_and_the_remedy(tmp_path):
    """Here the interpreter's own torch is reused, and then there is no project to install."""
    done = run(tmp_path, arguments=(".venv", "--extras", "test"), PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert "pip install" in done.stderr and "failed with exit status 1" in done.stderr and "TORCH=" in done.stderr
    # It got as far as that with a torch in place: the interpreter's, which .venv sees although it lies elsewhere.
    query = "import torch, sys; print(torch.__file__, sys.prefix)"
    out = subprocess.check_output([tmp_path / ".venv/bin/python", "-c", query], text=True, cwd=tmp_path).split()
    import torch

    assert Path(out[0]).samefile(torch.__file__) and Path(out[1]).samefile(tmp_path / ".venv")
