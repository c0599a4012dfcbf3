"""All CPU benchmarks, one after the other: ``python -m bench [--quick]``."""

from __future__ import annotations

import subprocess
import sys

QUALITY = ("quality.attention", "quality.video", "quality.speed", "e2e_quality")
BENCHMARKS = ("cpu_attention", "compile_time", "host_cost", "export", *QUALITY)


def main() -> int:
    # Each in a process of its own: peak memory and compile caches of one must not reach the next.
    codes = [subprocess.run([sys.executable, "-m", f"bench.{name}", *sys.argv[1:]]).returncode for name in BENCHMARKS]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
