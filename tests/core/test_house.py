"""Laws of the whole project: what every module, document and command obeys."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = sorted(path for room in ("zigma", "nodes") for path in (ROOT / room).rglob("*.py")) + [
    path for path in [ROOT / "__init__.py"] if path.exists()
]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "web").rglob("*.md"))]
HOST_MODULES = {
    "comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server",
    "execution",
}  # fmt: skip
PRINTERS = {"cli.py", "__main__.py"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.Module):
    """(line, first part of the module's name) of every absolute import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_imports_of_our_own_are_relative(path):
    """A host loads the pack by path under another name: there `import zigma` finds nothing, or somebody else's."""
    absolute = [line for line, module in imports(ast.parse(path.read_text(encoding="utf-8"))) if module == "zigma"]
    assert not absolute, f"{name(path)} imports zigma absolutely on lines {absolute}"


@pytest.mark.parametrize("path", [path for path in PRODUCT if (ROOT / "zigma") in path.parents], ids=name)
def test_zigma_does_not_know_the_host(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [(line, module) for line, module in imports(tree) if module in HOST_MODULES]
    assert not found, f"{name(path)} imports the host: {found}"
    relative = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and "nodes" in (node.module or "").split(".")
    ]
    assert not relative, f"{name(path)} imports nodes/, which imports zigma/, on lines {relative}"


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_product_code_neither_prints_nor_asserts(path):
    """A host's console is not ours, and an assert is no sentence (and is gone under python -O)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert), f"{name(path)}:{node.lineno} asserts: raise with a sentence"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            allowed = path.name in PRINTERS or node.func.id not in {"print", "eval", "exec"}
            assert allowed, f"{name(path)}:{node.lineno} calls {node.func.id}()"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name(path)}:{node.lineno} catches everything, cancellation too"


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not bare, f"{name(path)} does not say what {', '.join(bare)} do"


IMPORT_PROBE = """
import logging, os, pathlib, subprocess, sys, threading
logging.basicConfig(level=logging.DEBUG)
import torch
torch.set_num_threads(1)
before, threads, state = set(sys.modules), threading.active_count(), torch.random.get_rng_state()

def forbidden(event, arguments):
    if event in {"subprocess.Popen", "os.system", "socket.connect", "urllib.Request", "ctypes.dlopen"}:
        raise AssertionError(f"importing zigma did {event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise AssertionError(f"importing zigma opened {arguments} for writing")

sys.dont_write_bytecode = True
sys.addaudithook(forbidden)
import zigma
for module in sys.argv[1:]:
    __import__(module)
assert not torch.cuda.is_initialized(), "importing zigma initialised CUDA"
assert threading.active_count() == threads, "importing zigma started a thread"
assert torch.equal(state, torch.random.get_rng_state()), "importing zigma drew random numbers"
late = {"scipy", "matplotlib", "tqdm", "triton", "mamba_ssm"} & (set(sys.modules) - before)
assert not late, f"importing zigma brought {late}, which only some calls need"
"""


EVERY_MODULE = [f"zigma.{path.stem}" for path in (ROOT / "zigma").glob("[a-z]*.py")]


@pytest.mark.parametrize("modules", [[], EVERY_MODULE], ids=["package", "every module"])
def test_importing_does_no_work(modules):
    """No output, file, process, library, thread, random number or CUDA context comes from an import."""
    command = [sys.executable, "-B", "-c", IMPORT_PROBE, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ +(.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_between_documents_resolve(document):
    text = re.sub(r"```.*?```|<!--.*?-->", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (document.parent / path).resolve() if path else document
        assert place.exists(), f"{name(document)} links to {target}, which is not there"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{name(document)} links to {target}, but there is no such heading"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_in_documents_exist(document):
    """Every `make target` of a document is a target, every `python -m zigma command` a command of ours."""
    from zigma.cli import _parser

    text = document.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    code = re.sub(r"\"[^\"\n]*\"|'[^'\n]*'|#.*", "", code)
    calls = re.findall(r"(?:^|[`;&]) *make((?: +[^\s`]+)+)", code, re.MULTILINE)
    named = {word for call in calls for word in call.split() if "=" not in word and not word.startswith("-")}
    assert named <= make_targets(), f"{name(document)} names targets that the Makefile lacks: {named - make_targets()}"
    commands = set(next(action.choices for action in _parser()._actions if isinstance(action.choices, dict)))
    named = set(re.findall(r"python3? -m zigma ([a-z][\w-]*)", code))
    assert named <= commands, f"{name(document)} names commands that zigma lacks: {named - commands}"


def test_targets_are_phony_and_explained():
    """A file called `test` must not silence `make test`; `make help` names every target."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    assert make_targets() == phony
    explained = set(re.findall(r"echo 'make ([\w-]+)", text))
    assert explained == phony - {"help"}


def requirements(text: str) -> dict[str, str]:
    """name -> version specifier of each requirement line."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {re.split(r"[<>=!~ \[]", line)[0].lower(): line for line in lines if line}


def test_requirements_leave_a_host_alone():
    """Packs that named torch or a pin in requirements.txt broke the installs of their users."""
    wanted = requirements((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert wanted and not {"torch", "torchvision", "torchaudio", "numpy"} & set(wanted)
    assert all(re.fullmatch(r"[\w-]+(>=[\d.]+)?", line) for line in wanted.values()), wanted
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in wanted.values():
        assert f'"{line}"' in project, f"requirements.txt asks for {line}, pyproject.toml for something else"


def test_version_is_stated_once_each_and_alike():
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert project.group(1) == citation.group(1)


def python_examples():
    for document in DOCUMENTS:
        blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
        for number, code in enumerate(blocks):
            yield pytest.param(code, id=f"{name(document)}-{number}")


@pytest.mark.parametrize("code", list(python_examples()))
def test_examples_in_documents_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    file = tmp_path / "example.py"
    file.write_text(code, encoding="utf-8")
    runpy.run_path(str(file), run_name="example")
