"""ZigMa for ComfyUI: the entry point that a host finds. Nothing happens here before it asks."""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """The pack's nodes, as ComfyUI's V3 API wants them."""
    from .nodes import ZigMaExtension

    return ZigMaExtension()
