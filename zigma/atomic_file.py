"""Writing files that are either whole or not there: in the same folder, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["replacing", "write_safetensors"]

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file in the same folder that takes the place of `path` once it is complete and on the disk."""
    # Not by tempfile, whose files nobody else may read; to look up the umask is to change it for all threads.
    temporary = path.parent / f".{path.stem}-{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name, too, has to survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:  # fmt: skip
    """Write a .safetensors file tensor by tensor, and put it in its place when it is whole and on the disk.

    The library's writer first copies all tensors into memory, which a model as large as the memory does not survive.
    The format: the header's length (8 bytes, little-endian), the header (JSON, padded to 8 bytes), the numbers.

    Args:
        tensors: on any device, of any strides; each is converted by itself.
        path: a file of that name is replaced, or stays as it is if anything fails.
        metadata: strings.
        dtypes: of the tensors in the file, where they are not their own.

    Raises:
        ValueError: a dtype that the format does not know. OSError: the disk is full, the folder is not writable.
    """
    dtypes = {key: (dtypes or {}).get(key, value.dtype) for key, value in tensors.items()}
    wrong = [f"{key} ({dtype})" for key, dtype in dtypes.items() if dtype not in _DTYPE_NAMES]
    if wrong:
        raise ValueError(f"got {wrong[0]}, expected tensors of the types {', '.join(map(str, _DTYPE_NAMES))}")
    # The widest numbers first, so that each tensor is aligned to its own.
    names = sorted(tensors, key=lambda key: (-dtypes[key].itemsize, key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPE_NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            # The device by itself and first: a host's parameter may apply its patches on the way there.
            numbers = tensors[name].to("cpu").detach().to(dtypes[name]).contiguous()
            if sys.byteorder != "little":
                raise ValueError("this machine is big-endian, and the format is little-endian: write it elsewhere")
            file.write(memoryview(numbers.reshape(-1).view(torch.uint8).numpy()))
