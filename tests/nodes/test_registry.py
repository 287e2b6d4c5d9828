"""What the registry of ComfyUI asks of a pack, so that publishing it is one command."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted(p for folder in ("nodes", "zigma", "scripts", "tests", "tools", "benchmarks", "native")
                 for p in (ROOT / folder).rglob("*.py"))  # fmt: skip


def test_names_and_version_are_what_it_takes():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    name = project["name"]
    assert re.fullmatch(r"[a-z][a-z0-9_-]{0,99}", name) and "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and project["license"]
    assert comfy["DisplayName"] and re.fullmatch(r"[a-z0-9][a-z0-9-]*", comfy["PublisherId"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


def test_what_a_host_installs_is_a_part_of_what_the_project_needs():
    needed = {re.match(r"[\w-]+", line).group() for line in PROJECT["project"]["dependencies"]}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = {re.match(r"[\w-]+", line).group() for line in lines if line and not line.startswith("#")}
    assert asked and asked <= needed


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_source_runs_text_as_code(path):
    """The registry's scan refuses eval and exec wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"


def test_what_the_archive_leaves_out_is_there_and_no_part_of_the_pack():
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.rstrip("/") for line in lines if line and not line.startswith("#")}
    assert all((ROOT / name).is_dir() for name in left_out)
    assert not left_out & {"nodes", "zigma", "web", "workflows", "locales", "docs", "scripts"}
