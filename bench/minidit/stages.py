"""The curriculum: small videos first, because a token of theirs costs a fraction of one of a long video's.

Every stage mixes shapes: flat and tall, few large frames and many small ones, so that the model has met every position
along each axis long before it meets them all in one video.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from svg2_compile.minidit.model import VideoSize


@dataclass(frozen=True)
class Choice:
    """A shape, the number of videos in a batch of it, and how often it is drawn."""

    size: VideoSize
    batch: int
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    choices: tuple[Choice, ...]


STAGES = (
    Stage(
        "512 tokens",
        1340,
        (
            Choice(VideoSize(8, 32, 32), 16, 6),
            Choice(VideoSize(4, 40, 48), 16, 1),
            Choice(VideoSize(16, 24, 24), 14, 1),
            Choice(VideoSize(2, 64, 64), 16, 1),
        ),
    ),
    Stage(
        "1,152 tokens",
        300,
        (
            Choice(VideoSize(8, 48, 48), 6, 5),
            Choice(VideoSize(16, 32, 32), 7, 2),
            Choice(VideoSize(5, 56, 64), 6, 1),
            Choice(VideoSize(1, 128, 128), 7, 1),
        ),
    ),
    Stage(
        "3,072 tokens",
        130,
        (
            Choice(VideoSize(12, 64, 64), 3, 5),
            Choice(VideoSize(16, 48, 64), 3, 2),
            Choice(VideoSize(3, 128, 128), 3, 1),
            Choice(VideoSize(8, 32, 32), 16, 2),
        ),
    ),
    Stage(
        "4,096 tokens",
        220,
        (
            Choice(VideoSize(16, 64, 64), 2, 5),
            Choice(VideoSize(4, 128, 128), 2, 1),
            Choice(VideoSize(16, 64, 96), 1, 1),
            Choice(VideoSize(8, 48, 48), 6, 2),
        ),
    ),
    # where things are and how they move is learned from many videos, fine textures from large ones: small videos,
    # a twentieth of the time each, take four fifths of it
    Stage(
        "all sizes",
        100_000,
        (
            Choice(VideoSize(8, 32, 32), 16, 32),
            Choice(VideoSize(8, 48, 48), 6, 24),
            Choice(VideoSize(16, 32, 32), 7, 8),
            Choice(VideoSize(16, 64, 64), 2, 4),
            Choice(VideoSize(4, 128, 128), 2, 1),
            Choice(VideoSize(16, 64, 96), 1, 1),
        ),
    ),
)
"""The last stage lasts until training is told to finish."""


def stage_at(step: int, stages: tuple[Stage, ...] = STAGES) -> int:
    """Index of the stage that ``step`` (counted from zero) belongs to."""
    for index, stage in enumerate(stages):
        if step < stage.steps:
            return index
        step -= stage.steps
    return len(stages) - 1


def choice_at(step: int, stages: tuple[Stage, ...] = STAGES) -> Choice:
    """The shape of ``step``'s batch: random by weight, but the same in every run."""
    choices = stages[stage_at(step, stages)].choices
    return random.Random(step).choices(choices, [choice.weight for choice in choices])[0]
