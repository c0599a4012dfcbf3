"""What ran: one record for every call of a compiled graph, bounded, readable as objects and as JSON lines."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from svg2_compile.reporting.records import SiteRecord
from svg2_compile.runtime.standing import Standing

__all__ = ["CallRecord", "RunHistory", "qualified"]


@dataclass
class CallRecord:
    """One call of a graph. Densities stay on their device until somebody reads them. asked: the density that was to be
    met; None where a mass decides, and where dense."""

    sites: tuple[str, ...]
    standing: Standing | None
    layer: int
    graph: str
    reason: str
    iters: int
    seeded: bool
    densities: Mapping[str, torch.Tensor] = field(default_factory=dict)
    label: str = ""
    asked: float | None = None

    def site_records(self) -> Iterator[SiteRecord]:
        for site in self.sites:
            tensor = self.densities.get(site)
            per_head = None if tensor is None else tuple(tuple(row) for row in tensor.tolist())
            density: float | None = 1.0 if self.graph == "dense" else None
            if tensor is not None and tensor.numel():
                density = float(tensor.mean())
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
                density=density,
                density_per_head=per_head,
                density_asked=self.asked,
                request=standing.request if standing else "",
                branch=str(standing.branch) if standing else "",
                source=standing.source if standing else "",
            )


def qualified(label: str, site: str) -> str:
    """The path of an attention whose layer was compiled alone: "blocks.3" and "attn1" make "blocks.3.attn1"."""
    return f"{label}.{site}" if label and not f"{site}.".startswith(f"{label}.") else site


class RunHistory:
    """The latest calls, oldest first.

    Args:
        limit: most attentions remembered. Each keeps a tensor of some hundred bytes on the device.
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
        """One record per attention and call. Reads densities from the device."""
        return [record for call in self._calls for record in call.site_records()]
