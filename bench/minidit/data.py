"""Synthetic video, made as the model trains: textured objects that move, persist and occlude each other.

All lengths are fractions of the frame's shorter edge, so that a prompt means the same at every size; only textures
keep their grain in pixels (growing slowly with the frame). A picture's layers are painted from far to near:

    background, sampled along the camera's path
    object 2, 1, 0: colour * surface, inside an anti-aliased outline that moves along the object's path
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bench.minidit.textures import background_pictures, surface_pictures
from svg2_compile.minidit.model import VideoSize
from svg2_compile.minidit.prompts import COLOURS, DIRECTIONS, ObjectWords, Prompt, encode_prompt, random_prompt

RADIUS = (0.22, 0.28)
"""Smallest and largest radius of an object, as a fraction of the shorter edge."""

LANES = (0.5, 0.3, 0.7)
"""Where the first, second and third object are: the height of those that move sideways, and so on. A prompt tells the
layout, but for chance; so shapes and paths are learned from every video, whatever its noise."""
CHANCE = 0.07
"""How far an object may be from there, as a fraction of the frame."""

TRAVEL = 0.4
"""How far an object or the camera moves over the whole clip, about, in the same unit."""

SPEEDS = (1, 2, 4)
"""Pixels per frame. A token is a patch of four: what moves lies the same way on the grid of tokens again after four
frames, two or one, so that a small model can learn to follow it."""


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _polygon_distance(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Signed distance to a simple polygon, negative inside. x and y have one shape, which is returned."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    nearest = torch.full_like(x, torch.inf)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = x2 - x1, y2 - y1
        along = (((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        nearest = torch.minimum(nearest, (x - x1 - along * dx).square() + (y - y1 - along * dy).square())
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (dx / dy))
    return nearest.sqrt() * torch.where(inside, -1.0, 1.0)


def _corners(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """``count`` points around the centre, the first at the top, at the radii in turn."""
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def shape_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance, negative inside, to a shape of about radius one around the origin. y points down."""
    if shape == "disc":
        return torch.hypot(x, y) - 1
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75).abs() - 0.32
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88
    if shape == "cross":
        near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        return torch.maximum(near - 0.36, far - 1.05)
    if shape == "triangle":
        return _polygon_distance(x, y + 0.15, _corners(3, (1.2,)))
    if shape == "star":
        return _polygon_distance(x, y, _corners(10, (1.2, 0.52)))
    raise ValueError(f"unknown shape {shape!r}")


def speed(size: VideoSize) -> int:
    """Pixels per frame of everything that moves in a video of ``size``."""
    wanted = TRAVEL * min(size.height, size.width) / max(1, size.frames - 1)
    return min(SPEEDS, key=lambda pixels: abs(math.log(pixels / wanted)))


def _path(direction: str, size: VideoSize) -> Tensor:
    """Offsets in pixels from the middle of a motion: (frames, 2) float32 of x and y, at an even speed."""
    frames = torch.arange(size.frames) - (size.frames - 1) / 2
    return frames[:, None] * torch.tensor(DIRECTIONS[direction]) * speed(size)


def _sample(picture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear samples of (channels, h, w) at texels x and y, each (frames, height, width); reflects at the edges.

    Returns (frames, channels, height, width).
    """
    h, w = picture.shape[-2:]
    grid = torch.stack([(x + 0.5) * 2 / w - 1, (y + 0.5) * 2 / h - 1], dim=-1)
    frames, height, width = x.shape
    flat = grid.reshape(1, frames * height, width, 2)
    out = F.grid_sample(picture[None], flat, mode="bilinear", padding_mode="reflection", align_corners=False)
    return out[0].unflatten(1, (frames, height)).transpose(0, 1)


def _pixel_grid(size: VideoSize, path: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates seen from a point that moves along ``path``: x and y, each (frames, height, width)."""
    y, x = torch.meshgrid(torch.arange(size.height) + 0.5, torch.arange(size.width) + 0.5, indexing="ij")
    return x - path[:, 0, None, None], y - path[:, 1, None, None]


def _texels_per_pixel(size: VideoSize, generator: Generator) -> float:
    """Around one for frames of 64 pixels. The grain grows with the square root of the frame."""
    return _uniform(0.75, 1.05, generator) * math.sqrt(64 / max(32, min(size.height, size.width)))


def _pick(pictures: tuple[Tensor, ...], generator: Generator) -> Tensor:
    return pictures[int(torch.randint(len(pictures), (), generator=generator))]


def _background(prompt: Prompt, size: VideoSize, generator: Generator) -> Tensor:
    """(frames, 3, height, width) float32 in [0, 1]. What is seen moves against the camera's pan."""
    picture = _pick(background_pictures(prompt.background), generator)
    x, y = _pixel_grid(size, -_path(prompt.camera, size))
    zoom = _texels_per_pixel(size, generator)
    left, top = (_uniform(0, edge, generator) for edge in (picture.shape[2], picture.shape[1]))
    return _sample(picture, x * zoom + left, y * zoom + top)


def _centre(words: ObjectWords, place: int, size: VideoSize, generator: Generator) -> Tensor:
    """The middle of the path of the object at ``place`` of the prompt, in pixels: x and y."""
    lane = LANES[place]
    sideways, upright = DIRECTIONS[words.direction]
    x, y = (0.5, lane) if sideways else (lane, 0.5) if upright else (lane, 1 - lane)
    chance = [_uniform(-CHANCE, CHANCE, generator) for _ in range(2)]
    return torch.tensor([(x + chance[0]) * size.width, (y + chance[1]) * size.height])


def _paint(video: Tensor, words: ObjectWords, place: int, size: VideoSize, generator: Generator) -> Tensor:
    """Paint the object at ``place`` of the prompt over ``video`` (frames, 3, height, width). Returns the new video."""
    radius = _uniform(*RADIUS, generator) * min(size.height, size.width)
    centre = _centre(words, place, size, generator)
    x, y = _pixel_grid(size, centre + _path(words.direction, size))
    outline = shape_distance(words.shape, x / radius, y / radius) * radius
    alpha = (0.5 - outline).clamp(0, 1)[:, None]

    surface = _pick(surface_pictures(words.surface), generator)
    zoom = _texels_per_pixel(size, generator)
    left, top = (_uniform(0, edge, generator) for edge in (surface.shape[2], surface.shape[1]))
    brightness = _sample(surface, x * zoom + left, y * zoom + top)
    # darker towards the edge, so that a part in front stands out from one of like colour behind
    shade = 0.55 + 0.45 * (-outline / (0.25 * radius)).clamp(0, 1)[:, None]
    colour = torch.tensor(COLOURS[words.colour])[:, None, None]
    # half of the surface scales the colour (keeps its hue), half is added (shows on dark colours)
    painted = (colour * (0.88 + brightness) + 0.35 * brightness).clamp(0, 1) * shade
    return torch.lerp(video, painted, alpha)


def make_video(prompt: Prompt, size: VideoSize, generator: Generator) -> Tensor:
    """A video of the prompt: (3, frames, height, width) float32 in [-1, 1]."""
    video = _background(prompt, size, generator)
    for place, words in reversed(list(enumerate(prompt.objects))):
        video = _paint(video, words, place, size, generator)
    return video.transpose(0, 1).contiguous() * 2 - 1


def make_batch(batch: int, size: VideoSize, generator: Generator, dropout: float = 0.1) -> tuple[Tensor, Tensor]:
    """Random videos and their conditions, some of them replaced by the empty condition.

    Returns:
        (batch, 3, frames, height, width) float32 in [-1, 1], and (batch, CONTEXT_TOKENS, TEXT_DIM) float32.
    """
    videos, conditions = [], []
    for _ in range(batch):
        prompt = random_prompt(generator)
        videos.append(make_video(prompt, size, generator))
        dropped = float(torch.rand((), generator=generator)) < dropout
        conditions.append(encode_prompt(None if dropped else prompt))
    return torch.stack(videos), torch.stack(conditions)
