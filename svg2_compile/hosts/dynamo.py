"""Dynamo's settings while an enabled model runs."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["enabled_dynamo_settings"]


def enabled_dynamo_settings() -> Any:
    """Dynamo's settings while an enabled model runs, as a context manager.

    Some models pick the valid text tokens by a mask (nonzero); without the first setting they fall into eager pieces
    whose attention no compiler sees. Every call of enable or explain adds a cache entry to the forward of a class:
    with the default limit of 8 a long-lived process would silently fall back to eager.
    """
    limit = max(64, torch._dynamo.config.recompile_limit)
    return torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, recompile_limit=limit)
