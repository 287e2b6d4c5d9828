"""Loading of the native kernel: one shared library with a plain C interface (native/scan.h), no torch ABI.

The library is checked when it is first used, not at import: the file, its ABI version, an instruction set this CPU
has, and a small problem against the reference. Any failure becomes one sentence with a remedy.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import struct
import sys
import sysconfig
import threading
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 3
FLOAT32, BFLOAT16 = 0, 1
OK, BAD_ORDER, NO_MEMORY, UNSUPPORTED = range(4)
HUGE_PAGES_FROM = 2**22  # bytes: memory of that size often comes fresh from the system, and costs a fault per page
REBUILD = "restore the file from the project's repository or rebuild it with `python native/build.py`"
INSTRUCTION_SETS = ("zen4", "avx512", "avx2", "sse2", "neon")
LIBRARIES = {
    ("linux", "x86_64"): "zigma_scan-linux-x86_64.so",
    ("linux", "aarch64"): "zigma_scan-linux-aarch64.so",
    ("win32", "amd64"): "zigma_scan-windows-x86_64.dll",
    ("darwin", "arm64"): "zigma_scan-macos-arm64.dylib",
}


# The structures of native/scan.h, field by field, as `struct` packs their values. (To set the fields of a
# ctypes.Structure takes three times as long, which a small model feels.) Rows are a (b, l, width) tensor with a
# contiguous last dimension: its address, the strides of its first two in elements, its dtype. A pointer of 0 is absent.
INTEGER, NUMBER, POINTER, ROWS = "q", "d", "P", "Pqqq"
SCAN_ARGS = struct.Struct(
    INTEGER * 6  # batch, length, channels, states, delta_softplus, threads
    + POINTER * 5  # input_order, output_order, A, D, delta_bias
    + ROWS * 6  # u, delta, B, C, z, out
    + POINTER  # checkpoints
    + ROWS * 6  # d_out, d_u, d_delta, d_B, d_C, d_z
    + POINTER * 3  # d_A, d_D, d_delta_bias
)
CONV_ARGS = struct.Struct(
    INTEGER * 5  # batch, length, channels, width, threads
    + POINTER * 3  # order, weight, bias
    + ROWS * 4  # x, out, d_out, d_x
    + POINTER * 2  # d_weight, d_bias
)
NORM_ARGS = struct.Struct(
    INTEGER * 5  # batch, length, width, threads, layer_norm
    + NUMBER  # eps
    + POINTER * 3  # gather, weight, bias
    + ROWS * 6  # base, mix, gate, residual, scale, shift
    + ROWS * 3  # total, normed, modulated
    + ROWS * 6  # d_total, d_normed, d_modulated, d_x, d_residual, d_mix
    + POINTER * 5  # d_gate, d_scale, d_shift, d_weight, d_bias
)


class NativeUnavailable(RuntimeError):
    """The native library cannot be used; the message says why and what to do."""


class NativeLibrary:
    """The loaded library. `instruction_set` names the variant in use, one of INSTRUCTION_SETS."""

    def __init__(self, path: Path):
        try:
            self._library = ctypes.CDLL(str(path))
            version = self._bind("zs_abi_version", [])()
        except (OSError, AttributeError) as error:
            raise NativeUnavailable(f"{path} cannot be loaded ({error}); {REBUILD}") from error
        if version != ABI_VERSION:
            raise NativeUnavailable(f"{path} has interface version {version}, expected {ABI_VERSION}; {REBUILD}")
        self._instruction_set = self._bind("zs_instruction_set", [c_char_p], c_char_p)
        self._checkpoint_floats = self._bind("zs_checkpoint_floats", [c_char_p, *[c_int64] * 4])
        self._exp2 = self._bind("zs_exp2", [c_char_p, c_void_p, c_void_p, c_int64, c_int64])
        self._use_huge_pages = self._bind("zs_use_huge_pages", [c_void_p, c_int64], None)
        self._lend_threads = self._bind("zs_lend_threads", [c_void_p], None)
        self._structure_size = self._bind("zs_structure_size", [c_int64])
        pointers = [c_char_p, c_char_p]  # the instruction set, a packed structure
        self._calls = {
            "scan_forward": self._bind("zs_scan_forward", pointers),
            "scan_backward": self._bind("zs_scan_backward", pointers),
            "conv_forward": self._bind("zs_conv_forward", pointers),
            "conv_backward": self._bind("zs_conv_backward", pointers),
            "norm_forward": self._bind("zs_norm_forward", pointers),
            "norm_backward": self._bind("zs_norm_backward", pointers),
        }
        if not self.instruction_sets():
            raise NativeUnavailable(f"{path} holds nothing that this CPU runs; {REBUILD}")
        self.instruction_set = self.instruction_sets()[0]

    def _bind(self, name: str, argtypes: list, restype=c_int64):
        function = getattr(self._library, name)
        function.argtypes, function.restype = argtypes, restype
        return function

    def instruction_sets(self) -> tuple[str, ...]:
        """The variants this CPU runs, fastest first."""
        return tuple(name for name in INSTRUCTION_SETS if self._instruction_set(name.encode()) is not None)

    def checkpoint_floats(self, b: int, l: int, d: int, n: int) -> int:
        return self._checkpoint_floats(self.instruction_set.encode(), b, l, d, n)

    def structure_sizes(self) -> tuple[int, ...]:
        """Bytes of zs_scan_args, zs_conv_args and zs_norm_args as the library was compiled."""
        return tuple(self._structure_size(which) for which in range(3))

    def exp2(self, instruction_set: str, x: Tensor, y: Tensor, as_decays: int = 0) -> None:
        """y = 2^x by the kernels' own exponential; contiguous float32. For tests of its accuracy and its time.

        as_decays: how many times to compute it as the scan does where |x| < 120, which is nearly always; 0: once,
            for any x.
        """
        self._exp2(instruction_set.encode(), x.data_ptr(), y.data_ptr(), x.numel(), as_decays)

    def use_huge_pages(self, fresh: Tensor) -> Tensor:
        """The same tensor, its memory asked for in large pages: for a new one that will be written whole."""
        if (size := fresh.numel() * fresh.element_size()) >= HUGE_PAGES_FROM:
            self._use_huge_pages(fresh.data_ptr(), size)
        return fresh

    def lend_threads(self, team: int | None) -> None:
        """Runs the kernels on the team of an OpenMP runtime, the address of its GOMP_parallel; None: on our own.

        A fork of this process goes back to our own: a runtime's threads do not survive it.
        """
        self._lend_threads(team)

    def call(self, name: str, args: bytes) -> None:
        """Runs a kernel on its packed structure, which holds the addresses of tensors that live until it returns."""
        status = self._calls[name](self.instruction_set.encode(), args)
        if status == BAD_ORDER:
            _batch, length = struct.unpack_from(INTEGER * 2, args)
            raise ValueError(f"selective scan: the token order is not a permutation of 0 to {length - 1}")
        if status == NO_MEMORY:
            raise MemoryError(f"selective scan: no memory for the workspace of {name}; use a smaller batch")
        if status != OK:
            raise RuntimeError(f"selective scan: native {name} returned status {status}; {REBUILD}")


def threads_of_torch() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch links to; None where it has none of the kind.

    Looked up through torch's own library: a process may hold several such runtimes, each with threads of its own.
    """
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:  # as it is loaded, or not at all
        return ctypes.cast(ctypes.CDLL(str(path), os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


def library_path() -> Path:
    """Where the built library for this platform lies. Raises NativeUnavailable where none is built."""
    # The interpreter's own architecture: an x86-64 one runs on arm64 too, by emulation.
    machine = sysconfig.get_platform().rpartition("-")[2] if sys.platform == "win32" else platform.machine()
    try:
        name = LIBRARIES[sys.platform, machine.lower()]
    except KeyError:
        raise NativeUnavailable(
            "it is built for Linux on x86-64 and arm64, Windows on x86-64 and macOS on arm64, "
            f"not for {sys.platform} on {machine}"
        ) from None
    return Path(__file__).absolute().parent / "lib" / name


def checksum_path(library: Path) -> Path:
    """The file with the library's SHA-256, in the format of sha256sum."""
    return library.with_name(library.name + ".sha256")


_lock = threading.Lock()
_loaded: NativeLibrary | str | None = None  # or why there is none


def load() -> NativeLibrary:
    """The library, loaded and tested on first use. Raises NativeUnavailable, each time the same."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                try:
                    _loaded = _open(library_path())
                except NativeUnavailable as error:
                    _loaded = str(error)
    if isinstance(_loaded, str):  # a new error each time: one kept would collect the frames of all who met it
        raise NativeUnavailable(_loaded)
    return _loaded


def _open(path: Path) -> NativeLibrary:
    if not path.is_file():
        raise NativeUnavailable(f"{path} is missing; {REBUILD}")
    # Before loading: the loader maps a truncated file without a word and the process dies at the first missing page.
    checksum = checksum_path(path)
    expected = checksum.read_text().split()[:1] if checksum.is_file() else None
    if expected != [hashlib.sha256(path.read_bytes()).hexdigest()]:
        raise NativeUnavailable(f"{path} does not match {checksum.name}; {REBUILD}")
    library = NativeLibrary(path)
    library.lend_threads(threads_of_torch())
    from .native import self_test

    error = self_test(library)
    if error is not None:
        raise NativeUnavailable(f"{path} failed its self-test ({error}); {REBUILD}")
    return library
