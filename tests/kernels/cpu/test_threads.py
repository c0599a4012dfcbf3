"""The threads of the native code: calls at the same time, after a fork, and with more threads than before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from svg2_compile.kernels.cpu.native import build, calls
from svg2_compile.kernels.cpu.native import implementation as native

pytestmark = pytest.mark.skipif(build.native().library is None, reason=f"no native code: {build.native().detail}")

ORDER = torch.stack([torch.randperm(700, generator=torch.Generator().manual_seed(h)) for h in range(6)])[None].int()
TOKENS = torch.randn(1, 6, 700, 24, generator=torch.Generator().manual_seed(9))
EXPECTED = TOKENS.gather(2, ORDER.long()[..., None].expand_as(TOKENS))


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calls, "OPERATIONS_PER_THREAD", 1)  # small as they are, they take all threads
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def permuted() -> torch.Tensor:
    return native.permute_tokens(TOKENS, ORDER)


def test_calls_from_several_threads_do_not_touch_each_other() -> None:
    wrong: list[int] = []

    def call(number: int) -> None:
        if not all(torch.equal(permuted(), EXPECTED) for _ in range(50)):
            wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not wrong and not any(caller.is_alive() for caller in callers)


def test_more_threads_than_before() -> None:
    for threads in (2, 8, 3):
        torch.set_num_threads(threads)
        assert torch.equal(permuted(), EXPECTED)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own() -> None:
    """In a process of its own: what pytest and PyTorch have started is not to be forked. A child that waits for threads
    that it does not have is ended by its alarm."""
    script = (
        "import os, signal, sys, torch\n"
        "from tests.kernels.cpu import test_threads as here\n"
        "here.calls.OPERATIONS_PER_THREAD = 1\n"
        "torch.set_num_threads(4)\n"
        "assert torch.equal(here.permuted(), here.EXPECTED)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    right = here.EXPECTED.numpy().tobytes()\n"  # PyTorch's own threads do not survive a fork
        "    os._exit(0 if all(here.permuted().numpy().tobytes() == right for _ in range(20)) else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
