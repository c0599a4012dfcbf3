"""Rules about the repository itself: import directions, optional packages, machine paths, file sizes."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 350
PACKAGES = {
    "kernels": "svg2_compile.kernels",
    "passes": "svg2_compile.passes",
    "svg2_compile": "svg2_compile",
    "integrations": "svg2_compile.integrations",
}

# The map of the house: every room, and the rooms that its files may import, also inside functions. From the ground up.
ROOMS = {
    "kernels": "",
    "kernels.tuning": "",
    "kernels.reference": "",
    "kernels.cpu": "kernels kernels.tuning",
    "kernels.cpu.native": "kernels.cpu",
    "kernels.triton": "kernels kernels.tuning",
    "kernels.autotune": "kernels kernels.triton kernels.tuning",
    "passes.graph": "",
    "passes.layout": "passes.graph",
    "passes.attention": "passes.graph passes.layout",
    "passes": "passes.graph passes.layout passes.attention kernels kernels.tuning",
    "logs": "",
    "settings": "passes",
    "codegen": "logs passes.graph",
    "reporting": "settings passes kernels.triton",
    "runtime": "codegen logs passes passes.graph reporting settings",
    "pipeline": "logs passes passes.attention passes.graph reporting settings",
    "backend": "codegen logs passes.graph pipeline reporting runtime settings",
    "hosts": "backend logs passes.graph reporting runtime",
    "eager": "backend passes reporting runtime settings",
    "explanation": "hosts passes passes.graph pipeline reporting settings",
    "export": "codegen hosts logs passes passes.attention passes.graph kernels pipeline reporting runtime settings",
    "api": "backend export hosts reporting runtime settings",
    "minidit": "",
    "compare": "api minidit kernels reporting runtime settings",
    "tools": "codegen compare explanation export kernels kernels.autotune kernels.cpu.native kernels.tuning logs "
    "minidit passes pipeline reporting settings",
    "cli": "compare export settings tools",
    # Plug-ins of hosts: nothing above imports them.
    "integrations": "",
    "integrations.comfyui": "__init__ hosts settings",
    "integrations.diffusers": "eager hosts logs passes runtime",
    "integrations.vllm_omni": "eager logs passes reporting runtime settings",
    "__init__": "api compare eager explanation export hosts reporting runtime settings",
}


def _tracked(pattern: str = "*") -> list[Path]:
    """The files of the repository, or of an unpacked source archive."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", pattern]
    listing = None
    if shutil.which("git"):
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing is not None and listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = [path for folder in (*PACKAGES, "tests", "bench") for path in (ROOT / folder).rglob(pattern)]
    return [path for path in paths if path.is_file()]


def _imports(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, at any depth."""
    folder = path.relative_to(ROOT).parts[0]
    package = [PACKAGES[folder], *path.relative_to(ROOT).parent.parts[1:]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = ".".join(package).split(".")
            base = ".".join(parts[: len(parts) + 1 - node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            # `from svg2_compile import passes` imports a subpackage by its second half.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _module(path: Path) -> str:
    """The name by which a file is imported."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *parts]).removesuffix(".__init__")


def _room(module: str) -> str:
    """The room of a module: the longest name in the map that it begins with."""
    inside = module.removeprefix("svg2_compile").removeprefix(".") or "__init__"
    found = [room for room in ROOMS if f"{inside}.".startswith(f"{room}.")]
    assert found, f"{module} is in no room of the map"
    return max(found, key=len)


@functools.cache
def _import_graph() -> nx.DiGraph:
    """Every module of the project, and an edge to every one that it imports, wherever in the file."""
    files = {_module(path): path for path in _tracked("*.py") if path.relative_to(ROOT).parts[0] in PACKAGES}
    graph = nx.DiGraph()
    for module, path in files.items():
        graph.add_node(module)
        for name in _imports(path):
            # The name of a module, or of something in it.
            target = name if name in files else name.rpartition(".")[0]
            if target in files and target != module:
                graph.add_edge(module, target)
    return graph


def test_rooms_import_as_the_map_says() -> None:
    """What the map does not allow is not imported, and what it allows is: so it stays true."""
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, target in _import_graph().edges:
        if _room(module) != _room(target):
            used[_room(module)].add(_room(target))
    assert used == {room: set(allowed.split()) for room, allowed in ROOMS.items()}


def test_no_circles() -> None:
    """Neither among files nor among rooms; a package's __init__ may name what is in it."""
    graph = _import_graph()
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []
    rooms = nx.DiGraph((room, other) for room, allowed in ROOMS.items() for other in allowed.split())
    assert nx.is_directed_acyclic_graph(rooms)


def test_implementations_do_not_import_each_other() -> None:
    implementations = {"kernels.reference", "kernels.cpu", "kernels.triton"}
    assert all(implementations.isdisjoint(ROOMS[room].split()) for room in implementations)


def _modules(folder: str) -> list[str]:
    names = []
    for path in _tracked("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == folder and "triton" not in parts:
            names.append(_module(path))
    return sorted(names)


@pytest.mark.parametrize("folder", list(PACKAGES))
def test_imports_in_a_fresh_process_without_triton_and_diffusers(folder: str) -> None:
    """A name set to None in sys.modules raises ImportError, as on a machine without the package."""
    program = (
        "import sys, importlib\n"
        "missing = ('triton', 'diffusers', 'transformers', 'matplotlib', 'PIL', 'vllm_omni', 'comfy')\n"
        "for name in missing: sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *_modules(folder)],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# Written in pieces, so that this file does not find itself.
_MACHINE_PATH = re.compile(r"(?<![\w.])/" + r"(?:work|home|root|Users|mnt|opt)/\w")


def test_no_machine_paths() -> None:
    found = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            if _MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_files_stay_readable() -> None:
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _tracked("*.py")}
    assert {str(path.relative_to(ROOT)): lines for path, lines in counts.items() if lines > MAX_LINES} == {}


def test_tracked_packages_are_installed() -> None:
    """Every folder with code is in pyproject's explicit list: one forgotten there is missing from the wheel only."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for path in _tracked("*.py")}
    for folder in folders:
        if folder.parts and folder.parts[0] in PACKAGES:
            name = ".".join([PACKAGES[folder.parts[0]], *folder.parts[1:]])
            assert f'"{name}"' in text, f"{name} is missing from tool.setuptools.packages"
