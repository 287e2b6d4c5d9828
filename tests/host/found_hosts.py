"""The hosts of this machine, and the mark of a test that needs one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_spec = importlib.util.spec_from_file_location("zigma_tools_host", ROOT / "tools/host.py")
hosts = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = hosts
_spec.loader.exec_module(hosts)

FOUND = hosts.find_hosts()
NEEDS_HOST = pytest.mark.skipif(
    not FOUND, reason="NO COMFYUI FOUND: nothing was tested in a real host; set COMFYUI_PATH"
)  # fmt: skip
FAILED = pytest.StashKey[bool]()
