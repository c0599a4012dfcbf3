"""Videos as pictures: a sheet of frames, or an animation. Needs Pillow (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["contact_sheet", "to_pixels", "write_gif"]

LABEL_HEIGHT = 16


def to_pixels(videos: Tensor) -> Tensor:
    """[-1, 1] float to [0, 255] uint8, shape unchanged."""
    return ((videos + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def contact_sheet(videos: Tensor, columns: int = 8, zoom: int = 2, labels: Sequence[str] = ()) -> Image:
    """Lay out (videos, 3, frames, height, width) in [-1, 1]: a row each, at most ``columns`` frames, evenly spaced.

    With ``labels``, one for each video, a line of text stands above every row.
    """
    from PIL import Image

    frames = videos.shape[2]
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    pixels = to_pixels(videos[:, :, shown]).permute(0, 3, 2, 4, 1)  # video, row, frame, column, channel
    rows = [Image.fromarray(row.flatten(1, 2).contiguous().numpy()) for row in pixels]
    rows = [row.resize((row.width * zoom, row.height * zoom), Image.Resampling.NEAREST) for row in rows]
    return _stacked(rows, labels)


def _stacked(rows: Sequence[Image], labels: Sequence[str]) -> Image:
    from PIL import Image, ImageDraw

    top = LABEL_HEIGHT if labels else 0
    height = rows[0].height + top
    sheet = Image.new("RGB", (rows[0].width, height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        sheet.paste(row, (0, index * height + top))
        if labels:
            draw.text((4, index * height + 2), labels[index], fill="black")
    return sheet


def write_gif(
    videos: Tensor, path: Path, zoom: int = 3, frame_ms: int = 90, gap: int = 2, labels: Sequence[str] = ()
) -> None:
    """Write the videos side by side as one endless GIF, ``gap`` white pixels apart."""
    padded = torch.nn.functional.pad(videos, (0, gap), value=1.0)
    pixels = to_pixels(padded).permute(2, 3, 0, 4, 1)  # frame, row, video, column, channel
    images = [_animated(frame.flatten(1, 2), zoom, labels) for frame in pixels]
    images[0].save(path, save_all=True, append_images=images[1:], duration=frame_ms, loop=0)


def _animated(frame: Tensor, zoom: int, labels: Sequence[str]) -> Image:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(frame.contiguous().numpy())
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    if not labels:
        return picture
    canvas = Image.new("RGB", (picture.width, picture.height + LABEL_HEIGHT), "white")
    canvas.paste(picture, (0, LABEL_HEIGHT))
    draw = ImageDraw.Draw(canvas)
    for index, label in enumerate(labels):
        draw.text((4 + index * picture.width // len(labels), 2), label, fill="black")
    return canvas
