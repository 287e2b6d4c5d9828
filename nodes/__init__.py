"""The nodes, one file per user task; comfy_model.py alone knows the host's model classes."""

from comfy_api.latest import ComfyExtension, io

from .decode import ZigMaVAEDecode
from .empty_latent import ZigMaEmptyLatent
from .load import ZigMaModelLoader
from .sample import ZigMaSampler
from .scan_order import ZigMaScanOrder

__all__ = ["NODES", "ZigMaExtension"]

NODES = [ZigMaModelLoader, ZigMaScanOrder, ZigMaEmptyLatent, ZigMaSampler, ZigMaVAEDecode]


class ZigMaExtension(ComfyExtension):
    """What the host asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The classes of all nodes."""
        return NODES
