"""Write a checkpoint's averaged weights as float16 safetensors, small enough to keep in the repository.

python -m bench.minidit.export FOLDER/checkpoint.pt weights.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from svg2_compile.minidit.model import save_weights

MAX_BYTES = 16_000_000


def export(checkpoint: Path, weights: Path) -> int:
    """Write the averaged weights of ``checkpoint`` to ``weights``. Returns the file's size in bytes."""
    average = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["average"]
    save_weights(average, weights)
    written = weights.stat().st_size
    if written > MAX_BYTES:
        raise ValueError(f"{weights} has {written:,} bytes, more than {MAX_BYTES:,}")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("weights", type=Path)
    arguments = parser.parse_args()
    print(f"{export(arguments.checkpoint, arguments.weights):,} bytes")


if __name__ == "__main__":
    main()
