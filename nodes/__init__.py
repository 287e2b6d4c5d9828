"""The nodes, one file per user task: a file here is all that a new one takes, beside its help page.

comfy_model.py, comfy_text.py and comfy_vae.py alone know the host's classes for models, text encoders and VAEs.
"""

import importlib
import pkgutil

from comfy_api.latest import ComfyExtension, io

from .load import register_folder

__all__ = ["NODES", "ZigMaExtension"]


def _nodes() -> list[type[io.ComfyNode]]:
    """Every node class that a file of this folder defines, in the order of files and of lines."""
    found = []
    for entry in sorted(pkgutil.iter_modules(__path__), key=lambda entry: entry.name):
        module = importlib.import_module(f".{entry.name}", __name__)
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, io.ComfyNode) and value.__module__ == module.__name__
        ]
    return found


NODES = _nodes()


class ZigMaExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The classes of all nodes; their lists of files may be asked for from now on."""
        register_folder()
        return NODES
