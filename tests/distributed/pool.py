"""A pool of processes that are the ranks of one gloo group, for several checks one after the other.

with RankPool(2) as pool:
    results = pool.run(function, argument)        # function(argument) on every rank; results by rank
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

SECONDS = 300
"""A check that takes longer hangs."""


class RankFailed(AssertionError):
    """A check failed on a rank; what it said there."""


class RankPool:
    """Processes 0 to size - 1, with torch.distributed initialised among them."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        pairs = [context.Pipe() for _ in range(size)]
        self._ends = [mine for mine, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on every rank. Raises RankFailed with what the failing ranks said."""
        for end in self._ends:
            end.send((function, args))
        answers = [end.recv() if end.poll(SECONDS) else ("failed", f"no answer in {SECONDS} s") for end in self._ends]
        failed = [f"rank {rank}: {said}" for rank, (how, said) in enumerate(answers) if how == "failed"]
        if failed:
            raise RankFailed("\n".join(failed))
        return [said for _, said in answers]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(rank: int, size: int, store: str, end: Connection) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=SECONDS)
    )
    # Diffusers divides by the number of accelerators, and there is none.
    torch.accelerator.device_count = lambda: size
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            break
        try:
            end.send(("done", function(*args)))
        except Exception:  # noqa: BLE001  (told to who asked)
            end.send(("failed", traceback.format_exc()))
        torch._dynamo.reset()
    dist.destroy_process_group()
