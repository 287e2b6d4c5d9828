"""Make `import zigma` mean this checkout's zigma/, with nothing of ours on sys.path.

The pack's root must not be on sys.path: beside a ComfyUI its nodes/ would hide the host's nodes.py. So zigma alone is
loaded from its path, whether or not a package of that name is installed.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Before torch loads its OpenMP: threads that spin for each other take ten times as long beside another busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parents[1]


def _load_zigma() -> None:
    folder = ROOT / "zigma"
    spec = importlib.util.spec_from_file_location(
        "zigma", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["zigma"] = module
    spec.loader.exec_module(module)


_load_zigma()


def pytest_terminal_summary(terminalreporter) -> None:
    """Say loudly when nothing ran in a real host."""
    reasons = {report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if len(report.longrepr) == 3}
    if any("NO COMFYUI FOUND" in reason for reason in reasons):
        terminalreporter.section("NO COMFYUI FOUND", sep="!", red=True, bold=True)
        terminalreporter.write_line(
            "The tests in a real ComfyUI were SKIPPED: say where one is, as in "
            "`make test COMFYUI_PATH=~/ComfyUI` (several: separated by a colon, on Windows by a semicolon)."
        )


@pytest.fixture
def fresh_choices(monkeypatch):
    """Scan backends are chosen anew, with nothing in the environment, and forgotten afterwards."""
    from zigma.selective_scan import dispatch

    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch.forget_choices()
    yield
    dispatch.forget_choices()


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT
