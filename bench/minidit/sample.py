"""Sample videos from weights and lay them out on a sheet: a row per prompt, a column per frame.

python -m bench.minidit.sample weights.safetensors --size 16x64x64 --out sheet.png --gif sheet.gif
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from svg2_compile.compare.command import parse_size
from svg2_compile.minidit.model import VideoSize, load_model, sample_videos
from svg2_compile.minidit.pictures import contact_sheet, write_gif

PROMPTS = (
    "red brick disc right, background grass, camera still",
    "blue dots star up, yellow stripes square left, background moon, camera right",
    "white checks ring down, background coffee, camera left",
    "green gravel triangle left, purple grass cross right, background brick, camera still",
    "cyan stripes square down, orange dots disc up, red checks star right, background fur, camera up",
    "yellow gravel star still, background stars, camera down",
)


def video_size(text: str) -> VideoSize:
    """Read ``frames x height x width``, as in 16x64x64."""
    return VideoSize(*parse_size(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count up")
    parser.add_argument("--size", type=video_size, default=VideoSize(16, 64, 64), metavar="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    parser.add_argument("--gif", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.weights, getattr(torch, arguments.dtype), arguments.device)
    prompts = arguments.prompt or PROMPTS
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    began = time.perf_counter()
    videos = sample_videos(model, prompts, list(seeds), arguments.size, arguments.steps, arguments.guidance)
    print(f"{len(prompts)} videos in {time.perf_counter() - began:.1f} s")
    contact_sheet(videos).save(arguments.out)
    if arguments.gif is not None:
        write_gif(videos, arguments.gif)


if __name__ == "__main__":
    main()
