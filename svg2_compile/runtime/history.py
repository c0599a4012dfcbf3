"""What ran: one record for every call of a compiled graph, bounded, readable as objects and as JSON lines."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from svg2_compile.passes.error_guard import density_of_budget
from svg2_compile.reporting.records import SiteRecord
from svg2_compile.runtime.standing import Standing

__all__ = ["CallRecord", "Measured", "RunHistory", "qualified"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a sparse call tells of one attention. Tensors stay on their device until somebody reads them.

    densities: selected pairs [B, H]. asked: the density that was to be met, None where a mass decides; budget []: what
    it followed from instead, where there is a target. errors [B, H] and error []: of a few rows.
    """

    densities: torch.Tensor | None = None
    asked: float | None = None
    budget: torch.Tensor | None = None
    errors: torch.Tensor | None = None
    error: torch.Tensor | None = None

    def as_fields(self) -> dict[str, Any]:
        """The fields of a SiteRecord; reads from the device."""
        mean = None if self.densities is None or not self.densities.numel() else float(self.densities.mean())
        return {
            "density": mean,
            "density_per_head": _rows(self.densities),
            "density_asked": self.asked if self.budget is None else density_of_budget(float(self.budget)),
            "error": None if self.error is None else float(self.error),
            "error_per_head": _rows(self.errors),
        }


def _rows(tensor: torch.Tensor | None) -> tuple[tuple[float, ...], ...] | None:
    return None if tensor is None else tuple(tuple(row) for row in tensor.tolist())


@dataclass
class CallRecord:
    """One call of a graph. measured: by attention; empty where dense."""

    sites: tuple[str, ...]
    standing: Standing | None
    layer: int
    graph: str
    reason: str
    iters: int
    seeded: bool
    measured: Mapping[str, Measured] = field(default_factory=dict)
    label: str = ""

    def site_records(self) -> Iterator[SiteRecord]:
        for site in self.sites:
            measured = self.measured.get(site)
            found: dict[str, Any] = measured.as_fields() if measured is not None else {"density": None}
            if self.graph == "dense":
                found["density"] = 1.0
            standing = self.standing
            yield SiteRecord(
                site=qualified(self.label, site),
                video=standing.video if standing else 0,
                step=standing.step if standing else 0,
                context=standing.context if standing else 0,
                layer=self.layer,
                graph=self.graph,
                reason=self.reason,
                iters=self.iters,
                seeded=self.seeded,
                request=standing.request if standing else "",
                branch=str(standing.branch) if standing else "",
                source=standing.source if standing else "",
                **found,
            )


def qualified(label: str, site: str) -> str:
    """The path of an attention whose layer was compiled alone: "blocks.3" and "attn1" make "blocks.3.attn1"."""
    return f"{label}.{site}" if label and not f"{site}.".startswith(f"{label}.") else site


class RunHistory:
    """The latest calls, oldest first.

    Args:
        limit: most attentions remembered. Each keeps tensors of some hundred bytes on the device.
    """

    def __init__(self, limit: int = 50_000) -> None:
        self._limit = limit
        self._attentions = 0
        self._calls: deque[CallRecord] = deque()
        self._lock = threading.Lock()

    def append(self, record: CallRecord) -> None:
        with self._lock:
            self._calls.append(record)
            self._attentions += len(record.sites)
            while self._attentions > self._limit and len(self._calls) > 1:
                self._attentions -= len(self._calls.popleft().sites)

    def clear(self) -> None:
        self._calls.clear()
        self._attentions = 0

    def calls(self) -> list[CallRecord]:
        return list(self._calls)

    def site_records(self) -> list[SiteRecord]:
        """One record per attention and call. Reads what was measured from the device."""
        return [record for call in self._calls for record in call.site_records()]
