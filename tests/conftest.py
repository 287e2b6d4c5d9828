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
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # which share the processors, and so do their hosts
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

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


@pytest.hookimpl(optionalhook=True)  # there may be no xdist
def pytest_xdist_make_scheduler(config, log):
    """With several workers a file stays with one of them, and so does a host: what their tests set up, once."""
    from found_hosts import FOUND
    from xdist.scheduler import LoadScopeScheduling

    hosts = sorted((path.name for path in FOUND), key=len, reverse=True)  # one name may begin with another

    class ByFileOrHost(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            arguments = test.partition("[")[2] if "/host/" in file else ""
            return next((name for name in hosts if arguments.startswith((f"{name}-", f"{name}]"))), file)

    return ByFileOrHost(config, log)


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
