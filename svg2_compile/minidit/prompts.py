"""The language of the small model: up to three objects, a background and the camera, in a few dozen words.

A prompt in text is a list of clauses, nearest object first::

    red brick disc right, blue dots star up, background grass, camera left

Each clause becomes one token: the sum of the fixed random vectors of its words. The vectors come from a seed, so no
table is shipped, and words of different fields are nearly orthogonal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.95, 0.90, 0.15),
    "green": (0.15, 0.75, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.15, 0.25, 0.95),
    "purple": (0.65, 0.15, 0.85),
    "white": (0.97, 0.97, 0.97),
}
DIRECTIONS = {"still": (0.0, 0.0), "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SURFACES = ("gravel", "grass", "brick", "stripes", "dots", "checks")
BACKGROUNDS = ("gravel", "grass", "brick", "moon", "fur", "coffee", "portrait", "tissue", "stars", "garage")

MAX_OBJECTS = 3
OBJECT_WEIGHTS = (0.45, 0.35, 0.2)  # of one, two and three objects
CONTEXT_TOKENS = MAX_OBJECTS + 2
TEXT_DIM = 64
_TABLE_SEED = 20240217


@dataclass(frozen=True)
class ObjectWords:
    """One object. It moves in ``direction`` on the screen, whatever the camera does."""

    colour: str
    surface: str
    shape: str
    direction: str

    def __post_init__(self) -> None:
        vocabularies = (tuple(COLOURS), SURFACES, SHAPES, tuple(DIRECTIONS))
        for word, words in zip((self.colour, self.surface, self.shape, self.direction), vocabularies, strict=True):
            if word not in words:
                raise ValueError(f"unknown word {word!r}; expected one of {', '.join(words)}")


@dataclass(frozen=True)
class Prompt:
    """What a video shows: objects from near to far, the background's picture, the direction the camera pans to."""

    objects: tuple[ObjectWords, ...]
    background: str
    camera: str

    def __post_init__(self) -> None:
        if len(self.objects) > MAX_OBJECTS:
            raise ValueError(f"at most {MAX_OBJECTS} objects, got {len(self.objects)}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}; expected one of {', '.join(BACKGROUNDS)}")
        if self.camera not in DIRECTIONS:
            raise ValueError(f"unknown camera motion {self.camera!r}; expected one of {', '.join(DIRECTIONS)}")

    def __str__(self) -> str:
        clauses = [f"{o.colour} {o.surface} {o.shape} {o.direction}" for o in self.objects]
        return ", ".join([*clauses, f"background {self.background}", f"camera {self.camera}"])


def parse_prompt(text: str) -> Prompt:
    """Read the text form. Background and camera may be left out: gravel, still.

    >>> str(parse_prompt("red brick disc right, camera left"))
    'red brick disc right, background gravel, camera left'
    """
    objects: list[ObjectWords] = []
    background, camera = "gravel", "still"
    for clause in text.split(","):
        words = clause.split()
        if len(words) == 2 and words[0] == "background":
            background = words[1]
        elif len(words) == 2 and words[0] == "camera":
            camera = words[1]
        elif len(words) == 4:
            objects.append(ObjectWords(*words))
        else:
            raise ValueError(f"cannot read {clause.strip()!r}: an object is 'colour surface shape direction'")
    return Prompt(tuple(objects), background, camera)


def _choice(words: Sequence[str], generator: Generator) -> str:
    return words[int(torch.randint(len(words), (), generator=generator))]


def random_prompt(generator: Generator) -> Prompt:
    """A prompt of one to three objects of different colours, mostly few; every word of a field is equally likely."""
    count = 1 + int(torch.multinomial(torch.tensor(OBJECT_WEIGHTS), 1, generator=generator))
    colours = torch.randperm(len(COLOURS), generator=generator)[:count].tolist()
    objects = tuple(
        ObjectWords(
            colour=tuple(COLOURS)[colour],
            surface=_choice(SURFACES, generator),
            shape=_choice(SHAPES, generator),
            direction=_choice(tuple(DIRECTIONS), generator),
        )
        for colour in colours
    )
    return Prompt(objects, _choice(BACKGROUNDS, generator), _choice(tuple(DIRECTIONS), generator))


@functools.cache
def _word_table() -> dict[str, Tensor]:
    """A vector of length sqrt(TEXT_DIM) for every ``field:word``."""
    fields = {
        "colour": (*COLOURS,),
        "surface": SURFACES,
        "shape": SHAPES,
        "direction": (*DIRECTIONS,),
        "background": BACKGROUNDS,
        "camera": (*DIRECTIONS,),
        # where a clause stands: the depth order of the objects, and an object that is not there
        "place": ("0", "1", "2", "nothing"),
        "null": ("",),
    }
    names = [f"{field}:{word}" for field, words in fields.items() for word in words]
    generator = torch.Generator().manual_seed(_TABLE_SEED)
    vectors = torch.randn(len(names), TEXT_DIM, generator=generator)
    vectors = vectors * (math.sqrt(TEXT_DIM) / vectors.norm(dim=1, keepdim=True))
    return dict(zip(names, vectors, strict=True))


def _token(*names: str) -> Tensor:
    """The words' sum, scaled to keep a variance of one. Returns (TEXT_DIM,) float32."""
    table = _word_table()
    return torch.stack([table[name] for name in names]).sum(0) / math.sqrt(len(names))


def encode_prompt(words: Prompt | str | None) -> Tensor:
    """The condition of one video. ``None`` is the empty condition of classifier-free guidance.

    Returns:
        (CONTEXT_TOKENS, TEXT_DIM) float32: the objects from near to far, the background, the camera.
    """
    if words is None:
        return _token("null:").expand(CONTEXT_TOKENS, -1).clone()
    prompt = parse_prompt(words) if isinstance(words, str) else words
    tokens = [
        _token(
            f"place:{i}", f"colour:{o.colour}", f"surface:{o.surface}", f"shape:{o.shape}", f"direction:{o.direction}"
        )
        for i, o in enumerate(prompt.objects)
    ]
    tokens += [_token(f"place:{i}", "place:nothing") for i in range(len(tokens), MAX_OBJECTS)]
    tokens += [_token(f"background:{prompt.background}"), _token(f"camera:{prompt.camera}")]
    return torch.stack(tokens)
