"""Requests from what is said and from timesteps: interleaved, aborted, back again; and how many steps will run."""

from __future__ import annotations

from typing import Any

import pytest

from svg2_compile.runtime.request import estimated_steps
from svg2_compile.runtime.requests import Requests
from svg2_compile.runtime.standing import Said
from svg2_compile.runtime.time_reader import TimeReading


class Caller:
    """Calls one model and notes where the calls stand: (video, step, branch)."""

    def __init__(self) -> None:
        self.requests = Requests(self.over)
        self.closed: list[int] = []

    def over(self, request: Any) -> None:
        self.closed.append(request.video)

    def __call__(
        self, *values: float, kind: str = "timestep", who: Any = "model", branch: Any = None, **said: Any
    ) -> tuple[int, int, Any]:
        found = self.requests.locate(Said(**said), None, lambda: TimeReading(kind, values), who)
        assert found is not None
        request, _ = found
        return request.video, request.step, request.branch(who, branch)

    def standing(self, value: float, **said: Any) -> Any:
        found = self.requests.locate(Said(**said), None, lambda: TimeReading("timestep", (value,)), "model")
        assert found is not None
        return found[0].standing(found[0].branch("model", None), found[1])


def test_one_loop_with_guidance() -> None:
    call = Caller()
    told = [call(t) for t in (999, 999, 800, 800, 600, 600)]
    assert told == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1)]


@pytest.mark.parametrize("timesteps", [(999, 500, 20), (0.0, 0.4, 0.9)], ids=["falling", "rising"])
def test_a_second_video_opens_another_request(timesteps: tuple[float, ...]) -> None:
    call = Caller()
    for video in range(3):
        assert [call(t)[:2] for t in timesteps] == [(video, step) for step in range(3)]
    assert call.closed == [0, 1]  # each when the next one has made its steps


def test_two_loops_take_turns() -> None:
    """Continuous batching: the second joins when the first is in its third step."""
    call = Caller()
    schedule = [999, 950, 900, 850, 800, 750, 700]
    first, second = [], []
    for turn in range(9):
        if turn < 7:
            first.append(call(schedule[turn])[:2])
        if turn >= 2:
            second.append(call(schedule[turn - 2])[:2])
    assert first == [(0, step) for step in range(7)]
    assert second == [(1, step) for step in range(7)]
    assert call.closed == [0]  # it ended, and the other went on


def test_three_loops_of_different_lengths_take_turns() -> None:
    call = Caller()
    schedules = [[1000 - 1000 * k / n - shift for k in range(n)] for n, shift in ((8, 0.0), (10, 3.0), (12, 7.0))]
    told: list[list[tuple[int, int]]] = [[], [], []]
    for turn in range(16):
        for number, schedule in enumerate(schedules):
            if 0 <= turn - number < len(schedule):
                told[number].append(call(schedule[turn - number])[:2])
    assert told == [[(number, step) for step in range(n)] for number, n in enumerate((8, 10, 12))]


def test_many_windows_in_a_step_are_branches() -> None:
    call = Caller()
    for step, t in enumerate((999, 800, 600)):
        assert [call(t) for _ in range(20)] == [(0, step, window) for window in range(20)]


def test_a_branch_that_is_left_out_in_some_steps() -> None:
    call = Caller()
    for step, (t, names) in enumerate([(999, ("u", "c")), (800, ("c",)), (600, ("c",)), (400, ("u", "c"))]):
        assert [call(t, branch=name) for name in names] == [(0, step, (name, 0)) for name in names]


def test_a_single_call_before_a_video_is_none_of_it() -> None:
    call = Caller()
    assert call(500)[:2] == (0, 0)
    assert call(999)[:2] == (0, 1)  # as of a rising schedule, until it falls
    assert [call(t)[:2] for t in (950, 900)] == [(1, 1), (1, 2)]
    assert call.closed == [0]


def test_layers_of_one_graph_count_their_calls_each() -> None:
    call = Caller()
    for step, values in enumerate(((1.0, 2.0), (3.0, -1.0), (0.5, 7.0))):
        for branch in range(2):
            for layer in range(3):
                assert call(*values, kind="modulation", who=layer) == (0, step, branch)
    # What was there before in this video begins another.
    assert call(1.0, 2.0, kind="modulation", who=0) == (1, 0, 0)


def test_what_is_said_comes_first() -> None:
    call = Caller()
    assert call(999, request="a", step=3)[:2] == (0, 3)
    assert call(999, request="b", step=0)[:2] == (1, 0)
    assert call(999, request="a", step=4)[:2] == (0, 4)
    assert call(999, request="a", step=4)[:2] == (0, 4)
    assert call.closed == []
    assert call(999, request="a", step=0)[:2] == (2, 0)
    assert call.closed == [0]


def test_a_request_that_is_said_without_a_step_reads_the_timestep() -> None:
    call = Caller()
    told = [call(t, request=name)[:2] for t in (999, 800, 600) for name in "ab"]
    assert told == [(number, step) for step in range(3) for number in range(2)]
    assert call(999, request="a")[:2] == (2, 0)
    assert call.closed == [0]


def test_nothing_that_tells() -> None:
    requests = Requests(Caller().over)
    assert requests.locate(Said(), None, lambda: TimeReading("timestep", ()), "model") is None


def _shifted(num_steps: int, shift: float) -> list[float]:
    levels = [1 - k / num_steps for k in range(num_steps)]
    return [1000 * shift * u / (1 + (shift - 1) * u) for u in levels]


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [4, 8, 20, 50])
def test_the_number_of_steps_follows_from_the_first_three(num_steps: int, shift: float) -> None:
    assert estimated_steps(_shifted(num_steps, shift)[:3]) == num_steps
    assert estimated_steps([value / 1000 for value in _shifted(num_steps, shift)][:3]) == num_steps


@pytest.mark.parametrize("timesteps", [[999.0, 900.0], [500.0, 400.0, 300.0], [999.0, 999.0, 900.0], [0.0, 0.1, 0.2]])
def test_what_is_no_flow_schedule_from_its_beginning_is_not_estimated(timesteps: list[float]) -> None:
    assert estimated_steps(timesteps) is None


def test_progress_and_timestep_of_a_standing() -> None:
    call = Caller()
    assert (call.standing(1000).progress, call.standing(750).progress) == (0.0, 0.25)
    standing = call.standing(500)
    assert (standing.timestep, standing.estimated_steps, standing.num_steps) == (500, 4, None)
    said = call.standing(1000, request="x", num_steps=9)
    assert (said.num_steps, said.request, said.is_last) == (9, "x", False)
