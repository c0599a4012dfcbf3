"""StaysDense: why an attention does not become sparse, raised where that is found."""

from __future__ import annotations

from typing import Any

__all__ = ["StaysDense"]


class StaysDense(Exception):
    """Why an attention stays dense, raised where that is found. numbers: fields of the Skip that are known by then."""

    def __init__(self, reason: str, detail: str, **numbers: Any) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.numbers = numbers
