"""What a caller says of its calls: nested, checked, and never heard by another thread or coroutine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import svg2_compile
from svg2_compile.runtime.standing import Said, branch_named, said_now


def test_contexts_nest_and_are_left() -> None:
    assert said_now() == Said()
    with svg2_compile.denoising(request="a", num_steps=50):
        with svg2_compile.denoising(step=7, branch="cond"):
            assert said_now() == Said("a", 7, 50, "cond")
            with svg2_compile.denoising(branch="uncond"):
                assert said_now() == Said("a", 7, 50, "uncond")
        assert said_now() == Said("a", None, 50, None)
    assert said_now() == Said()


def test_another_request_starts_anew() -> None:
    with svg2_compile.denoising(request="a", step=7, num_steps=50), svg2_compile.denoising(request="b"):
        assert said_now() == Said("b")


def test_an_error_leaves_the_context() -> None:
    with pytest.raises(RuntimeError), svg2_compile.denoising(step=1):
        raise RuntimeError
    assert said_now() == Said()


def test_the_caller_names_branches_before_a_cache_does() -> None:
    with branch_named("cond"):
        assert said_now().branch == "cond"
    with svg2_compile.denoising(branch="window 3"), branch_named("cond"):
        assert said_now().branch == "window 3"


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"step": -1}, ValueError, "step is -1. Valid: an integer of at least 0"),
        ({"step": 1.5}, TypeError, "step is 1.5"),
        ({"step": True}, TypeError, "step is True"),
        ({"num_steps": 0}, ValueError, "num_steps is 0"),
        ({"step": 4, "num_steps": 4}, ValueError, "step is 4 of num_steps=4. Valid: 0 to num_steps - 1"),
        ({"request": []}, TypeError, "request is []. Valid: anything hashable"),
        ({"branch": {}}, TypeError, "branch is {}"),
    ],
)
def test_what_cannot_be_is_refused(said: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("[", r"\[").replace("{", r"\{")), svg2_compile.denoising(**said):
        pass
    assert said_now() == Said()


def test_threads_do_not_hear_each_other() -> None:
    heard: dict[str, Any] = {}
    inside, looked = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        heard["before"] = said_now()
        with svg2_compile.denoising(request="b", step=2):
            heard["within"] = said_now()
            looked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with svg2_compile.denoising(request="a", step=1):
        inside.set()
        assert looked.wait(10)
        assert said_now() == Said("a", 1)
    thread.join()
    assert heard == {"before": Said(), "within": Said("b", 2)}


def test_coroutines_do_not_hear_each_other() -> None:
    async def loop(name: str) -> list[Said]:
        heard = []
        for step in range(3):
            with svg2_compile.denoising(request=name, step=step):
                await asyncio.sleep(0)
                heard.append(said_now())
        return heard

    async def both() -> list[list[Said]]:
        return list(await asyncio.gather(loop("a"), loop("b")))

    for name, heard in zip("ab", asyncio.run(both()), strict=True):
        assert heard == [Said(name, step) for step in range(3)]
