"""The native library: compiled once for a machine, kept on disk, loaded once for a process.

The sources need a C++17 compiler with GCC's vector types (GCC or Clang), and nothing else: no OpenMP, no headers of
PyTorch or Python, no build tool. They are compiled for the very machine, so that the file's name has all that it
depends on: sources, compiler, flags, the processor's instructions, and the versions of this package and of PyTorch. The
compiler is the one that Inductor would take.

``SVG2_NATIVE=0`` switches native code off, ``SVG2_CACHE_DIR`` moves the compiled file, and ``SVG2_NATIVE_FLAGS`` are
further flags for the compiler, such as those of a sanitizer.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import platformdirs
import torch
from filelock import FileLock, Timeout

__all__ = ["Native", "NotBuilt", "native"]

SWITCH = "SVG2_NATIVE"
MORE_FLAGS = "SVG2_NATIVE_FLAGS"
SECONDS = 300  # that a compiler may take, and that another process may wait for it

_SOURCES = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-pthread", "-fvisibility=hidden")
_log = logging.getLogger("svg2_compile.kernels")


class Native(NamedTuple):
    """The native library, or why there is none. detail: where it lies and what compiled it, or the problem.

    switched_off: nobody wants it, which is no problem."""

    library: ctypes.CDLL | None
    detail: str
    switched_off: bool = False


class NotBuilt(Exception):
    """Why there is no native library; a sentence."""


@functools.cache
def native() -> Native:
    """Load the library, compiling it first where no process has done so. Where that is not possible a warning says so,
    once."""
    if os.environ.get(SWITCH, "1").strip().lower() in ("0", "false", "off", "no"):
        return Native(None, f"switched off by {SWITCH}", switched_off=True)
    try:
        compiler = find_compiler()
        path = built(compiler, sources(_SOURCES), cache_dir())
        return Native(ctypes.CDLL(str(path)), f"{path}, compiled by {compiler}")
    except (NotBuilt, OSError, Timeout) as problem:
        _log.warning("CPU kernels run without native code, which is slower: %s (%s=0 says nothing)", problem, SWITCH)
        return Native(None, str(problem))


def cache_dir() -> Path:
    """Where compiled libraries lie."""
    given = os.environ.get("SVG2_CACHE_DIR")
    return (Path(given) if given else platformdirs.user_cache_path("svg2-compile")) / "native"


def find_compiler() -> str:
    """The C++ compiler that Inductor takes. Raises NotBuilt where there is none, or only one that does not read these
    sources."""
    if sys.platform == "win32":
        raise NotBuilt("on Windows there is no native code yet")
    # Imported here: Inductor takes a second to import, and has no stable interface.
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return str(get_cpp_compiler())
    except Exception as problem:
        raise NotBuilt(f"no C++ compiler was found ({type(problem).__name__}); set CXX to one") from problem


def flags() -> list[str]:
    """For this machine: its own instructions, where the compiler does not take them by itself."""
    more = shlex.split(os.environ.get(MORE_FLAGS, ""))
    own = () if sys.platform == "darwin" else ("-march=native",)
    return [*FLAGS, *own, *more]


def sources(folder: Path) -> dict[Path, bytes]:
    """The files of the native code and what is in them, in a fixed order."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    return {path: path.read_bytes() for path in files}


def built(compiler: str, files: dict[Path, bytes], folder: Path) -> Path:
    """The library of these sources, compiled now if it is not in ``folder`` yet. Raises NotBuilt where compiling fails.

    Two processes at once compile once; a library appears whole or not at all.
    """
    path = folder / f"svg2-{_key(compiler, files)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), timeout=SECONDS):
        if not path.exists():
            _compile(compiler, [file for file in files if file.suffix == ".cpp"], path)
    return path


def _compile(compiler: str, cpp_files: list[Path], path: Path) -> None:
    """Every file on its own, all at the same time, and then linked."""
    _log.info("compiling the native CPU kernels with %s, once for this machine", compiler)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.stem) as folder:
        objects = [Path(folder) / f"{file.stem}.o" for file in cpp_files]
        commands = [["-c", str(file), "-o", str(out)] for file, out in zip(cpp_files, objects, strict=True)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(functools.partial(_run, compiler), commands))
        library = Path(folder) / path.name
        _run(compiler, ["-shared", *map(str, objects), "-o", str(library)])
        os.replace(library, path)


def _run(compiler: str, arguments: list[str]) -> None:
    command = [*shlex.split(compiler), *flags(), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise NotBuilt(f"{compiler} did not finish within {SECONDS} s") from None
    if done.returncode != 0:
        raise NotBuilt(f"{compiler} does not compile them: {_first_error(done.stderr)}")


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line]
    return (lines or output.splitlines() or ["no message"])[0].strip()


def _key(compiler: str, files: dict[Path, bytes]) -> str:
    digest = hashlib.sha256()
    try:
        version = subprocess.run(
            [*shlex.split(compiler), "--version"], capture_output=True, text=True, check=False, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as problem:
        raise NotBuilt(f"{compiler} does not run: {problem}") from None
    package = importlib.metadata.version("svg2-compile")
    for part in (compiler, version, " ".join(flags()), package, torch.__version__, _processor()):
        digest.update(part.encode() + b"\0")
    for path, text in files.items():
        digest.update(path.name.encode() + b"\0" + text + b"\0")
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What the compiler sees as the native machine: a cache may be shared by several."""
    cpuinfo = Path("/proc/cpuinfo")
    lines: set[str] = set()
    if cpuinfo.exists():
        wanted = ("flags", "Features", "model name", "CPU part", "CPU implementer")
        lines = {line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith(wanted)}
    return "\n".join(
        [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability(), *sorted(lines)]
    )
