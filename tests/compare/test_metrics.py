"""PSNR, SSIM and multi-scale SSIM: known values, and those of scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from svg2_compile.compare.metrics import multiscale_ssim, psnr, psnr_per_frame, ssim, ssim_per_frame

skimage_metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image (extra quality)")


def video(size=(3, 4, 48, 40), seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*size[:2], 6, 5, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size[2:], mode="bilinear")


def test_psnr_of_a_known_error():
    reference = torch.zeros(3, 2, 12, 12)
    shifted = reference.clone()
    shifted[:, 1] = 0.2  # squared error 0.04, 0.02 over both frames; the peak is 2
    assert psnr_per_frame(shifted, reference) == [math.inf, pytest.approx(20.0, abs=1e-5)]
    assert psnr(shifted, reference) == pytest.approx(10 * math.log10(4 / 0.02), abs=1e-5)
    assert psnr(shifted[:, :1], reference[:, :1]) == math.inf


def test_psnr_is_that_of_scikit_image():
    mine, theirs = video(), video() + 0.1 * video(seed=1)
    expected = skimage_metrics.peak_signal_noise_ratio(theirs.numpy(), mine.numpy(), data_range=2)
    assert psnr(mine, theirs) == pytest.approx(expected, rel=1e-6)


def test_ssim_of_identical_and_of_unrelated_videos():
    mine = video()
    assert ssim(mine, mine) == pytest.approx(1.0)
    assert multiscale_ssim(mine, mine) == pytest.approx(1.0)
    assert ssim(mine, video(seed=1)) < 0.5


def test_ssim_is_the_mean_over_frames_and_channels():
    mine, theirs = video(), (video() + 0.2 * video(seed=1)).clamp(-1, 1)
    settings = {"data_range": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        skimage_metrics.structural_similarity(mine[c, f].numpy(), theirs[c, f].numpy(), **settings)
        for f in range(4)
        for c in range(3)
    ]
    assert ssim(mine, theirs) == pytest.approx(np.mean(expected), rel=1e-4)
    assert len(ssim_per_frame(mine, theirs)) == 4


def test_multiscale_ssim_with_one_scale_is_ssim():
    """Frames under 22 pixels have room for one scale."""
    mine, theirs = video((3, 2, 20, 21)), (video((3, 2, 20, 21)) + 0.2 * video((3, 2, 20, 21), 1)).clamp(-1, 1)
    assert multiscale_ssim(mine, theirs) == pytest.approx(ssim(mine, theirs), rel=1e-6)


def test_multiscale_ssim_forgives_what_is_lost_from_afar():
    """Fine noise is gone at coarse scales; a shift of large parts is not."""
    mine = video((3, 2, 96, 96))
    noise = 0.3 * torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    assert multiscale_ssim(mine + noise, mine) > ssim(mine + noise, mine) + 0.1
    assert multiscale_ssim(mine.roll(16, -1), mine) < 0.9


@pytest.mark.parametrize("metric", [psnr, ssim, multiscale_ssim])
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match=r"of one shape, got \(3, 4, 48, 40\) and \(3, 4, 48, 41\)"):
        metric(video(), video((3, 4, 48, 41)))


@pytest.mark.parametrize("metric", [ssim, multiscale_ssim])
def test_frames_too_small_for_the_window(metric):
    with pytest.raises(ValueError, match=r"at least 11 x 11, got \(10, 40\)"):
        metric(video((3, 1, 10, 40)), video((3, 1, 10, 40)))
