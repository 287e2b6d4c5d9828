"""One full-size published file, in processes of their own, so that each knows its peak of memory.

full_size.py write SHAPES NAME FILE       random weights of that shape, as `model` and as `ema`
full_size.py step|convert FILE ARGUMENTS  prints the peak of memory above that of the imports, in bytes
"""

import json
import resource
import sys
from pathlib import Path

import torch


def write(shapes: str, name: str, path: str) -> None:
    shapes = json.loads(Path(shapes).read_text())[name]["shapes"]
    generator = torch.Generator().manual_seed(0)
    ema, model = ({k: 0.02 * torch.randn(v, generator=generator) for k, v in shapes.items()} for _ in range(2))
    torch.save({"model": model, "ema": ema, "train_steps": 1}, path)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def use(what: str, path: str, arguments: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from zigma import checkpoint, load_checkpoint, save_checkpoint  # noqa: F401 - all imports before the base

    base = peak()
    model = load_checkpoint(path, **json.loads(arguments))
    if what == "convert":
        save_checkpoint(model, Path(path).with_suffix(".safetensors"))
    else:
        config = model.config
        with torch.inference_mode():
            y = torch.randn(1, 77, config.d_context) if config.has_text else None
            v = model(torch.randn(1, config.in_channels, *config.img_dim), torch.rand(1), y)
        assert v.isfinite().all()
    print(peak() - base)


if __name__ == "__main__":
    write(*sys.argv[2:]) if sys.argv[1] == "write" else use(*sys.argv[1:])
