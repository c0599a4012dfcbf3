"""Textures: patches of scikit-image's bundled pictures, and three drawn patterns.

Only pictures that ship inside the package are read; nothing is downloaded. Every texture is kept at three sizes, each
smoothed for its size, so that sampling it at about one texel per pixel neither aliases nor blurs.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 160
"""Edge of a background patch in texels, at most; sampling beyond the edge reflects."""

SCALES = (0.35, 0.5, 0.7)
"""Sizes of the bundled pictures that are kept, relative to the original."""

_PICTURES = {
    "gravel": "gravel.png",
    "grass": "grass.png",
    "brick": "brick.png",
    "moon": "moon.png",
    "fur": "chelsea.png",
    "coffee": "coffee.png",
    "portrait": "astronaut.png",
    "tissue": "ihc.png",
    "stars": "hubble_deep_field.jpg",
    "garage": "motorcycle_left.png",
}
_SURFACE_CONTRAST = 0.22
_BACKGROUND_CONTRAST = 0.16


def _read_picture(filename: str) -> Tensor:
    """A bundled picture as (3, height, width) float32 in [0, 1]."""
    import skimage
    from PIL import Image

    path = Path(skimage.__file__).parent / "data" / filename
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _resized(picture: Tensor, scale: float) -> Tensor:
    return F.interpolate(picture[None], scale_factor=scale, mode="bilinear", antialias=True)[0]


def _with_contrast(picture: Tensor, contrast: float) -> Tensor:
    """Shift and scale to a standard deviation of ``contrast`` around the picture's own mean colour."""
    mean = picture.mean(dim=(1, 2), keepdim=True)
    return (picture - mean) * (contrast / picture.std().clamp_min(1e-3))


@functools.cache
def background_pictures(name: str) -> tuple[Tensor, ...]:
    """The picture at each of ``SCALES``: (3, height, width) float32 in [0, 1], of even, moderate contrast."""
    picture = _read_picture(_PICTURES[name])
    mean = picture.mean(dim=(1, 2), keepdim=True)
    if float(mean.std()) > 0:
        mean = 0.6 * mean + 0.4 * mean.mean()  # paler than the objects, whose colour must stand out
    mean = mean.clamp(0.3, 0.6)
    return tuple((mean + _with_contrast(_resized(picture, s), _BACKGROUND_CONTRAST)).clamp(0, 1) for s in SCALES)


def _pattern(name: str, period: float) -> Tensor:
    """A drawn pattern with ``period`` texels, smooth at its edges: (1, TILE, TILE) float32, about -1 to 1."""
    y, x = torch.meshgrid(
        torch.arange(TILE) * 2 * torch.pi / period, torch.arange(TILE) * 2 * torch.pi / period, indexing="ij"
    )
    if name == "stripes":
        wave = torch.sin((x + y) / 2**0.5)
    elif name == "checks":
        wave = torch.sin(x) * torch.sin(y) * 2
    else:
        wave = torch.cos(x) + torch.cos(y) - 0.7
    return torch.tanh(2.5 * wave)[None]


@functools.cache
def surface_pictures(name: str) -> tuple[Tensor, ...]:
    """A surface's brightness at three sizes: (1, height, width) float32, mean zero, to be added to a colour."""
    if name in _PICTURES:
        grey = _read_picture(_PICTURES[name]).mean(0, keepdim=True)
        return tuple(_with_contrast(_resized(grey, s), _SURFACE_CONTRAST) for s in SCALES)
    return tuple(_with_contrast(_pattern(name, period), _SURFACE_CONTRAST) for period in (5.0, 6.5, 8.0))
