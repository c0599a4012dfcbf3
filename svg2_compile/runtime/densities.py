"""The density of a call: one for all, or that of its step by a schedule."""

from __future__ import annotations

from svg2_compile.logs.logger import Once
from svg2_compile.runtime.dense_rules import ASSUMED_STEPS, dense_step_count
from svg2_compile.runtime.standing import Standing
from svg2_compile.settings.config import Svg2Config

__all__ = ["density_of_step"]


def density_of_step(
    config: Svg2Config, standing: Standing | None, first_sparse_step: int | None, once: Once
) -> float | None:
    """The density of the step where a call stands; None where a mass decides instead.

    first_sparse_step: of the video, from which a schedule counts; None where no step is known, which takes its mean.
    """
    schedule = config.density_schedule()
    if schedule is None:
        return config.selection()[1]
    if standing is None or first_sparse_step is None:
        once.warning("no_step_of_schedule", "no step is known: density=%s is taken at its mean.", config.density)
        return schedule.mean
    num_steps = standing.num_steps or standing.estimated_steps
    if num_steps is None:
        num_steps = ASSUMED_STEPS
        if schedule.is_ramp:
            once.warning(
                "unknown_ramp",
                "the length of the schedule is unknown: density=%s falls over %d steps. "
                "svg2_compile.denoising(num_steps=...) or svg2_compile.enable(pipe) tells it; a list of densities "
                "needs none.",
                *(config.density, num_steps),
            )
    count = num_steps - dense_step_count(config.dense_last_steps, num_steps) - first_sparse_step
    return schedule.at(standing.step - first_sparse_step, count)
