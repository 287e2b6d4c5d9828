"""Text that a node shows in itself when it has run."""

from __future__ import annotations

import sys

from comfy_api.latest import io, ui

__all__ = ["shown"]


def shown(text: str, node: type[io.ComfyNode]) -> io.NodeOutput:
    """The text as a node's one output; in its interface as the stock text preview has it, and as its progress text.

    A host's page draws the former for its own preview node alone, the latter for any.
    """
    # Present where the host serves a page; elsewhere its import may fail, and nobody would see the text.
    running = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if running is not None and node.hidden is not None:
        running.send_progress_text(text, node.hidden.unique_id)
    return io.NodeOutput(text, ui=ui.PreviewText(text))
