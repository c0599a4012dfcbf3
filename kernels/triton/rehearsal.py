"""Launches without a GPU: which kernels a call would start, and what each of them costs the machine.

``record_launches`` runs host code on fake CUDA tensors and notes every kernel launch instead of making it; a host read
of device data is an error there. ``compile_launch`` compiles one noted launch for any target and reports registers,
spills, shared memory and the instructions that matter. Both need Triton, neither a driver.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from svg2_compile.kernels.triton import launch as launching
from svg2_compile.kernels.tuning.defaults import imagined_capability

__all__ = [
    "TARGETS",
    "Launch",
    "Resources",
    "compile_launch",
    "nvidia_target",
    "record_launches",
    "resource_problem",
    "shared_memory_limit",
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one program may have (CUDA programming guide, compute capabilities; AMD: LDS of CDNA3).
_SHARED_LIMITS = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
    "gfx942": 65536,
}
_POINTEES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
# Reloads of values that never change, beside hundreds of instructions: about 1 % at most.
HARMLESS_SPILLS = 8
_COMPILE_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the function, its grid, its arguments by name (tensors as "*dtype") and compile options."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. Fields that a target does not report are None.

    registers: per thread. spill_bytes: stores and loads. loop_spills: spill instructions inside the innermost loops
    that use the tensor cores, the ones that cost. shared_bytes: per program. matrix_instructions: tensor-core
    instructions; warpgroup_instructions: those of Hopper's asynchronous kind. async_copies: global-to-shared. warnings:
    the assembler's about serialised tensor-core work.
    """

    registers: int | None
    spill_bytes: int | None
    loop_spills: int | None
    shared_bytes: int
    matrix_instructions: int
    warpgroup_instructions: int
    async_copies: int
    warnings: tuple[str, ...]


@contextlib.contextmanager
def record_launches(capability: int = 90, num_processors: int = 132) -> Iterator[tuple[FakeTensorMode, list[Launch]]]:
    """Inside, Triton kernels are noted in the list instead of launched, as for a device of ``capability``.

    Make fake CUDA tensors under the mode, and avoid subscripting them: that asks for a real device. 0 stands for AMD.
    """
    launches: list[Launch] = []

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound = dict(zip(self.arg_names, args, strict=False))
        options = {name: kwargs.pop(name) for name in _COMPILE_OPTIONS if name in kwargs}
        arguments = {name: _describe(value) for name, value in {**bound, **kwargs}.items()}
        sizes = grid(arguments) if callable(grid) else grid
        launches.append(Launch(self, tuple(int(size) for size in sizes), arguments, options))

    with (
        mock.patch.object(JITFunction, "run", note),
        launching.rehearsal(num_processors),
        imagined_capability(capability),
        FakeTensorMode(allow_non_fake_inputs=False) as mode,
    ):
        yield mode, launches


def _describe(value: Any) -> Any:
    return "*" + _POINTEES[value.dtype] if isinstance(value, torch.Tensor) else value


def _source(launch: Launch) -> ASTSource:
    """What the launcher would hand to the compiler: types, constants, and which arguments are multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_pointer = isinstance(value, str) and value.startswith("*")
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif is_pointer:
            signature[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        divisible = is_pointer or (specialised and isinstance(value, int) and value % 16 == 0)
        if divisible and signature[parameter.name] != "constexpr":
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, target: GPUTarget) -> Resources:
    """Compile one launch for ``target`` and read off its costs. Raises whatever the compiler raises."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a cached kernel carries no log
        compiled = triton.compile(_source(launch), target=target, options=launch.options)
    if target.backend == "hip":
        return _read_amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    machine_code = _disassemble(compiled.asm["cubin"])
    return _read_nvidia(log.getvalue(), compiled.asm["ptx"], machine_code, compiled.metadata.shared)


def _last_number(pattern: str, text: str) -> int | None:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else None


def _disassemble(cubin: bytes) -> str:
    """SASS, by the tool that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loop_spills(machine_code: str) -> int:
    """Local-memory instructions in the innermost loops that multiply matrices or copy tiles."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", machine_code)
    instructions = [(int(address, 16), text) for address, text in lines]
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            loops.append((int(target.group(1), 16), address))
    spills = 0
    for begin, end in loops:
        body = [text for address, text in instructions if begin <= address <= end]
        holds_another = any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
        if not holds_another and any(re.search(r"\b(HGMMA|HMMA|UTC\w*MMA|LDGSTS|UTMALDG)", text) for text in body):
            spills += sum(bool(re.search(r"\b(STL|LDL)\b", text)) for text in body)
    return spills


def _read_nvidia(log: str, ptx: str, machine_code: str, shared: int) -> Resources:
    stores, loads = (_last_number(rf"(\d+) bytes spill {kind}", log) for kind in ("stores", "loads"))
    warpgroup = len(re.findall(r"wgmma\.mma_async", ptx))
    matrix = warpgroup + len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx))
    copies = len(re.findall(r"cp\.async\.c[ag]|cp\.async\.bulk\.tensor", ptx))
    warnings = tuple(line.strip() for line in log.splitlines() if re.search(r"C751[0-9]|serializ", line))
    spills = None if stores is None or loads is None else stores + loads
    registers = _last_number(r"Used (\d+) registers", log)
    return Resources(registers, spills, _loop_spills(machine_code), shared, matrix, warpgroup, copies, warnings)


def _read_amd(assembly: str, shared: int) -> Resources:
    registers = _last_number(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = _last_number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return Resources(registers, spills, None, shared, assembly.count("v_mfma"), 0, 0, ())


def nvidia_target(capability: int) -> GPUTarget:
    """The compiler's target for a compute capability (90 for sm_90)."""
    return GPUTarget("cuda", capability, 32)


def resource_problem(resources: Resources, target: GPUTarget) -> str | None:
    """Why a compiled kernel should not be launched on ``target``, or None."""
    limit = shared_memory_limit(target)
    if resources.shared_bytes > limit:
        return f"{resources.shared_bytes} bytes of shared memory, {limit} are there"
    if resources.loop_spills is not None and resources.loop_spills > HARMLESS_SPILLS:
        return f"{resources.loop_spills} spill instructions in the inner loop"
    if resources.warnings:
        return resources.warnings[0]
    return None


def shared_memory_limit(target: GPUTarget) -> int:
    """Bytes that one program may have on ``target``; the smallest known limit for an unknown one."""
    return _SHARED_LIMITS.get(target.arch, 65536 if target.backend == "hip" else 101376)
