"""The files that examples of help pages ask for and that are not shipped, for taking their pictures.

What they draw is to be looked at: they learn the pictures of workflows/badges by heart, in a minute each. Tests make
files of the same names that know nothing (tests/host/tiny_models.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["write_files"]

ROOT = Path(__file__).resolve().parents[1]
BADGES = ROOT / "workflows/badges"
CLASSES = ("apple", "fish", "heart", "moon")
CONFIG = """
[run]
folder = "{folder}/run"
steps = 2000
batch_size = 4
precision = "fp32"
ema = 0.98
save_every = 0

[model.config]
embed_dim = 96
depth = 4
patch_size = 1
scan_type = "zigzagN8"

[data]
path = "{folder}/data"
kind = "{kind}"
size = 64
autoencoder = "{demo}"

[optimizer]
lr = 2e-3
warmup = 0.05
"""


def write_files(base: Path, nodes: list[str]) -> None:
    """Fill the folders of a host's base directory with what the examples of these nodes need, or of all."""
    shutil.copy(BADGES / "apple.png", base / "input" / "example.png")  # a fresh host has another one of that name
    if not nodes or "ZigMaLabelConditioning" in nodes:
        _learn(base, "zigma-classes", "classes", {name: f"{name}/{name}.png" for name in CLASSES})
    if not nodes or "ZigMaNoCondition" in nodes:
        _learn(base, "zigma-unconditional", "captions", {path.stem: path.name for path in BADGES.glob("*.png")})


def _learn(base: Path, name: str, kind: str, pictures: dict[str, str]) -> None:
    """Train a small model from scratch on some badges, put where in the folder of data."""
    folder = base / "learning" / name
    for badge, place in pictures.items():
        (folder / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BADGES / f"{badge}.png", folder / "data" / place)
    config = folder / "config.toml"
    demo = ROOT / "zigma/assets/emoji.safetensors"
    config.write_text(CONFIG.format(folder=folder.as_posix(), kind=kind, demo=demo.as_posix()), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "zigma", "train", config, "--quiet"], cwd=ROOT, check=True)
    (base / "models/zigma").mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "run/model.safetensors", base / "models/zigma" / f"{name}.safetensors")
