"""How far a video is from another one: PSNR, SSIM and multi-scale SSIM.

A video is a float tensor [C, F, H, W]; values span ``data_range``, which is 2 for [-1, 1]. SSIM is that of
Wang et al. 2004 (Gaussian window of sigma 1.5), per frame, by scikit-image. There is no learned perceptual distance:
its weights would have to be downloaded. Multi-scale SSIM (Wang et al. 2003) stands in for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["DATA_RANGE", "MIN_SIDE", "multiscale_ssim", "psnr", "psnr_per_frame", "ssim", "ssim_per_frame"]

DATA_RANGE = 2.0
"""Of videos in [-1, 1]."""

SIGMA = 1.5
RADIUS = 5
MIN_SIDE = 2 * RADIUS + 1
"""Pixels of the smallest picture that the window of SSIM fits into."""

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of Wang et al. 2003, from fine to coarse."""


def psnr(video: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> float:
    """Peak signal-to-noise ratio in dB of the mean squared error over the whole video; inf where nothing differs.

    Raises:
        ValueError: the videos have different shapes, or are not [C, F, H, W].
    """
    _check(video, reference)
    return _decibel(_squared_error(video, reference).mean().item(), data_range)


def psnr_per_frame(video: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> list[float]:
    """:func:`psnr` of every frame."""
    _check(video, reference)
    return [_decibel(error, data_range) for error in _squared_error(video, reference).mean((0, 2, 3)).tolist()]


def ssim(video: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> float:
    """Mean structural similarity over frames and channels, at most 1.

    Raises:
        ValueError: as :func:`psnr`, or a frame is smaller than 11 x 11.
        ImportError: scikit-image is missing.
    """
    return float(np.mean(ssim_per_frame(video, reference, data_range)))


def ssim_per_frame(video: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> list[float]:
    """:func:`ssim` of every frame."""
    _check(video, reference, MIN_SIDE)
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM needs scikit-image: svg2-compile[quality]") from error
    frames = zip(_frames(video), _frames(reference), strict=True)
    settings: dict[str, Any] = {
        "data_range": data_range,
        "channel_axis": 0,
        "gaussian_weights": True,
        "sigma": SIGMA,
        "use_sample_covariance": False,
    }
    return [float(structural_similarity(mine, theirs, **settings)) for mine, theirs in frames]


def multiscale_ssim(video: Tensor, reference: Tensor, data_range: float = DATA_RANGE) -> float:
    """Multi-scale SSIM: mean over frames and channels, in [0, 1].

    Five scales need 176 pixels. Smaller frames have fewer scales, whose weights are scaled to sum to one.

    Raises:
        ValueError, ImportError: as :func:`ssim`.
    """
    _check(video, reference, MIN_SIDE)
    mine, theirs = _frames(video), _frames(reference)
    weights = np.array(SCALE_WEIGHTS[: _scales(min(mine.shape[2:]))])
    weights /= weights.sum()
    product = np.ones(mine.shape[:2])
    for scale, weight in enumerate(weights):
        similarity, contrast = _similarity(mine, theirs, data_range)
        factor = similarity if scale == len(weights) - 1 else contrast
        product *= np.maximum(factor, 0) ** weight
        mine, theirs = _halved(mine), _halved(theirs)
    return float(product.mean())


def _check(video: Tensor, reference: Tensor, min_side: int = 1) -> None:
    if video.shape != reference.shape or video.ndim != 4:
        raise ValueError(
            f"video and reference: expected two videos [C, F, H, W] of one shape, got {tuple(video.shape)} and "
            f"{tuple(reference.shape)}"
        )
    if min(video.shape[2:]) < min_side:
        raise ValueError(f"video: SSIM needs frames of at least {min_side} x {min_side}, got {tuple(video.shape[2:])}")


def _squared_error(video: Tensor, reference: Tensor) -> Tensor:
    return (video.double() - reference.double()).pow(2)


def _decibel(error: float, data_range: float) -> float:
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def _frames(video: Tensor) -> np.ndarray:
    """[F, C, H, W] float64."""
    return np.asarray(video.detach().double().cpu().transpose(0, 1))


def _scales(side: int) -> int:
    return sum(side // 2**scale >= MIN_SIDE for scale in range(len(SCALE_WEIGHTS)))


def _similarity(mine: np.ndarray, theirs: np.ndarray, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    """SSIM [F, C], and the part of it that compares contrast and structure, as structural_similarity computes it."""
    first, second = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _blurred(mine), _blurred(theirs)
    variances = _blurred(mine**2) - mean_x**2 + _blurred(theirs**2) - mean_y**2
    covariance = _blurred(mine * theirs) - mean_x * mean_y
    contrast = (2 * covariance + second) / (variances + second)
    luminance = (2 * mean_x * mean_y + first) / (mean_x**2 + mean_y**2 + first)
    inside = (..., slice(RADIUS, -RADIUS), slice(RADIUS, -RADIUS))
    return (luminance * contrast)[inside].mean((2, 3)), contrast[inside].mean((2, 3))


def _blurred(pictures: np.ndarray) -> np.ndarray:
    try:
        from scipy.ndimage import gaussian_filter
    except ImportError as error:
        raise ImportError("multi-scale SSIM needs scipy (comes with scikit-image): svg2-compile[quality]") from error

    blurred: np.ndarray = gaussian_filter(pictures, (0, 0, SIGMA, SIGMA), truncate=RADIUS / SIGMA)
    return blurred


def _halved(pictures: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = pictures.shape[2] // 2 * 2, pictures.shape[3] // 2 * 2
    even = pictures[:, :, :height, :width]
    return even.reshape(*even.shape[:2], height // 2, 2, width // 2, 2).mean((3, 5))
