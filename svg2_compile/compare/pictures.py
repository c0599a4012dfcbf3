"""Frames, differences and maps as pictures, and pictures as data URIs. Needs Pillow (extra ``quality``)."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svg2_compile.compare.attention_maps import AttentionMaps

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FrameStrips", "colour", "data_uri", "frame_strips", "map_image", "maps_picture", "text_colour"]

MAX_FRAMES = 48
MAX_WIDTH = 512
LOSSLESS_PIXELS = 160 * 160
"""Frames up to this size are PNG, larger ones JPEG: a page with 48 photographs must stay small enough to mail."""

GAINS = (1, 2, 4, 8, 16, 32, 64)

# Perceived lightness falls evenly from nearly white to dark; the map of an attention reads like ink on paper.
INK = ((255, 252, 245), (253, 212, 158), (246, 137, 88), (203, 60, 92), (120, 28, 109), (44, 14, 66))
# For densities: little is light, much is dark.
DENSITY = ((240, 249, 248), (168, 219, 213), (74, 172, 170), (22, 113, 122), (10, 57, 74))

LOG_RANGE = (-1.5, 1.5)
"""Of attention maps: 10^-1.5 to 10^1.5 times uniform attention."""


@dataclass(frozen=True)
class FrameStrips:
    """Frames as data URIs, the same ones of each video. gain: what differences were multiplied by."""

    frames: list[int]
    dense: list[str]
    sparse: list[str]
    difference: list[str]
    gain: int
    width: int
    height: int


def frame_strips(sparse: Tensor, dense: Tensor) -> FrameStrips:
    """Pictures of two videos [C, F, H, W] in [-1, 1] and of their difference, at most MAX_FRAMES of each."""
    total = dense.shape[1]
    chosen = torch.linspace(0, total - 1, min(total, MAX_FRAMES)).round().long()
    mine, theirs = (_colours(video[:, chosen]) for video in (sparse, dense))
    difference = (mine - theirs).abs()
    gain = _gain(difference)
    return FrameStrips(
        frames=chosen.tolist(),
        dense=[data_uri(_image(frame)) for frame in theirs.unbind(1)],
        sparse=[data_uri(_image(frame)) for frame in mine.unbind(1)],
        difference=[data_uri(_image((frame * gain).clamp(0, 1))) for frame in difference.unbind(1)],
        gain=gain,
        width=dense.shape[3],
        height=dense.shape[2],
    )


def _colours(video: Tensor) -> Tensor:
    """[3, F, H, W] in [0, 1]: the first three channels, or the first one as grey."""
    channels = video[:3] if len(video) >= 3 else video[:1].expand(3, -1, -1, -1)
    return (channels.float() / 2 + 0.5).clamp(0, 1)


def _gain(difference: Tensor) -> int:
    """The largest factor that leaves all but one pixel in a hundred below white."""
    flat = difference.flatten()
    large = flat[:: max(1, len(flat) // 1_000_000)].quantile(0.99).item()
    return max([gain for gain in GAINS if large * gain <= 1], default=1)


def _image(frame: Tensor) -> Image:
    """A picture of a frame [3, H, W] in [0, 1]."""
    from PIL import Image

    image = Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
    if image.width > MAX_WIDTH:
        size = (MAX_WIDTH, max(1, round(image.height * MAX_WIDTH / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def data_uri(image: Image) -> str:
    """The picture inside a URI, lossless if it is small."""
    lossless = image.width * image.height <= LOSSLESS_PIXELS or image.mode != "RGB"
    kind = "png" if lossless else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if lossless else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def map_image(values: Tensor) -> Image:
    """An attention map [S, S], 1 being uniform attention, on a logarithmic scale; white where there is nothing.

    A palette picture, which PNG stores in a third of the bytes.
    """
    from PIL import Image

    low, high = LOG_RANGE
    level = ((values.clamp(min=1e-12).log10() - low) / (high - low)).clamp(0, 1)
    index = torch.where(values > 0, (level * 254).round() + 1, torch.zeros_like(level)).byte()
    image = Image.fromarray(index.contiguous().numpy(), mode="P")
    palette = [255, 255, 255] + [part for step in range(255) for part in _ramp(INK, step / 254)]
    image.putpalette(palette)
    return image


def maps_picture(maps: AttentionMaps) -> Image:
    """The three maps side by side, with titles."""
    from PIL import Image, ImageDraw, ImageFont

    panels = [
        ("attention, tokens in order", maps.original),
        ("permuted by clusters", maps.permuted),
        (f"recovered: {maps.density:.0%} of pairs, {maps.recall:.0%} of mass", maps.recovered),
    ]
    side, gap, top = 480, 24, 40
    canvas = Image.new("RGB", (3 * side + 4 * gap, side + top + gap), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=18)
    for column, (title, values) in enumerate(panels):
        left = gap + column * (side + gap)
        draw.text((left, 12), title, fill="#1c2b33", font=font)
        panel = map_image(values).convert("RGB").resize((side, side), Image.Resampling.BOX)
        canvas.paste(panel, (left, top))
        draw.rectangle((left - 1, top - 1, left + side, top + side), outline="#b8c4c9")
    return canvas


def colour(level: float) -> str:
    """Of a density in [0, 1], as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*_ramp(DENSITY, level))


def text_colour(level: float) -> str:
    """What is readable on :func:`colour`."""
    return "#ffffff" if level > 0.5 else "#12262c"


def _ramp(stops: tuple[tuple[int, int, int], ...], level: float) -> list[int]:
    place = min(max(level, 0.0), 1.0) * (len(stops) - 1)
    index = min(int(place), len(stops) - 2)
    part = place - index
    return [round(a + (b - a) * part) for a, b in zip(stops[index], stops[index + 1], strict=True)]
