"""All CPU benchmarks, one after the other: ``python -m bench [--quick]``."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("cpu_attention", "compile_time", "export", "quality.attention", "quality.video")
BENCHMARKS += ("quality.speed", "e2e_quality")


def main() -> int:
    # Each in a process of its own: peak memory and compile caches of one must not reach the next.
    codes = [subprocess.run([sys.executable, "-m", f"bench.{name}", *sys.argv[1:]]).returncode for name in BENCHMARKS]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
