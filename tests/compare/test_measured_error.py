"""Measured errors in a comparison: in its numbers, its text and its page."""

from __future__ import annotations

import pytest

from svg2_compile.compare.paired import compare_subject
from svg2_compile.compare.subjects import Subject
from tests.support import SELECTION

DENSE_STEPS = 2


@pytest.fixture(scope="module")
def measured(subject: Subject):
    return compare_subject(subject, **{**SELECTION, "dense_steps": DENSE_STEPS, "measure_error": True})


def test_errors_by_step_are_those_of_the_report(measured):
    errors = measured.error_per_step()
    assert errors is not None and len(errors) == measured.density.num_steps
    assert errors[:DENSE_STEPS] == [0.0] * DENSE_STEPS
    reported = {int(step.name): step.error for step in measured.report.by_step()}
    assert {step: error for step, error in enumerate(errors) if error} == reported
    assert measured.worst_error == max(run.error for run in measured.report.runs if run.error is not None)
    assert measured.to_dict()["error_per_step"] == errors


def test_text_and_page_show_them(measured, tmp_path):
    assert f"at most {measured.worst_error:.2%}, measured" in str(measured)
    page = measured.write_html(tmp_path / "report.html").read_text()
    assert "Measured error of the output per step" in page


def test_nothing_is_shown_that_was_not_measured(comparison, page):
    assert comparison.error_per_step() is None and comparison.worst_error is None
    assert "measured" not in str(comparison) and "Measured error" not in page.read_text()
