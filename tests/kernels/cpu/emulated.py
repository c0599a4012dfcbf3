"""The native code of another processor, under an emulator, against that of this one.

    python -m tests.kernels.cpu.emulated                        NEON: aarch64-linux-gnu-g++ and qemu-aarch64
    python -m tests.kernels.cpu.emulated --compiler ... --emulator ...

Debian and Ubuntu have both as packages (g++-aarch64-linux-gnu, qemu-user). Every call of the rewritten attention is
made there with the same bytes; results may differ by rounding only, labels and orders not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from svg2_compile.kernels.cpu.native import attention, build, calls, clusters, kmeans, select, tokens
from tests.kernels.cpu import exercise_threads

HERE = Path(__file__).resolve().parent
CALLERS = (attention, clusters, kmeans, select, tokens)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Emulator:
    """Makes native calls with a library that was compiled for another processor."""

    def __init__(self, compiler: str, emulator: str, folder: Path) -> None:
        self._emulator, self._folder = shlex.split(emulator), folder
        self._library, self._program = folder / "library.so", folder / "call"
        sources = [str(path) for path in build.sources(Path(build.__file__).parent) if path.suffix == ".cpp"]
        run = [*shlex.split(compiler), *build.FLAGS]
        subprocess.run([*run, "-shared", *sources, "-o", str(self._library)], check=True)
        subprocess.run([*run, str(HERE / "emulated_call.cpp"), "-ldl", "-o", str(self._program)], check=True)
        self.calls = 0

    def call_native(self, name: str, call: ctypes.Structure) -> None:
        """As ``calls.call_native``, there. Memory is found by the tensors that are alive."""
        pieces, pointers = [], []
        for place, address in _pointers(call):
            storage = _storage_of(address)
            pieces.append(storage)
            pointers.append((place, len(pieces) - 1, address - storage.data_ptr()))
        file = self._folder / "call.bin"
        with file.open("wb") as out:
            out.write(struct.pack("<q", ctypes.sizeof(call)) + bytes(call) + struct.pack("<q", len(pieces)))
            places = []
            for piece in pieces:
                out.write(struct.pack("<q", piece.nbytes()))
                places.append(out.tell())
                out.write(_bytes(piece))
            out.write(struct.pack("<q", len(pointers)) + b"".join(struct.pack("<3q", *entry) for entry in pointers))
        command = [*self._emulator, str(self._program), str(self._library), f"svg2_{name}", str(file)]
        subprocess.run(command, check=True)
        written = file.read_bytes()
        for place, piece in zip(places, pieces, strict=True):
            ctypes.memmove(piece.data_ptr(), written[place : place + piece.nbytes()], piece.nbytes())
        self.calls += 1


_alive: list[torch.UntypedStorage] = []


def _storage_of(address: int) -> torch.UntypedStorage:
    return next(s for s in reversed(_alive) if s.data_ptr() <= address < s.data_ptr() + max(s.nbytes(), 1))


def _bytes(storage: torch.UntypedStorage) -> bytes:
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


def _pointers(call: ctypes.Structure, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where in a structure, and in those inside it, pointers lie that are not null, and their values."""
    for name, kind, *_ in call._fields_:
        place, value = start + getattr(type(call), name).offset, getattr(call, name)
        if isinstance(value, ctypes.Structure):
            yield from _pointers(value, place)
        elif kind is ctypes.c_void_p and value:
            yield place, value


def emulated(emulator: Emulator, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rewritten attention with every native call made there."""

    def noted(function):
        def note(x, *rest):
            if x is not None:
                _alive.append(x.untyped_storage())
            return function(x, *rest)

        return note

    replaced = {"call_native": emulator.call_native, "pointer": noted(calls.pointer), "tokens": noted(calls.tokens)}
    with contextlib.ExitStack() as stack:
        stack.callback(_alive.clear)
        for module in CALLERS:
            present = {name: function for name, function in replaced.items() if hasattr(module, name)}
            stack.enter_context(mock.patch.multiple(module, **present))
        return exercise_threads.attend(*inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("--emulator", default="qemu-aarch64 -L /usr/aarch64-linux-gnu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(arguments.compiler, arguments.emulator, Path(folder))
        for dtype, tolerance in TOLERANCE.items():
            shape = (1, exercise_threads.HEADS, exercise_threads.TOKENS, exercise_threads.DIM)
            inputs = [torch.randn(shape).to(dtype) for _ in range(3)]
            there, here = emulated(emulator, inputs), exercise_threads.attend(*inputs)
            for name, expected in here.items():
                allowed = 0.0 if expected.dtype == torch.bool else tolerance
                torch.testing.assert_close(there[name], expected, rtol=allowed, atol=allowed, msg=f"{name}, {dtype}")
    print(f"{emulator.calls} calls under {arguments.emulator} give what they give here")


if __name__ == "__main__":
    main()
