"""What a run has done, on one page that needs nothing else: report.html in its folder."""

from __future__ import annotations

import base64
import html
import io
import logging
from pathlib import Path

from PIL import Image

from .loss_drawing import loss_plot
from .run_folder import RunFolder
from .settings import Settings, to_toml

__all__ = ["write_report"]

log = logging.getLogger(__name__)

SHEETS = 6  # of those on the way, beside the last
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#26292e}"
    "img{max-width:100%;border:1px solid #e2e5e9}pre{background:#f5f6f8;padding:.8rem;overflow:auto;font-size:13px}"
    "figure{margin:1rem 0}figcaption{color:#787c82}"
)


def write_report(folder: RunFolder, settings: Settings, model: Path, data: str) -> Path:
    """Write the page.

    Args:
        folder, settings: of the run.
        model: its finished file.
        data: the pre-flight report.

    Returns:
        Its path.
    """
    entries = folder.log_entries()
    best, whole = folder.best(), folder.whole()
    losses = [entry["loss"] for entry in entries if entry.get("loss") is not None]
    minutes = max((entry.get("minutes", 0) for entry in entries), default=0)
    facts = [
        f"{whole[-1].step if whole else 0} steps in {minutes:.1f} minutes",
        f"loss of the last entry {losses[-1]:.4f}" if losses else "",
        f"least validation loss {best.loss:.4f} at step {best.step}" if best is not None else "",
        f"{model.name}, {model.stat().st_size / 1e6:.1f} MB",
    ]
    parts = [f"<h1>{html.escape(folder.path.name)}</h1><p>{'; '.join(fact for fact in facts if fact)}.</p>"]
    try:
        parts.append(_figure(loss_plot(entries), "Loss against steps"))
    except ValueError as error:
        parts.append(f"<p>No curve: {html.escape(str(error))}.</p>")
    sheets = sorted((folder.path / "samples").glob("*.png"))
    chosen = sheets[:-1][:: max(1, (len(sheets) - 1) // SHEETS)][:SHEETS] if len(sheets) > 1 else []
    for sheet in [*sheets[-1:], *reversed(chosen)]:
        with Image.open(sheet) as opened:
            parts.append(_figure(opened.convert("RGB"), f"Samples at step {int(sheet.stem)}"))
    parts.append(f"<h2>Data</h2><pre>{html.escape(data)}</pre>")
    parts.append(f"<h2>Settings</h2><pre>{html.escape(to_toml(settings))}</pre>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(folder.path.name)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = folder.path / "report.html"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # of names that are none
    return path


def _figure(picture: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
