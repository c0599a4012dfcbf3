"""The small video model: its language, its videos, its training and its sampling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("PIL")

from bench.minidit import stages, train
from bench.minidit.data import make_batch, make_video, shape_distance
from bench.minidit.export import export
from bench.minidit.optim import learning_rate_factor
from svg2_compile.minidit import model as minidit
from svg2_compile.minidit import prompts
from svg2_compile.minidit.model import VideoSize
from svg2_compile.minidit.pictures import contact_sheet, write_gif

SIZE = VideoSize(6, 32, 32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These matrices are too small to share: threads that wait for each other cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one layer, and a curriculum of its size."""
    monkeypatch.setitem(minidit.CONFIG, "num_layers", 1)
    choice = stages.Choice(VideoSize(2, 16, 16), 2)
    monkeypatch.setattr(train, "choice_at", lambda _step: choice)


def test_prompt_text_round_trip() -> None:
    for seed in range(20):
        prompt = prompts.random_prompt(_generator(seed))
        assert prompts.parse_prompt(str(prompt)) == prompt


@pytest.mark.parametrize("text", ["red brick disc", "red brick disc sideways", "background nowhere", "camera in"])
def test_unknown_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read|unknown"):
        prompts.parse_prompt(text)


def test_prompts_have_distinct_tokens() -> None:
    near = prompts.encode_prompt("red brick disc left, blue dots star up")
    assert near.shape == (prompts.CONTEXT_TOKENS, prompts.TEXT_DIM)
    assert not torch.equal(near, prompts.encode_prompt("blue dots star up, red brick disc left"))
    assert not torch.equal(near, prompts.encode_prompt("red brick disc left, blue dots star down"))
    assert not torch.equal(near, prompts.encode_prompt(None))


@pytest.mark.parametrize("shape", prompts.SHAPES)
def test_shape_outline(shape: str) -> None:
    """Negative on the shape, positive off it, and nowhere steeper than a distance."""
    axis = torch.linspace(-2, 2, 81)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = shape_distance(shape, x, y)
    assert (distance < 0).any() and (distance[0] > 0).all()
    assert float((distance[1:] - distance[:-1]).abs().max()) <= 0.05 + 1e-4


def _centre_of_red(video: Tensor) -> Tensor:
    """(frames, 2): where the redness of (3, frames, height, width) lies, as x and y in pixels."""
    red = (video[0] - torch.maximum(video[1], video[2]) - 0.4).clamp_min(0)
    y, x = torch.meshgrid(torch.arange(red.shape[1]), torch.arange(red.shape[2]), indexing="ij")
    return torch.stack([(red * x).sum((1, 2)), (red * y).sum((1, 2))], dim=1) / red.sum((1, 2)).clamp_min(1e-6)[:, None]


@pytest.mark.parametrize("direction", prompts.DIRECTIONS)
def test_objects_move_as_asked(direction: str) -> None:
    prompt = prompts.parse_prompt(f"red dots disc {direction}, background gravel, camera left")
    centre = _centre_of_red(make_video(prompt, SIZE, _generator(3)))
    moved = centre[-1] - centre[0]
    expected = torch.tensor(prompts.DIRECTIONS[direction])
    assert torch.equal((moved / 4).round().sign(), expected)


def test_batches_repeat_by_seed() -> None:
    videos, conditions = make_batch(3, SIZE, _generator(1))
    again, conditions_again = make_batch(3, SIZE, _generator(1))
    assert videos.shape == (3, 3, 6, 32, 32) and videos.abs().max() <= 1
    assert torch.equal(videos, again) and torch.equal(conditions, conditions_again)


def test_dropped_conditions_are_empty() -> None:
    _, conditions = make_batch(2, SIZE, _generator(), dropout=1.0)
    assert torch.equal(conditions[0], prompts.encode_prompt(None))


def test_curriculum_covers_every_step() -> None:
    ends = [0, stages.STAGES[0].steps - 1, stages.STAGES[0].steps, 10**9]
    assert [stages.stage_at(step) for step in ends] == [0, 0, 1, len(stages.STAGES) - 1]
    assert stages.choice_at(7) == stages.choice_at(7)


def test_learning_rate() -> None:
    assert learning_rate_factor(0, None, 0) < 0.05
    assert learning_rate_factor(5000, None, 0) == 1
    assert learning_rate_factor(5000, 5000, 100) == 1
    assert learning_rate_factor(5100, 5000, 100) == 0
    assert learning_rate_factor(5025, 5000, 100) == 0.5


def test_noise_levels() -> None:
    times = train.draw_times(4096, 2.5, _generator())
    assert times.min() > 0 and times.max() < 1
    assert 0.6 < times.mean() < 0.75  # a shift of 2.5 moves the middle from 0.5 to 0.71; some stay even
    assert torch.allclose(minidit.shifted(torch.tensor([0.0, 1.0]), 3.0), torch.tensor([0.0, 1.0]))


def test_coordinates_tell_places_apart() -> None:
    videos = torch.randn(2, 3, 4, 8, 12)
    taken = minidit.with_coordinates(videos)
    assert taken.shape == (2, minidit.CONFIG["in_channels"], 4, 8, 12) and torch.equal(taken[:, :3], videos)
    frames, rows, columns = taken[0, 3], taken[0, 6], taken[0, 9]
    assert torch.equal(frames[:, 0, 0], torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    assert torch.equal(rows[2], rows[0]) and torch.equal(columns[:, 3], columns[:, 0])
    assert (rows[0, :, 0].diff() > 0).all() and (columns[0, 0].diff() > 0).all()
    assert len(taken[0, 3:].flatten(1).T.unique(dim=0)) == 4 * 8 * 12


def test_scheduler_follows_the_training_noise_levels() -> None:
    scheduler = minidit.make_scheduler(4096)
    minidit.set_noise_levels(scheduler, 10)
    expected = minidit.shifted(torch.linspace(1, 0.1, 10), minidit.timestep_shift(4096))
    torch.testing.assert_close(scheduler.sigmas[:-1], expected)
    torch.testing.assert_close(scheduler.timesteps, expected * minidit.TIMESTEPS)


@pytest.mark.usefixtures("tiny")
def test_training_resumes_exactly(tmp_path: Path) -> None:
    """Two steps in one run and one step in each of two runs end at the same weights."""
    whole = train.Trainer(tmp_path, "cpu")
    whole.train_step()
    whole.train_step()
    first = train.Trainer(tmp_path, "cpu")
    first.train_step()
    first.save()
    second = train.Trainer(tmp_path, "cpu", seed=5)
    assert second.resume()
    second.train_step()
    assert second.step == whole.step == 2
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight)
        torch.testing.assert_close(second.average.weights[name], whole.average.weights[name])


@pytest.mark.usefixtures("tiny")
def test_training_finishes(tmp_path: Path) -> None:
    trainer = train.Trainer(tmp_path, "cpu")
    trainer.finish_within(2)
    train.run(trainer, None, 10)
    assert trainer.step == 2 and trainer.finished
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("tiny")
def test_export_and_sample(tmp_path: Path) -> None:
    trainer = train.Trainer(tmp_path, "cpu")
    trainer.train_step()
    trainer.save()
    weights = tmp_path / "weights.safetensors"
    assert export(tmp_path / "checkpoint.pt", weights) == weights.stat().st_size
    loaded = minidit.load_model(weights)
    video = minidit.sample_video(loaded, "red brick disc left", 0, frames=2, height=16, width=24, steps=2)
    assert video.shape == (3, 2, 16, 24) and video.isfinite().all()
    size = VideoSize(2, 16, 24)
    steps: list[int] = []
    scheduler = minidit.make_scheduler(size.tokens)
    again = minidit.sample_videos(
        loaded, ["red brick disc left"], [0], size, 2, scheduler=scheduler, after_step=steps.append
    )
    assert steps == [0, 1] and len(scheduler.timesteps) == 2
    assert torch.equal(video, again[0])
    assert contact_sheet(video[None], zoom=1).size == (48, 16)
    labelled = contact_sheet(torch.stack([video, video]), zoom=2, labels=["one", "other"])
    assert labelled.size == (96, 2 * (32 + 16))
    write_gif(torch.stack([video, -video]), tmp_path / "videos.gif", zoom=1, gap=2, labels=["one", "other"])
    with Image.open(tmp_path / "videos.gif") as gif:
        assert (gif.n_frames, gif.size) == (2, (52, 16 + 16))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_learns_a_little(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = train.Trainer(tmp_path, "cpu")
    losses = [trainer.train_step()["loss"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
