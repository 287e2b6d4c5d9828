"""Run every workflow of workflows/api/ in a real ComfyUI and save its pictures: `make comfyui COMFYUI_PATH=...`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # not the root: its nodes/ would hide a host's nodes.py

from host import HostError, find_hosts, running  # noqa: E402


def main() -> int:
    """Exit status 0, or 1 when no host was found or a workflow failed."""
    try:
        hosts = find_hosts()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    if not hosts:
        print("no ComfyUI found: say where it is, as in `make comfyui COMFYUI_PATH=~/ComfyUI`", file=sys.stderr)
        return 1
    failed = 0
    for host in hosts:
        try:
            with running(host, models=host / "models") as comfy:
                for path in sorted((ROOT / "workflows/api").glob("*.json")):
                    failed += not _run(comfy, host, path)
        except HostError as error:
            print(f"{host}: {error}", file=sys.stderr)
            failed += 1
    return int(failed > 0)


def _run(comfy, host: Path, path: Path) -> bool:
    started = time.monotonic()
    try:
        pictures = comfy.run(json.loads(path.read_text(encoding="utf-8")))
    except HostError as error:
        # The loaders' words for a file that is not there: five workflows are for files that users bring.
        absent = "no such file is in models/" in str(error)
        print(f"{host}: {path.stem}: {'NOT RUN' if absent else 'FAILED'}: {error}", file=sys.stderr)
        return absent
    folder = ROOT / "output" / "comfyui" / host.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (folder / f"{path.stem}-{name}").write_bytes(data)
        print(f"{host}: {path.stem} in {time.monotonic() - started:.1f} s: {folder / f'{path.stem}-{name}'}")
    return True


if __name__ == "__main__":
    sys.exit(main())
