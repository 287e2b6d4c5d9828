"""What can be known of the pack without a host: entry point, imports, workflows. The rest is in tests/host."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json

import pytest
from ui_format import NODE_IDS, ROOT, SOURCES, as_api

# Stock nodes that workflows use; whether they exist is asked in a real host, which runs the workflows.
STOCK = {
    "CFGGuider", "CLIPTextEncode", "KSampler", "MarkdownNote", "MaskComposite", "PreviewImage", "RandomNoise",
    "SamplerCustomAdvanced", "SaveAnimatedWEBP", "SaveImage", "SetLatentNoiseMask", "SolidMask", "VAEDecode",
}  # fmt: skip
API = sorted((ROOT / "workflows/api").glob("*.json"))


def test_the_entry_point_does_nothing_before_it_is_asked(monkeypatch):
    spec = importlib.util.spec_from_file_location("some_mangled.name", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / module.WEB_DIRECTORY).is_dir()
    assert not hasattr(module, "NODE_CLASS_MAPPINGS")  # a host would then ignore the V3 nodes
    with pytest.raises(ImportError):  # nodes need the host
        asyncio.run(module.comfy_entrypoint())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nodes_import_zigma_relatively_and_the_adapters_alone_the_hosts_model_classes(path):
    for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in item.names] if isinstance(item, ast.Import) else []
        names += [item.module or ""] if isinstance(item, ast.ImportFrom) and item.level == 0 else []
        for name in names:
            assert name.split(".")[0] not in ("zigma", "nodes"), name
            adapter = name in ("comfy.model_base", "comfy.model_patcher", "comfy.sd", "comfy.supported_models_base")
            assert not adapter or path.name.startswith("comfy_"), name


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_workflows_use_known_nodes_and_the_two_formats_say_the_same(path):
    api = json.loads(path.read_text(encoding="utf-8"))
    ui = json.loads((ROOT / "workflows" / path.name).read_text(encoding="utf-8"))
    assert {node["class_type"] for node in api.values()} <= {*NODE_IDS, *STOCK}
    assert as_api(ui) == {key: {"class_type": n["class_type"], "inputs": n["inputs"]} for key, n in api.items()}


def test_every_workflow_is_there_in_both_formats():
    assert [path.name for path in API] == sorted(path.name for path in (ROOT / "workflows").glob("*.json"))
