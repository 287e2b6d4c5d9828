"""Builds the native kernels: `python native/build.py` (or `make native`).

Writes one library for each platform into zigma/selective_scan/lib/, each with its checksum; these files are committed.
A library holds its kernels once for each instruction set and picks one at run time. The compiler is the Zig toolchain
from PyPI (`pip install ziglang==0.17.1`), which brings headers and libraries of every target: all four are built on any
machine, and the same source gives the same bytes on every machine and in every folder. The Linux ones run with any
glibc from 2.17 on; the one for macOS is signed ad hoc, which the system asks of all code on arm64.

    python native/build.py --target linux-x86_64    one of them
    python native/build.py --compiler gcc           this machine's with another compiler, for experiments: not
                                                    reproducible, not to be committed
    python native/build.py --check                  runs native/check.c on this machine's library: every instruction
                                                    set of this CPU against plain loops
    python native/build.py --check --target linux-aarch64 --emulator "qemu-aarch64 -L /usr/aarch64-linux-gnu"
    python native/build.py --check --target windows-x86_64 --emulator wine
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "zigma" / "selective_scan" / "lib"
ZIG_VERSION = "0.17.1"

COMMON = (
    *("-O3", "-std=gnu11", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Werror"),
)
# (object, source, flags)
SHARED = tuple((f"{name}.o", f"{name}.c", ()) for name in ("library", "threads", "instruction_sets"))
AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
X86_64 = (
    ("kernels_zen4.o", "kernels.c", (*AVX512, "-mavx512bf16", "-DZEN4", "-DVARIANT=zs_kernels_zen4")),
    ("kernels_avx512.o", "kernels.c", (*AVX512, "-DVARIANT=zs_kernels_avx512")),
    ("kernels_avx2.o", "kernels.c", ("-march=x86-64-v3", "-DVARIANT=zs_kernels_avx2")),
    ("kernels_sse2.o", "kernels.c", ("-march=x86-64", "-DVARIANT=zs_kernels_sse2")),
    *((name, source, ("-march=x86-64",)) for name, source, _ in SHARED),
)
ARM64 = (("kernels_neon.o", "kernels.c", ("-DVARIANT=zs_kernels_neon",)), *SHARED)


@dataclass(frozen=True)
class Target:
    """A platform: its name in Zig, the library's file name, the objects that make it up, and flags."""

    triple: str
    library: str
    units: tuple
    compile: tuple[str, ...] = ("-fPIC",)
    link: tuple[str, ...] = ("-lpthread",)

    @property
    def output(self) -> Path:
        return FOLDER / self.library


TARGETS = {
    "linux-x86_64": Target("x86_64-linux-gnu.2.17", "zigma_scan-linux-x86_64.so", X86_64),
    "linux-aarch64": Target("aarch64-linux-gnu.2.17", "zigma_scan-linux-aarch64.so", ARM64),
    "windows-x86_64": Target("x86_64-windows-gnu", "zigma_scan-windows-x86_64.dll", X86_64, (), ()),
    "macos-arm64": Target("aarch64-macos.11.0", "zigma_scan-macos-arm64.dylib", ARM64, link=()),
}


def zig_compiler(target: Target) -> list[str]:
    """The command for the pinned Zig. Raises SystemExit with the remedy where it is not installed."""
    try:
        version = metadata.version("ziglang")
    except metadata.PackageNotFoundError:
        version = None
    if version != ZIG_VERSION:
        raise SystemExit(
            f"native/build.py: found ziglang {version}, need {ZIG_VERSION}; pip install ziglang=={ZIG_VERSION}"
        )
    return [sys.executable, "-m", "ziglang", "cc", "-target", target.triple]


def host_target() -> str:
    """The name of this machine's target, whether or not there is one."""
    system = {"win32": "windows", "darwin": "macos"}.get(sys.platform, sys.platform)
    machine = platform.machine().lower()
    return f"{system}-{'x86_64' if machine == 'amd64' else machine}"


def build(target: Target, output: Path, compiler: list[str]) -> None:
    """Compiles and links `output`. Raises subprocess.CalledProcessError when the compiler fails."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "0"}  # the time that a PE header states
    with tempfile.TemporaryDirectory() as folder:
        for name, source, flags in target.units:
            if "ziglang" in compiler:  # which spells the levels of the architecture its own way
                flags = [flag.replace("x86-64-v", "x86_64_v").replace("x86-64", "x86_64") for flag in flags]
            # Relative source names: no folder of this machine gets into the file.
            command = [*compiler, *COMMON, *target.compile, *flags, "-c", source, "-o", f"{folder}/{name}"]
            subprocess.run(command, cwd=HERE, env=environment, check=True)
        objects = [name for name, _, _ in target.units]
        link = [*compiler, "-shared", "-s", "-o", target.library, *objects, *target.link]
        subprocess.run(link, cwd=folder, env=environment, check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old file mapped keeps it.
        partial = output.with_suffix(".partial")
        shutil.copyfile(Path(folder) / target.library, partial)
        partial.replace(output)
        checksum = hashlib.sha256(output.read_bytes()).hexdigest()
        output.with_name(output.name + ".sha256").write_text(f"{checksum}  {output.name}\n", newline="\n")


def check(target: Target, library: Path, compiler: list[str], emulator: list[str]) -> int:
    """Builds native/check.c for `target` and runs it on `library`; its exit status, 0 if all is well."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "check.exe"  # the ending matters to Windows alone
        command = [*compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o", str(program), "check.c"]
        libraries = ("-lm", "-ldl") if "linux" in target.triple else ()
        subprocess.run([*command, *libraries], cwd=HERE, check=True)
        return subprocess.run([*emulator, str(program), str(library.resolve())], check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="all of them unless given")
    parser.add_argument("--compiler", help="gcc or clang instead of the pinned Zig, for this machine's target")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the libraries")
    parser.add_argument("--check", action="store_true", help="build nothing; check the library of this machine")
    parser.add_argument("--emulator", default="", help="what to run the check under, for another machine's --target")
    arguments = parser.parse_args()
    of_this_machine = arguments.compiler or arguments.check
    names = arguments.target or ([host_target()] if of_this_machine else list(TARGETS))
    for name in names:
        if name not in TARGETS or (arguments.compiler and name != host_target()):
            raise SystemExit(
                f"native/build.py: there is no building {name} here with {arguments.compiler or 'any compiler'}; "
                f"name one of {', '.join(TARGETS)} and leave --compiler out"
            )
        target = TARGETS[name]
        output = arguments.output / target.library
        compiler = [arguments.compiler] if arguments.compiler else zig_compiler(target)
        if arguments.check:
            status = check(target, output, compiler, arguments.emulator.split())
            if status:
                raise SystemExit(status)
            continue
        build(target, output, compiler)
        sys.stdout.write(f"{output} ({output.stat().st_size} bytes)\n")


if __name__ == "__main__":
    main()
