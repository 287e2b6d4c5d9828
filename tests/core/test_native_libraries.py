"""The libraries of every platform as files: format, checksum, exports, signature, and the build that makes them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from zigma.selective_scan import native, native_library

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "zigma" / "selective_scan" / "lib"
NAMES = tuple(native_library.LIBRARIES.values())


@pytest.fixture(scope="module")
def build():
    """native/build.py as a module."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "native" / "build.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def unpack(layout: str, data: bytes, offset: int = 0):
    return struct.unpack_from("<" + layout, data, offset)


def text(data: bytes, offset: int) -> str:
    return data[offset : data.index(0, offset)].decode()


def elf_exports(data: bytes) -> tuple[int, set[str]]:
    """Machine, and the defined symbols of the dynamic symbol table."""
    assert data[:7] == b"\x7fELF\x02\x01\x01"
    (machine,), (table,), (size, count, _) = unpack("H", data, 18), unpack("Q", data, 40), unpack("3H", data, 58)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [unpack("IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    (symbols,) = [s for s in sections if s[1] == 11]
    names = sections[symbols[6]][4]
    entries = [unpack("IBBH", data, at) for at in range(symbols[4], symbols[4] + symbols[5], 24)]
    return machine, {text(data, names + name) for name, info, _, section in entries if section and info >> 4}


def pe_exports(data: bytes) -> tuple[int, int, set[str]]:
    """Machine, time stamp, and the names of the export directory."""
    (header,) = unpack("I", data, 0x3C)
    assert data[:2] == b"MZ" and data[header : header + 4] == b"PE\0\0"
    machine, count, time = unpack("HHI", data, header + 4)
    (optional,) = unpack("H", data, header + 20)
    (directory,) = unpack("I", data, header + 24 + 112)
    sections = [unpack("8xIII", data, header + 24 + optional + 40 * i) for i in range(count)]
    raw = [unpack("I", data, header + 24 + optional + 40 * i + 20)[0] for i in range(count)]

    def place(address: int) -> int:
        (found,) = [address - s[1] + r for s, r in zip(sections, raw, strict=True) if s[1] <= address < s[1] + s[2]]
        return found

    (names,), (table,) = unpack("I", data, place(directory) + 24), unpack("I", data, place(directory) + 32)
    pointers = unpack(f"{names}I", data, place(table))
    return machine, time, {text(data, place(pointer)) for pointer in pointers}


def macho_commands(data: bytes) -> tuple[int, int, list[tuple[int, int]]]:
    """CPU type, file type, and the load commands as (command, offset)."""
    magic, cpu, _, kind, count = unpack("5I", data)
    assert magic == 0xFEEDFACF
    commands, offset = [], 32
    for _ in range(count):
        command, size = unpack("II", data, offset)
        commands.append((command, offset))
        offset += size
    return cpu, kind, commands


def macho_exports(data: bytes, commands) -> set[str]:
    """The names in the export trie, which is what dlsym searches, without the leading underscore."""
    (offset,) = [at for command, at in commands if command == 0x80000022]  # LC_DYLD_INFO_ONLY
    (start,) = unpack("I", data, offset + 40)

    def number(at: int) -> tuple[int, int]:  # ULEB128
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value, at

    def walk(at: int, prefix: str):
        terminal, at = number(at)
        if terminal:
            yield prefix.removeprefix("_")
        at += terminal
        children, at = data[at], at + 1
        for _ in range(children):
            label = text(data, at)
            child, at = number(at + len(label) + 1)
            yield from walk(start + child, prefix + label)

    return set(walk(start, ""))


def test_checksums():
    assert sorted(p.name for p in FOLDER.iterdir()) == sorted([*NAMES, *(f"{name}.sha256" for name in NAMES)])
    for name in NAMES:
        checksum = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
        assert native_library.checksum_path(FOLDER / name).read_text() == f"{checksum}  {name}\n"


def interface() -> set[str]:
    """The functions that native_library binds."""
    return set(re.findall(r'_bind\("(zs_\w+)"', Path(native_library.__file__).read_text()))


@pytest.mark.parametrize(("name", "machine"), [(NAMES[0], 62), (NAMES[1], 183)])
def test_linux_libraries(name, machine):
    found, exports = elf_exports((FOLDER / name).read_bytes())
    assert found == machine  # EM_X86_64, EM_AARCH64
    assert {e for e in exports if e.startswith("zs_")} == interface()


def test_windows_library():
    machine, time, exports = pe_exports((FOLDER / NAMES[2]).read_bytes())
    assert (machine, time) == (0x8664, 0)
    assert exports == interface()


def test_macos_library():
    data = (FOLDER / NAMES[3]).read_bytes()
    cpu, kind, commands = macho_commands(data)
    assert (cpu, kind) == (0x0100000C, 6)  # CPU_TYPE_ARM64, MH_DYLIB
    assert {e for e in macho_exports(data, commands) if e.startswith("zs_")} == interface()


def test_macos_signature_covers_every_page():
    """An ad hoc signature is a list of the pages' hashes; the system kills a process that touches another page."""
    data = (FOLDER / NAMES[3]).read_bytes()
    (command,) = [at for command, at in macho_commands(data)[2] if command == 0x1D]  # LC_CODE_SIGNATURE
    start, _ = unpack("II", data, command + 8)
    magic, _, count = struct.unpack_from(">3I", data, start)
    assert magic == 0xFADE0CC0  # the signature as a whole; big-endian from here on
    blobs = dict(struct.unpack_from(">II", data, start + 12 + 8 * i) for i in range(count))
    directory = start + blobs[0]
    fields = struct.unpack_from(">9I4B", data, directory)
    magic, _, _, flags, hashes, _, _, pages, limit, width, kind, _, page_bits = fields
    assert (magic, flags & 2, width, kind) == (0xFADE0C02, 2, 32, 2)  # ad hoc, SHA-256
    page = 1 << page_bits
    assert limit == start and pages == -(-limit // page)
    for i in range(pages):
        found = data[directory + hashes + 32 * i :][:32]
        assert found == hashlib.sha256(data[i * page : min((i + 1) * page, limit)]).digest()


@pytest.mark.parametrize(
    ("system", "machine", "name"),
    [
        ("linux", "x86_64", NAMES[0]),
        ("linux", "aarch64", NAMES[1]),
        ("win32", "AMD64", NAMES[2]),
        ("darwin", "arm64", NAMES[3]),
        ("darwin", "x86_64", None),
        ("win32", "ARM64", None),
        ("linux", "riscv64", None),
        ("freebsd14", "amd64", None),
    ],
)
def test_the_library_of_a_platform(system, machine, name, monkeypatch):
    monkeypatch.setattr(native_library.sys, "platform", system)
    monkeypatch.setattr(native_library.platform, "machine", lambda: machine)
    monkeypatch.setattr(native_library.sysconfig, "get_platform", lambda: f"win-{machine.lower()}")
    if name:
        path = native_library.library_path()
        assert path == FOLDER / name
        assert path.is_file()
    else:
        monkeypatch.setattr(native_library, "_loaded", None)
        assert re.search(rf"not for {system} on {machine}$", native.unavailable(), re.IGNORECASE)


def test_every_target_has_its_place(build):
    assert {target.library for target in build.TARGETS.values()} == set(NAMES)
    assert build.FOLDER == FOLDER


@pytest.fixture
def compiler(build):
    """The pinned Zig for Linux x86-64."""
    try:
        version = importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != build.ZIG_VERSION:
        pytest.skip(f"NOT TESTED: building the library, needs ziglang=={build.ZIG_VERSION}, found {version}")
    return build.zig_compiler(build.TARGETS["linux-x86_64"])


def test_the_committed_library_is_what_the_source_builds(build, compiler, tmp_path):
    """The one for Linux x86-64; the source is the same for all, and so is the compiler."""
    target = build.TARGETS["linux-x86_64"]
    build.build(target, tmp_path / target.library, compiler)
    assert (tmp_path / target.library).read_bytes() == (FOLDER / target.library).read_bytes(), (
        "native/ has changed: run `python native/build.py` and commit the result"
    )


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_another_compiler_takes_the_source(build, name):
    """That of --compiler, for experiments: without a warning, in C as it understands it."""
    if build.host_target() != "linux-x86_64" or shutil.which(name) is None:
        pytest.skip(f"NOT TESTED: compiling native/ with {name}, which is not here")
    for _, source, flags in build.TARGETS["linux-x86_64"].units:
        subprocess.run([name, *build.COMMON, *flags, "-fsyntax-only", source], cwd=build.HERE, check=True)


def test_the_library_computes_what_plain_loops_do(build, compiler):
    """native/check.c, which also watches the memory between rows."""
    if build.host_target() != "linux-x86_64":
        pytest.skip(f"NOT TESTED: native/check.c, on {build.host_target()}")
    target = build.TARGETS["linux-x86_64"]
    assert build.check(target, target.output, compiler, []) == 0
