"""The zoo table: every diffusers transformer of the tests, compiled with all clusters kept, against eager.

    python -m bench.zoo            JSON in bench/results/zoo.json

Per model: attentions found, attentions sparse, graphs, and the largest error relative to the largest value (float32).
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import svg2_compile
from bench.common import write_results
from tests.support import IDENTITY, first_output
from tests.zoo.models import ZOO, build


def row(name: str) -> dict[str, Any]:
    torch._dynamo.reset()
    module, inputs = build(name)
    with torch.no_grad():
        expected = first_output(module, inputs)
        with svg2_compile.enable(module, **IDENTITY) as enabled:
            actual = first_output(module, inputs)
            report = enabled.report()
    error = (actual - expected).abs().max() / expected.abs().max()
    return {
        "model": name,
        "class": type(module).__name__,
        "attentions": len(report.sites),
        "sparse": len(report.sparse_sites),
        "graphs": len(report.graphs),
        "relative_error": float(f"{error.item():.1e}"),
    }


def main() -> None:
    results = [row(name) for name in ZOO]
    table = Table(*results[0])
    for result in results:
        table.add_row(*(str(value) for value in result.values()))
    Console(width=120).print(table)
    print(write_results("zoo", results))


if __name__ == "__main__":
    main()
