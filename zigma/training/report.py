"""What a run has done, on one page that needs nothing else: report.html in its folder."""

from __future__ import annotations

import base64
import html
import io
import logging
from pathlib import Path

from PIL import Image

from .run_folder import RunFolder
from .settings import Settings, to_toml

__all__ = ["loss_plot", "write_report"]

log = logging.getLogger(__name__)

SHEETS = 6  # of those on the way, beside the last
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#26292e}"
    "img{max-width:100%;border:1px solid #e2e5e9}pre{background:#f5f6f8;padding:.8rem;overflow:auto;font-size:13px}"
    "figure{margin:1rem 0}figcaption{color:#787c82}"
)


def loss_plot(entries: list[dict], size: tuple[int, int] = (900, 420)) -> Image.Image:
    """The losses of a log's entries (RunFolder.log_entries), and the validation losses, as a picture.

    Raises:
        ImportError: matplotlib is not installed. ValueError: there is nothing to draw.
    """
    training = [(entry["step"], entry["loss"]) for entry in entries if entry.get("loss") is not None]
    validation = [(entry["step"], entry["validation_loss"]) for entry in entries if "validation_loss" in entry]
    if not training and not validation:
        raise ValueError("the log has no losses yet: train some steps first")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing losses needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="#9ec5e8", linewidth=1, label="loss")
        axes.plot(steps, _smooth(losses), color="#1f77b4", linewidth=1.8, label="loss, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#d9730d", markersize=4, label="validation loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _smooth(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Exponential mean without the pull towards its first value."""
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(mean / norm)
    return smoothed


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
    except (ImportError, ValueError) as error:
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
    path.write_text(page, encoding="utf-8")
    return path


def _figure(picture: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
