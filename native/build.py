"""Builds the native selective scan: `python native/build.py` (or `make native`).

Writes zigma/selective_scan/lib/zigma_scan-linux-x86_64.so and its checksum, the files that are committed. The library
holds an AVX-512 and an AVX2 variant of the kernels and picks one at run time. The compiler is the Zig toolchain from
PyPI (`pip install ziglang==0.17.1`), which brings its own libc headers: the result runs with any glibc from 2.17 on,
and the same source gives the same bytes on every machine and in every folder.

`--compiler gcc` (or clang) builds with that compiler instead, for experiments; such a build is not reproducible.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "zigma" / "selective_scan" / "lib" / "zigma_scan-linux-x86_64.so"
ZIG_VERSION = "0.17.1"

COMMON = (
    *("-O3", "-std=gnu11", "-fPIC", "-g0", "-fvisibility=hidden", "-ffp-contract=off"),
    "-fno-math-errno",
    *("-Wall", "-Wextra", "-Werror"),
)
# (object, source, flags)
UNITS = (
    ("kernels_avx512.o", "kernels.c", ("-march=x86-64-v4", "-mprefer-vector-width=512", "-DVARIANT=zs_kernels_avx512")),
    ("kernels_avx2.o", "kernels.c", ("-march=x86-64-v3", "-DVARIANT=zs_kernels_avx2")),
    ("library.o", "library.c", ("-march=x86-64",)),
    ("threads.o", "threads.c", ("-march=x86-64",)),
)


def zig_compiler() -> list[str]:
    """The command for the pinned Zig. Raises SystemExit with the remedy where it is not installed."""
    try:
        version = metadata.version("ziglang")
    except metadata.PackageNotFoundError:
        version = None
    if version != ZIG_VERSION:
        raise SystemExit(
            f"native/build.py: found ziglang {version}, need {ZIG_VERSION}; pip install ziglang=={ZIG_VERSION}"
        )
    return [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu.2.17"]


def build(output: Path, compiler: list[str]) -> None:
    """Compiles and links `output`. Raises subprocess.CalledProcessError when the compiler fails."""
    with tempfile.TemporaryDirectory() as folder:
        for name, source, flags in UNITS:
            if "ziglang" in compiler:  # which spells the levels of the architecture its own way
                flags = [flag.replace("x86-64-v", "x86_64_v").replace("x86-64", "x86_64") for flag in flags]
            # Relative source names: no folder of this machine gets into the file.
            subprocess.run([*compiler, *COMMON, *flags, "-c", source, "-o", f"{folder}/{name}"], cwd=HERE, check=True)
        objects = [name for name, _, _ in UNITS]
        link = [*compiler, "-shared", "-s", "-o", "zigma_scan.so", *objects, "-lpthread"]
        subprocess.run(link, cwd=folder, check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old file mapped keeps it.
        partial = output.with_suffix(".partial")
        shutil.copyfile(Path(folder) / "zigma_scan.so", partial)
        partial.replace(output)
        checksum = hashlib.sha256(output.read_bytes()).hexdigest()
        output.with_name(output.name + ".sha256").write_text(f"{checksum}  {output.name}\n", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", help="gcc or clang instead of the pinned Zig")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    build(arguments.output, [arguments.compiler] if arguments.compiler else zig_compiler())
    sys.stdout.write(f"{arguments.output} ({arguments.output.stat().st_size} bytes)\n")


if __name__ == "__main__":
    main()
