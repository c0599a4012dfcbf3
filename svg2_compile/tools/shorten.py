"""A model with its repeated blocks cut to a few, traced in their stead, and a report of the whole from that of the few.

    blocks.0 ... blocks.39, all equal  ->  blocks.0 to blocks.2 are traced; blocks.3 to blocks.39 are as blocks.2

Tracing takes time for every layer, and equal layers are decided alike.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from svg2_compile.passes.sites import dense_layer_count, dense_layer_detail
from svg2_compile.reporting.records import SiteReport

__all__ = ["KEPT", "leave_first_layers_dense", "shortened", "with_all_blocks"]

# The first block may be fed differently from the others, and the last may feed something else.
KEPT = 3


@contextlib.contextmanager
def shortened(module: nn.Module) -> Iterator[dict[str, int]]:
    """Cuts every list of more than KEPT equal blocks to KEPT while inside; yields path -> number of blocks.

    Equal are blocks of one class whose tensors, submodules and plain attributes are equal, values of tensors apart.
    """
    lists = [
        (parent, name, f"{path}.{name}".lstrip("."), child)
        for path, parent in module.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > KEPT
    ]
    outermost = [item for item in lists if not any(item[2].startswith(f"{other[2]}.") for other in lists)]
    cut: dict[str, int] = {}
    undo = []
    try:
        for parent, name, path, blocks in outermost:
            if len({_facts(block) for block in blocks}) == 1:
                undo.append((parent, name, blocks))
                setattr(parent, name, blocks[:KEPT])
                cut[path] = len(blocks)
        yield cut
    finally:
        for parent, name, blocks in undo:
            setattr(parent, name, blocks)


def _facts(block: nn.Module) -> Any:
    """What makes blocks equal, hashable."""
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
    ]
    plain = [(path, type(child), _plain_attributes(child)) for path, child in block.named_modules()]
    return tuple(tensors), tuple(plain)


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    kinds = (bool, int, float, str, torch.dtype, type(None))
    return tuple((name, value) for name, value in sorted(vars(module).items()) if isinstance(value, kinds))


def with_all_blocks(sites: Sequence[SiteReport], cut: Mapping[str, int]) -> list[SiteReport]:
    """The attentions of the whole model: those of the last block that was traced stand for all that follow it."""
    result: list[SiteReport] = []
    position = 0
    while position < len(sites):
        path = next((path for path in cut if _is_last(sites[position], path)), None)
        end = position + 1
        if path is None:
            result.append(sites[position])
        else:
            while end < len(sites) and _is_last(sites[end], path):
                end += 1
            for number in range(KEPT - 1, cut[path]):
                result += [_renamed(site, path, number) for site in sites[position:end]]
        position = end
    return _numbered(result)


def _is_last(site: SiteReport, path: str) -> bool:
    return re.search(rf"(^|\.){re.escape(path)}\.{KEPT - 1}(\.|#|$)", site.name) is not None


def _renamed(site: SiteReport, path: str, number: int) -> SiteReport:
    return replace(site, name=site.name.replace(f"{path}.{KEPT - 1}", f"{path}.{number}", 1))


def leave_first_layers_dense(sites: Sequence[SiteReport], dense_layers: int | float) -> list[SiteReport]:
    """As decide_sites does it with the sites of a whole model."""
    sparse = [site for site in sites if site.decision == "sparse"]
    count = dense_layer_count(dense_layers, len(sparse))
    first = {id(site) for site in sparse[:count]}
    detail = dense_layer_detail(count, dense_layers)
    return _numbered([site.left_dense(detail) if id(site) in first else site for site in sites])


def _numbered(sites: Sequence[SiteReport]) -> list[SiteReport]:
    """Sparse attentions count from 0."""
    result: list[SiteReport] = []
    index = 0
    for site in sites:
        sparse = site.decision == "sparse"
        result.append(replace(site, index=index) if sparse else site)
        index += sparse
    return result
