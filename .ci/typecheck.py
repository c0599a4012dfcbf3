"""Run mypy on the package as it is installed.

``passes/`` and ``kernels/`` lie beside ``svg2_compile/`` but are installed, and imported, as ``svg2_compile.passes``
and ``svg2_compile.kernels``. mypy reads files and knows nothing of that mapping, so it is shown a tree of links that
has the installed shape. Its messages are printed with the paths of the real files.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".typecheck"
INSIDE_PACKAGE = ("passes", "kernels", "integrations")
CHECKED = ("svg2_compile", "tests", "bench")


def build_tree() -> list[str]:
    """Lay out the links anew. Returns the folders to check, relative to the tree."""
    package = TREE / "svg2_compile"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (ROOT / "svg2_compile").iterdir():
        if source.suffix in (".py", ".pyi", ".typed") or (source / "__init__.py").is_file():
            (package / source.name).symlink_to(source)
    for name in INSIDE_PACKAGE:
        (package / name).symlink_to(ROOT / name, target_is_directory=True)
    for name in CHECKED[1:]:
        link = TREE / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name, target_is_directory=True)
    return [name for name in CHECKED if any((ROOT / name).rglob("*.py"))]


def main() -> int:
    folders = build_tree()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *folders, *sys.argv[1:]]
    finished = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False)
    moved = "|".join(INSIDE_PACKAGE)
    print(re.sub(rf"^svg2_compile/({moved})/", r"\1/", finished.stdout, flags=re.MULTILINE), end="")  # noqa: T201
    print(finished.stderr, end="", file=sys.stderr)  # noqa: T201
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main())
