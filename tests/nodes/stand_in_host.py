"""Just enough of a host to ask the nodes for their schemas where there is no ComfyUI.

`comfy_api.latest.io` is written out: whatever a node declares is recorded. Everything else of a host is a name that can
be imported, inherited from and never called. What is learned this way is compared with real hosts in tests/host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "node_helpers",
    "server",
)  # fmt: skip
PACK = "zigma_pack_under_test"


class _Slot:
    """An input or output as it was declared."""

    def __init__(self, id: str | None = None, display_name: str | None = None, **facts) -> None:
        self.id, self.display_name, self.facts = id, display_name, facts
        self.optional, self.tooltip = facts.get("optional", False), facts.get("tooltip")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.facts.get(name)


@dataclasses.dataclass
class _Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list = dataclasses.field(default_factory=list)
    outputs: list = dataclasses.field(default_factory=list)
    hidden: list = dataclasses.field(default_factory=list)
    description: str = ""
    search_aliases: list = dataclasses.field(default_factory=list)
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_input_list: bool = False
    not_idempotent: bool = False


def _kind(name: str) -> type:
    return type(name, (), {side: type(side, (_Slot,), {"io_type": name.upper()}) for side in ("Input", "Output")})


class _IO(types.ModuleType):
    """`io`: any name is a type of socket with Input and Output, but for the few that are something else."""

    Schema = _Schema

    Hidden = types.SimpleNamespace(prompt="PROMPT", extra_pnginfo="EXTRA_PNGINFO", unique_id="UNIQUE_ID")

    class ComfyNode:
        """Base of every node."""

    @staticmethod
    def Custom(io_type: str) -> type:
        """A type of socket that the pack makes up."""
        return _kind(io_type)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        kind = _kind(name)
        setattr(self, name, kind)
        return kind


class _Anything(types.ModuleType):
    """A module of a host: its names are classes that nobody may make an instance of."""

    __path__: list = []  # noqa: RUF012 - what makes it a package

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        kind = type(name, (), {"__init__": _refuse, "__module__": self.__name__})
        setattr(self, name, kind)
        return kind


def _refuse(self, *_, **__) -> None:
    raise RuntimeError(f"{type(self).__name__} of a host was called, but there is only a stand-in")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PARTS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Anything(spec.name)
        if spec.name == "comfy_api.latest":
            module.io = _IO("comfy_api.latest.io")
        if spec.name == "folder_paths":
            files = {name: staticmethod(lambda *_: []) for name in ("get_filename_list", "get_folder_paths")}
            for name, function in files.items():
                setattr(module, name, function.__func__)
            module.models_dir, module.folder_names_and_paths = "models", {}
            module.add_model_folder_path = lambda *_, **__: None
        return module

    def exec_module(self, module) -> None:
        """Nothing to run."""


@contextlib.contextmanager
def nodes_of_the_pack() -> Iterator[list[type]]:
    """The node classes, loaded by path under another name, as a host does it; no part of a host stays imported."""
    before, finder = set(sys.modules), _Finder()
    sys.meta_path.insert(0, finder)
    try:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )  # fmt: skip
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
        yield importlib.import_module(f"{PACK}.nodes").NODES
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            # The pack's own modules stay: the operators that it registers, once in a process, live in them.
            if name.partition(".")[0] in PARTS:
                del sys.modules[name]


def schema_of_the_guide(folder: Path):
    """The schema of docs/development.md's node, whose file is put into `folder`; what the text says of it beside it."""
    text = (ROOT / "docs/development.md").read_text(encoding="utf-8")
    file = folder / "upside_down.py"
    file.write_text(re.search(r"```py\n(.*?)```", text, re.DOTALL).group(1), encoding="utf-8")
    with nodes_of_the_pack() as nodes:
        package = nodes[0].__module__.rpartition(".")[0]
        spec = importlib.util.spec_from_file_location(f"{package}.upside_down", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.ZigMaUpsideDown.define_schema(), text
