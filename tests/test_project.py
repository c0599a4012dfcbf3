"""Rules about the repository itself: import directions, optional packages, machine paths, file sizes."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 350
# Folder -> the prefixes of this project that its files may import.
ALLOWED = {
    "kernels": ("svg2_compile.kernels",),
    "passes": ("svg2_compile.passes", "svg2_compile.kernels"),
    "svg2_compile": ("svg2_compile",),
}
PACKAGES = {"kernels": "svg2_compile.kernels", "passes": "svg2_compile.passes", "svg2_compile": "svg2_compile"}


def _tracked(pattern: str = "*") -> list[Path]:
    """The files of the repository, or of an unpacked source archive."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", pattern]
    listing = None
    if shutil.which("git"):
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing is not None and listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = [path for folder in (*ALLOWED, "tests", "bench") for path in (ROOT / folder).rglob(pattern)]
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


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    files = [path for path in _tracked("*.py") if path.relative_to(ROOT).parts[0] == folder]
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in _imports(path)
        if name.split(".")[0] in PACKAGES and not name.startswith(tuple(f"{allowed}." for allowed in ALLOWED[folder]))
    ]
    assert wrong == []


def test_reference_and_fast_kernels_do_not_import_each_other() -> None:
    implementations = {"reference", "cpu", "triton"}
    wrong = []
    for path in _tracked("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "kernels" and parts[1] in implementations:
            others = tuple(f"svg2_compile.kernels.{name}." for name in implementations - {parts[1]})
            wrong += [f"{path.relative_to(ROOT)}: {name}" for name in _imports(path) if f"{name}.".startswith(others)]
    assert wrong == []


def _modules(folder: str) -> list[str]:
    names = []
    for path in _tracked("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == folder and "triton" not in parts:
            names.append(".".join([PACKAGES[folder], *parts[1:]]).removesuffix(".__init__"))
    return sorted(names)


@pytest.mark.parametrize("folder", ["kernels", "passes", "svg2_compile"])
def test_imports_in_a_fresh_process_without_triton_and_diffusers(folder: str) -> None:
    """A name set to None in sys.modules raises ImportError, as on a machine without the package."""
    program = (
        "import sys, importlib\n"
        "for name in ('triton', 'diffusers', 'transformers', 'matplotlib', 'PIL'): sys.modules[name] = None\n"
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
