"""Each host with a base directory of its own, in which tiny models lie, and its server."""

from __future__ import annotations

import shutil

import pytest
from found_hosts import FAILED, FOUND, hosts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Leave word of a failure where fixtures can see it."""
    report = yield
    if report.when == "call" and report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session", params=FOUND or [None], ids=[path.name for path in FOUND] or ["none"])
def host(request):
    """The folder of a ComfyUI."""
    return request.param


@pytest.fixture(scope="session")
def base(host, tmp_path_factory):
    """Its base directory."""
    from tiny_models import write_models  # here: conftest of the tests' root loads zigma first

    folder = hosts.make_base(tmp_path_factory.mktemp("base"))
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def more_models(base, tmp_path_factory):
    """A folder as a user's models/, beside the base directory."""
    folder = tmp_path_factory.mktemp("user's models")
    (folder / "zigma").mkdir()
    tiny = base / "models" / "diffusion_models" / "tiny.safetensors"
    shutil.copyfile(tiny, folder / "zigma" / "user's.safetensors")
    return folder


@pytest.fixture(scope="session")
def server(host, base, more_models):
    """The host, running."""
    with hosts.running(host, base, more_models) as running:
        yield running
