"""Sample videos from weights and lay them out on a sheet: a row per prompt, a column per frame.

python -m bench.minidit.sample weights.safetensors --size 16x64x64 --out sheet.png --gif sheet.gif
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from svg2_compile.minidit.model import VideoSize, load_model, sample_videos

PROMPTS = (
    "red brick disc right, background grass, camera still",
    "blue dots star up, yellow stripes square left, background moon, camera right",
    "white checks ring down, background coffee, camera left",
    "green gravel triangle left, purple grass cross right, background brick, camera still",
    "cyan stripes square down, orange dots disc up, red checks star right, background fur, camera up",
    "yellow gravel star still, background stars, camera down",
)


def parse_size(text: str) -> VideoSize:
    """Read ``frames x height x width``, as in 16x64x64."""
    frames, height, width = (int(part) for part in text.split("x"))
    return VideoSize(frames, height, width)


def to_pixels(videos: Tensor) -> Tensor:
    """[-1, 1] float to [0, 255] uint8, shape unchanged."""
    return ((videos + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def contact_sheet(videos: Tensor, columns: int = 8, zoom: int = 2) -> Image.Image:
    """Lay out (videos, 3, frames, height, width) in [-1, 1]: a row each, at most ``columns`` frames, evenly spaced."""
    frames = videos.shape[2]
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    pixels = to_pixels(videos[:, :, shown]).permute(0, 3, 2, 4, 1)  # video, row, frame, column, channel
    image = Image.fromarray(pixels.flatten(0, 1).flatten(1, 2).numpy())
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def write_gif(videos: Tensor, path: Path, zoom: int = 3, frame_ms: int = 90) -> None:
    """Write the videos side by side as one endless GIF."""
    pixels = to_pixels(videos).permute(2, 3, 0, 4, 1)  # frame, row, video, column, channel
    images = [Image.fromarray(frame.flatten(1, 2).numpy()) for frame in pixels]
    images = [image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST) for image in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=frame_ms, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count up")
    parser.add_argument("--size", type=parse_size, default=VideoSize(16, 64, 64), metavar="FRAMESxHEIGHTxWIDTH")
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
