"""Both clocks: steps, guidance branches, videos."""

from __future__ import annotations

import pytest

from svg2_compile.runtime.clock import MAX_CONTEXTS, SchedulerClock, TimeReading, TimestepClock, dense_step_count


class Layer:
    """Stands for the weights of a call."""


def _timestep(value: float) -> TimeReading:
    return TimeReading("timestep", (value,))


def _modulation(*values: float) -> TimeReading:
    return TimeReading("modulation", values)


def _ticks(clock, layer, readings):
    return [(t.video, t.step, t.context) for t in (clock.tick(layer, reading) for reading in readings)]


def test_a_new_timestep_is_a_step_and_the_same_one_a_guidance_branch():
    readings = [_timestep(value) for value in (1000, 1000, 750, 750, 500, 500)]
    assert _ticks(TimestepClock(), Layer(), readings) == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", [(1000, 750, 500), (0.0, 0.3, 0.6)], ids=["descending", "ascending"])
def test_a_timestep_that_goes_back_begins_a_video(schedule):
    readings = [_timestep(value) for value in (*schedule, schedule[0], schedule[1])]
    assert _ticks(TimestepClock(), Layer(), readings) == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0)]


def test_an_interrupted_video_is_followed_by_a_clean_one():
    readings = [_timestep(value) for value in (1000, 900, 1000, 900, 800)]
    assert _ticks(TimestepClock(), Layer(), readings)[2:] == [(1, 0, 0), (1, 1, 0), (1, 2, 0)]


def test_modulation_tensors_count_steps_and_notice_the_first_step_again():
    readings = [_modulation(value, -value) for value in (1.0, 1.0, 2.0, 2.0, 1.0, 1.0)]
    assert _ticks(TimestepClock(), Layer(), readings) == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)
    ]  # fmt: skip


def test_layers_that_share_a_graph_are_counted_apart():
    clock, first, second = TimestepClock(), Layer(), Layer()
    assert _ticks(clock, first, [_timestep(9.0), _timestep(8.0)]) == [(0, 0, 0), (0, 1, 0)]
    assert _ticks(clock, second, [_timestep(9.0)]) == [(0, 0, 0)]


def test_repeated_calls_at_one_timestep_do_not_pile_up_contexts():
    ticks = _ticks(TimestepClock(), Layer(), [_timestep(500)] * (2 * MAX_CONTEXTS + 1))
    assert max(context for _, _, context in ticks) == MAX_CONTEXTS - 1
    assert ticks[MAX_CONTEXTS] == (1, 0, 0)


def test_no_reading_is_no_tick():
    assert TimestepClock().tick(Layer(), TimeReading("timestep", ())) is None
    assert TimestepClock().tick(Layer(), None) is None


def test_progress_is_a_fraction_of_the_timestep_range():
    clock, layer = TimestepClock(), Layer()
    progress = [clock.tick(layer, _timestep(value)).progress for value in (1000, 900, 250)]
    assert progress == pytest.approx([0.0, 0.1, 0.75])
    unit = TimestepClock()
    assert [unit.tick(layer, _timestep(value)).progress for value in (1.0, 0.4)] == pytest.approx([0.0, 0.6])


def test_forget_lets_the_next_call_begin_a_video():
    clock, layer = TimestepClock(), Layer()
    _ticks(clock, layer, [_timestep(1000), _timestep(900)])
    clock.forget(layer)
    assert clock.tick(layer, _timestep(900)).step == 0


def test_scheduler_clock_counts_what_it_is_told():
    clock, layer, other = SchedulerClock(), Layer(), Layer()
    clock.begin_video(4)
    first = [clock.tick(layer, None) for _ in range(2)]
    assert [(t.step, t.context, t.num_steps) for t in first] == [(0, 0, 4), (0, 1, 4)]
    assert clock.tick(other, None).context == 0
    clock.end_step()
    assert (clock.tick(layer, None).step, clock.tick(layer, None).context) == (1, 1)
    clock.begin_video(8)
    tick = clock.tick(layer, None)
    assert (tick.video, tick.step, tick.context, tick.num_steps) == (2, 0, 0, 8)


@pytest.mark.parametrize(
    ("dense_steps", "num_steps", "expected"), [(3, 50, 3), (0.2, 50, 10), (0.2, 4, 1), (0.0, 50, 0), (0.3, 10, 3)]
)
def test_dense_step_count(dense_steps, num_steps, expected):
    assert dense_step_count(dense_steps, num_steps) == expected
