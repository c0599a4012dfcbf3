"""The offline door in numbers: transform, file, load, and run time against the torch.compile door.

    python -m bench.export                 every part; JSON in bench/results/export.json
    python -m bench.export --quick         few models and layers, no package; writes nothing
    python -m bench.export --only files    one part: files, depth or speed

Every number is behind a gate: the loaded program must equal the model with all clusters kept, and the torch.compile
door with a real selection. Without that no time is reported.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.common import write_results
from bench.export import files, speed
from svg2_compile.minidit.model import VideoSize

QUICK_MODELS = ("wan_t2v", "ltx_video")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few models and layers; writes nothing")
    parser.add_argument("--only", choices=("files", "depth", "speed"), help="one part; writes nothing")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only in (None, "files"):
            for model in QUICK_MODELS if options.quick else files.MODELS:
                results.append(_shown(files.zoo_row(model, folder)))
        if options.only in (None, "depth"):
            for layers in (2,) if options.quick else (10, 40):
                results.append(_shown(files.depth_row(layers, folder)))
        if options.only in (None, "speed"):
            for frames in (2,) if options.quick else (8, 16):
                size = VideoSize(frames, 64, 64)
                results.append(_shown(speed.row(size, folder, with_package=not options.quick)))
    if not options.quick and options.only is None:
        print(write_results("export", results))


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    print(result, flush=True)
    return result


if __name__ == "__main__":
    main()
