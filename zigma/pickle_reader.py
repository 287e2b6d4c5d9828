"""Reading torch's .pt files without executing them.

A pickle is a program for a small stack machine, and Python's own reader runs it: whoever wrote the file decides which
functions are called. This reader interprets the same opcodes as a description. A name in the file becomes a `Symbol`,
a call of one becomes data, and nothing is imported or called, whatever the file says. Names that no model file needs
are refused by name, so that a harmful file is recognised as one.

Format: Python's pickletools documents the opcodes; a file of torch.save is a zip of `data.pkl` and of the tensors'
bytes, `data/<key>`, uncompressed.
"""

from __future__ import annotations

import dataclasses
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["PickleError", "Record", "TensorReference", "TorchFile", "read_pickle"]

LARGEST_PICKLE = 1 << 28  # bytes; that of the largest published model is below one megabyte
TORCH_1_5_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_DTYPES = {str(dtype).removeprefix("torch.") for dtype in _STORAGES.values()}
_PLAIN_TYPES = {"dict", "list", "tuple", "set", "int", "float", "str", "bool", "bytes", "object"}
# Calls of these become inert records: the numbers of numpy, which a training loop may have left beside the weights.
_RECORDS = {
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype"),
    ("_codecs", "encode"), ("torch", "device"),
}  # fmt: skip
_DICTIONARIES = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "dict")}


class PickleError(ValueError):
    """A pickle that is damaged, or asks for what no model file needs."""


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A name in a pickle, nothing more: it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class Record:
    """An object of a class that was not built: its name, the arguments and the state it was saved with."""

    symbol: Symbol
    arguments: tuple
    state: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class TensorReference:
    """Where a tensor lies in the file; `TorchFile.tensor` reads it."""

    key: str
    dtype: torch.dtype
    stored: int  # numbers in its storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


# What the standard library raises on damaged zips, as found by damaging some.
_ZIP_ERRORS = (
    zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError, ValueError, struct.error, zlib.error,
)  # fmt: skip

_MARK = object()


def _permitted(symbol: Symbol) -> bool:
    module, name = symbol.module, symbol.name
    return (
        (module, name) in _DICTIONARIES
        or (module, name) in _RECORDS
        or (module == "builtins" and name in _PLAIN_TYPES)
        or (module == "torch" and (name in _STORAGES or name in _DTYPES or name == "Size"))
        or (module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"))
        or module == "typing"
        or module.split(".")[0] == "omegaconf"
    )


def _symbol(module: str, name: str) -> Symbol:
    symbol = Symbol("builtins" if module == "__builtin__" else module, name)
    if not _permitted(symbol):
        raise PickleError(f"it asks for {symbol}, which no model file needs")
    return symbol


def _whole(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(v) is int and v >= 0 for v in values):
        raise PickleError(f"a tensor in it has sizes {str(values)[:40]}")
    return values


def _tensor(arguments: tuple) -> TensorReference:
    if len(arguments) < 4 or not isinstance(arguments[0], _Storage):
        raise PickleError("a tensor in it has no storage")
    storage, (offset,), shape, stride = arguments[0], _whole(arguments[1:2]), *map(_whole, arguments[2:4])
    numel = 1
    for size in shape:
        numel *= size
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=False))
    if len(shape) != len(stride) or numel > storage.numel or (numel and last >= storage.numel):
        raise PickleError(f"a tensor of shape {shape} in it does not fit its storage of {storage.numel} numbers")
    return TensorReference(storage.key, storage.dtype, storage.numel, offset, shape, stride)


def _call(symbol: Any, arguments: Any) -> Any:
    """What a call in the pickle stands for."""
    if not isinstance(symbol, Symbol) or not isinstance(arguments, tuple):
        raise PickleError(f"it calls {str(symbol)[:60]}, which is no name")
    if (symbol.module, symbol.name) in _DICTIONARIES:
        pairs = arguments[0] if arguments and symbol.name != "defaultdict" else []
        return dict(pairs)
    if str(symbol) == "builtins.set":
        return set(*arguments)
    if symbol.module == "torch._utils":
        return _tensor(arguments) if symbol.name == "_rebuild_tensor_v2" else arguments[0]
    if str(symbol) == "torch.Size":
        return _whole(tuple(arguments[0]))
    return Record(symbol, arguments)


def _storage(identifier: Any) -> _Storage:
    """("storage", type, key, device, numel), as torch.save writes it."""
    if isinstance(identifier, tuple) and len(identifier) == 5 and identifier[0] == "storage":
        _, kind, key, _, numel = identifier
        if isinstance(kind, Symbol) and kind.name in _STORAGES and isinstance(key, str) and type(numel) is int:
            return _Storage(key, _STORAGES[kind.name], numel)
    raise PickleError(f"it refers to something outside itself ({str(identifier)[:60]})")


class _Machine:
    """The stack, the memo and one short method for every kind of opcode."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def since_mark(self) -> list[Any]:
        """Pop everything above the last mark, and the mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise PickleError("it is damaged (no mark)")

    def set_items(self, flat: list[Any]) -> None:
        """Pairs into the dictionary on top of the stack."""
        if not isinstance(self.stack[-1], dict):
            raise PickleError("it sets items of something that is no dictionary")
        self.stack[-1].update(zip(flat[::2], flat[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        """Items to the list or set on top of the stack."""
        top = self.stack[-1]
        if isinstance(top, list):
            top.extend(items)
        elif isinstance(top, set):
            top.update(items)
        else:
            raise PickleError("it appends to something that is no list")

    def build(self, state: Any) -> None:
        """The state of the object on top; a state dict's own ("_metadata") says nothing about its tensors."""
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):
            raise PickleError(f"it changes {str(self.stack[-1])[:60]}, which has no state")


def _unary(function: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    def apply(machine: _Machine, _: Any) -> None:
        machine.stack.append(function(machine.stack.pop()))

    return apply


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[_Machine, Any], None]:
    def apply(machine: _Machine, _: Any) -> None:
        second, first = machine.stack.pop(), machine.stack.pop()
        machine.stack.append(function(first, second))

    return apply


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def apply(machine: _Machine, _: Any) -> None:
        items = tuple(machine.stack[-count:])
        del machine.stack[-count:]
        machine.stack.append(items)

    return apply


_OPCODES: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "MARK": lambda m, a: m.stack.append(_MARK),
    "POP": lambda m, a: m.stack.pop(),
    "POP_MARK": lambda m, a: m.since_mark(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_SET": lambda m, a: m.stack.append(set()),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "DICT": lambda m, a: (lambda flat: m.stack.append(dict(zip(flat[::2], flat[1::2], strict=True))))(m.since_mark()),
    "LIST": lambda m, a: m.stack.append(m.since_mark()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.since_mark())),
    "FROZENSET": lambda m, a: m.stack.append(frozenset(m.since_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "SETITEM": lambda m, a: (lambda value, key: m.set_items([key, value]))(m.stack.pop(), m.stack.pop()),
    "SETITEMS": lambda m, a: m.set_items(m.since_mark()),
    "APPEND": lambda m, a: m.append([m.stack.pop()]),
    "APPENDS": lambda m, a: m.append(m.since_mark()),
    "ADDITEMS": lambda m, a: m.append(m.since_mark()),
    "GLOBAL": lambda m, a: m.stack.append(_symbol(*a.split(" ", 1))),
    "STACK_GLOBAL": _binary(_symbol),
    "REDUCE": _binary(_call),
    "NEWOBJ": _binary(_call),
    "BUILD": lambda m, a: m.build(m.stack.pop()),
    "BINPERSID": _unary(_storage),
    "MEMOIZE": lambda m, a: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, a: m.memo.__setitem__(a, m.stack[-1])),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, a: m.stack.append(m.memo[a])),
    **dict.fromkeys(
        (
            "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
            "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
            "BINUNICODE8",
        ),
        lambda m, a: m.stack.append(a),
    ),
}  # fmt: skip


def read_pickle(data: bytes) -> Any:
    """The data that a pickle describes: dicts, lists, numbers, texts, `TensorReference`s, and `Record`s of the rest.

    Raises:
        PickleError: it is damaged, or names something that no model file needs.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            if opcode.name in ("INST", "OBJ"):  # as GLOBAL and REDUCE in one
                raise PickleError(f"it asks for {(argument or 'a class').replace(' ', '.')}, which no model file needs")
            if opcode.name not in _OPCODES:
                raise PickleError(f"it uses the opcode {opcode.name}, which no model file needs")
            _OPCODES[opcode.name](machine, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, PickleError):
            raise
        raise PickleError(f"it is damaged ({str(error)[:80]})") from error
    raise PickleError("it is damaged (it has no end)")


class TorchFile:
    """A file of torch.save, opened: `contents` with references in place of tensors, which `tensor` reads.

    Raises:
        PickleError: the file is no zip of torch's, is damaged, or asks for what no model file needs.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self._zip = zipfile.ZipFile(self.path)
        except FileNotFoundError:
            raise
        except _ZIP_ERRORS as error:
            raise self._no_zip() from error
        try:
            self._open()
        except BaseException:  # or the file of an error that somebody keeps stays open, and on Windows locked
            self._zip.close()
            raise

    def _open(self) -> None:
        entries = {entry.filename: entry for entry in self._zip.infolist()}
        pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise PickleError(f"it is a zip with {len(pickles)} entries data.pkl, where torch writes one")
        if entries[pickles[0]].file_size > LARGEST_PICKLE:
            raise PickleError(f"its pickle has {entries[pickles[0]].file_size} bytes, more than any model needs")
        self._folder = pickles[0].removesuffix("data.pkl")
        self._entries = entries
        order = entries.get(self._folder + "byteorder")
        if order is not None and order.file_size < 16 and self._read(order.filename) != b"little":
            raise PickleError("its numbers are big-endian, which this reader does not turn")
        self.contents = read_pickle(self._read(pickles[0]))

    def _read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except _ZIP_ERRORS as error:
            raise PickleError(f"its part {name} cannot be read ({str(error)[:80]})") from error

    def _no_zip(self) -> PickleError:
        with open(self.path, "rb") as file:
            start = file.read(LARGEST_PICKLE)
        if read_pickle(start) == TORCH_1_5_MAGIC:
            return PickleError("it has the format of torch before 1.6: load and save it once with a newer torch")
        return PickleError("it is a bare pickle without tensors")

    def tensor(self, reference: TensorReference) -> Tensor:
        """Read one tensor from the file; its storage is not kept.

        Raises:
            PickleError: the file has no such numbers.
        """
        name, numel = f"{self._folder}data/{reference.key}", reference.stored
        size = numel * torch.empty(0, dtype=reference.dtype).element_size()
        entry = self._entries.get(name)
        if entry is None or entry.file_size != size:
            raise PickleError(f"its part {name} has {entry.file_size if entry else 'no'} bytes instead of {size}")
        raw = torch.empty(size, dtype=torch.uint8)
        view, done = memoryview(raw.numpy()), 0
        try:
            with self._zip.open(name) as file:
                while chunk := file.read(1 << 24):  # the tensor itself is the only whole copy in memory
                    view[done : done + len(chunk)] = chunk
                    done += len(chunk)
        except _ZIP_ERRORS as error:
            raise PickleError(f"its part {name} cannot be read ({str(error)[:80]})") from error
        if done != size:
            raise PickleError(f"its part {name} ends after {done} of {size} bytes")
        stored = raw.view(reference.dtype).as_strided(reference.shape, reference.stride, reference.offset)
        whole = stored.is_contiguous() and stored.numel() == numel
        return stored if whole else stored.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()
