"""What enable composes with: caches, quantised weights and adapters of others, in every order, on small pipelines.

python -m bench.composing [--only WORD]

Each combination makes a video with what it is combined with alone, and with svg2_compile as well, all clusters kept, so
that both must be equal. Written to bench/results/composing.json, and as the table of docs/composing.md.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.metadata
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

import svg2_compile
from bench.common import RESULTS
from tests.e2e.pipelines import SmallPipeline, build
from tests.support import IDENTITY

OPTIONS = {**IDENTITY, "dense_steps": 1, "strict": False}
PACKAGES = ("torch", "diffusers", "peft", "torchao", "cache-dit", "accelerate")
PIPELINES = ("wan", "hunyuan", "ltx", "cogvideox")
Partner = Callable[[SmallPipeline], None]


def cache(small: SmallPipeline) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=1e-9, max_warmup_steps=1
    )
    cache_dit.enable_cache(small.pipe, cache_config=config)


def quantise(small: SmallPipeline) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(small.pipe.transformer, Int8WeightOnlyConfig())


def adapt(small: SmallPipeline) -> None:
    import peft

    lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        small.pipe.transformer.add_adapter(lora, adapter_name="only")


def fuse(small: SmallPipeline) -> None:
    adapt(small)
    small.pipe.transformer.fuse_lora()


PARTNERS: dict[str, tuple[Partner, ...]] = {
    "cache-dit DBCache": (cache,),
    "torchao int8 weights": (quantise,),
    "LoRA (peft)": (adapt,),
    "LoRA (peft), fused": (fuse,),
    "LoRA, then cache-dit": (adapt, cache),
    "int8 weights, then cache-dit": (quantise, cache),
    "LoRA, then int8 weights": (adapt, quantise),
}


def combinations() -> Iterator[tuple[str, str, str, bool]]:
    for pipeline in PIPELINES:
        for partner in PARTNERS:
            for order in ("before enable", "after enable"):
                for regional in (False, True):
                    yield pipeline, partner, order, regional


def try_together(pipeline: str, partner: str, order: str, regional: bool) -> dict[str, Any]:
    """One combination: largest relative difference, what ran sparse, and whether centroids were carried on."""
    torch._dynamo.reset()
    alone, both = build(pipeline), build(pipeline)
    steps: tuple[Callable[[], Any], ...] = tuple(functools.partial(apply, both) for apply in PARTNERS[partner])
    for apply in PARTNERS[partner]:
        apply(alone)
    expected = alone.run()
    begin = functools.partial(svg2_compile.enable, both.pipe, regional=regional, **OPTIONS)
    if order == "before enable":
        for step in steps:
            step()
        enabled = begin()
    else:
        enabled = begin()
        for step in steps:
            step()
    try:
        out = both.run()
        report = enabled.report()
    finally:
        enabled.disable()
    runs = [run for run in report.runs if run.graph == "sparse"]
    cold = collections.Counter((run.site, run.branch) for run in runs if not run.seeded)
    return {
        "error": ((out - expected).abs().max() / expected.abs().max()).item(),
        "sparse": len(runs),
        "carried": set(cold.values()) <= {1},
        "notes": report.notes,
    }


def table(results: dict[str, Any], versions: dict[str, str]) -> str:
    """The rows of docs/composing.md: one for a pipeline and a partner, both orders, whole and regional."""
    lines = [
        ", ".join(f"{package} {version}" for package, version in versions.items()) + ".",
        "",
        "| pipeline | with | before `enable` | after | sparse attentions | centroids carried on |",
        "|---|---|---|---|---|---|",
    ]
    for pipeline in PIPELINES:
        for partner in PARTNERS:
            found = {
                order: [
                    results[name]
                    for kind in ("whole", "regional")
                    if (name := f"{pipeline} | {partner} | {order} | {kind}") in results
                ]
                for order in ("before enable", "after enable")
            }
            tried = [result for group in found.values() for result in group]
            if tried:
                cells = [" / ".join(map(_outcome, group)) or "not tried" for group in found.values()]
                sparse = " / ".join(str(result.get("sparse", "-")) for result in found["before enable"])
                carried = "yes" if all(result.get("carried") for result in tried) else "no"
                lines.append(f"| {pipeline} | {partner} | {cells[0]} | {cells[1]} | {sparse} | {carried} |")
    return "\n".join(lines)


def _outcome(result: dict[str, Any]) -> str:
    return result["failed"] if "failed" in result else f"{result['error']:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="combinations whose description has this")
    parser.add_argument("--table", action="store_true", help="print the table of what was tried, and nothing else")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(**json.loads((RESULTS / "composing.json").read_text(encoding="utf-8"))))
        return
    only = arguments.only
    logging.getLogger("svg2_compile").setLevel(logging.ERROR)
    path = RESULTS / "composing.json"
    known = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}
    for combination in combinations():
        name = " | ".join([*combination[:3], "regional" if combination[3] else "whole"])
        if only not in name:
            continue
        try:
            known[name] = try_together(*combination)
        except Exception as error:  # noqa: BLE001  (what fails is a result)
            known[name] = {
                "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            }
            traceback.print_exc()
        print(name, known[name], flush=True)
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        path.write_text(json.dumps({"versions": versions, "results": known}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
