"""Train on several GPUs, or machines:  accelerate launch scripts/finetune.py CONFIG.toml [--set run.steps=500]

The same run as `python -m zigma train CONFIG.toml`, with the same batches: [run] batch_size counts the pictures of all
processes together.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from zigma.cli import main
except ImportError:  # not installed: this script lies beside the package
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from zigma.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
