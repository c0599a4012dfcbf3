"""What the offline door says when it cannot go on."""

from __future__ import annotations

__all__ = ["ExportError", "FileDamaged"]


class ExportError(ValueError):
    """A program, a file or a call that the offline door cannot use. Says which, what was given and what is valid."""


class FileDamaged(ExportError):
    """A file that is truncated or not as it was written."""
