"""Text that a node shows in itself, while it runs and when it has run."""

from __future__ import annotations

import sys

from comfy_api.latest import io, ui

__all__ = ["shown", "tell"]


def tell(text: str, node: type[io.ComfyNode]) -> None:
    """Show a text in a node that runs, where there is a page to show it."""
    # Present where the host serves a page; elsewhere its import may fail, and nobody would see the text.
    running = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if running is not None and node.hidden is not None:
        running.send_progress_text(text, node.hidden.unique_id)


def shown(text: str, node: type[io.ComfyNode], *before) -> io.NodeOutput:
    """The text as a node's last output, after those `before`; in its interface as the stock text preview has it, and as
    its progress text.

    A host's page draws the former for its own preview node alone, the latter for any.
    """
    tell(text, node)
    return io.NodeOutput(*before, text, ui=ui.PreviewText(text))
