"""Model code of public repositories, tried as it is: which attentions become sparse, at three sizes, and how exactly.

    git clone https://github.com/Wan-Video/Wan2.1 checkouts/Wan2.1 ...
    python -m bench.models checkouts > docs/models.md

Every model is small, with random weights, and runs with all clusters kept, so that its result must be that of dense
attention. Whole and regional are enabled models. Nothing of a repository is kept here but the names that build its
model. Its own requirements must be installed, or the line says what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.checkouts.recipes import RECIPES

SIZES = ((5, 16, 24), (3, 24, 32), (2, 16, 20))
OPTIONS: dict[str, Any] = {
    "min_tokens": 0,
    "dense_steps": 0,
    "dense_layers": 0,
    "top_p": 1.0,
    "inner_backend": "eager",
}


def try_one(name: str, checkout: Path, regional: bool) -> dict[str, Any]:
    """What happens to the attentions of one repository."""
    import svg2_compile

    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: 0  # default arguments of some text encoders
    recipe = RECIPES[name]
    torch.manual_seed(0)
    module = recipe.prepare(checkout)()
    errors, ran = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
        references = []
        for size in SIZES:
            torch.manual_seed(1)
            args, kwargs = recipe.inputs(*size)
            references.append(module(*args, **kwargs))
        with svg2_compile.enable(module, regional=regional, **OPTIONS) as enabled:
            for size, expected in zip(SIZES, references, strict=True):
                torch.manual_seed(1)
                args, kwargs = recipe.inputs(*size)
                before = len(enabled.report().runs)
                errors.append(_error(module(*args, **kwargs), expected))
                runs = enabled.report().runs[before:]
                ran.append(sum(run.graph == "sparse" for run in runs))
            sites = enabled.report().sites
    dense = Counter(site.reason for site in sites if site.decision == "dense")
    return {"sparse": ran, "error": max(errors), "dense": sorted(dense)}


def _error(actual: Any, expected: Any) -> float:
    pairs = [(a, b) for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True) if isinstance(a, Tensor)]
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-9)) for a, b in pairs)


def version_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h, %cs"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def in_a_process(name: str, checkout: Path, regional: bool) -> dict[str, Any]:
    """Repositories replace each other's modules: each has a process of its own."""
    command = [sys.executable, "-m", "bench.models", str(checkout.parent.resolve()), "--only", name]
    command += ["--regional"] if regional else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    with contextlib.suppress(json.JSONDecodeError, IndexError):
        return dict(json.loads(done.stdout.splitlines()[-1]))
    return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def page(folder: Path) -> str:
    """docs/models.md."""
    sizes = ", ".join("x".join(map(str, size)) for size in SIZES)
    lines = [
        "# Model code that was tried",
        "",
        "Public model code outside diffusers, as it is, with small configurations and random weights on a CPU, by "
        "`python -m bench.models CHECKOUTS` (which says how every model is built). All clusters are kept, so that the "
        "result must be that of dense attention: the error is the largest difference, relative to the largest value.",
        "",
        f"Sparse: attentions that ran sparse in one call at each of three latent sizes ({sizes}).",
        "",
        "| repository | version | enabled | sparse | error | stays dense | as tried |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, recipe in RECIPES.items():
        checkout = folder / (recipe.folder or name)
        if not checkout.is_dir():
            lines.append(f"| [{name}]({recipe.url}) | - | - | no checkout | - | - | {recipe.note} |")
            continue
        for regional in (False, True):
            found = in_a_process(name, checkout, regional)
            kind = "regional" if regional else "whole"
            result = (
                f"{' / '.join(map(str, found['sparse']))} | {found['error']:.0e} | {', '.join(found['dense']) or '-'}"
                if "sparse" in found
                else f"{found['failed']} | - | -"
            )
            head = f"[{name}]({recipe.url}) | {version_of(checkout)}"
            lines.append(f"| {head} | {kind} | {result} | {recipe.note} |")
    lines += ["", *_NOT_YET]
    return "\n".join(lines)


_NOT_YET = (
    "`cross_attention` and `not_video` (text that attends to itself) are dense by design.",
    "",
    "Packed rows in which the padding of the text is a sequence of its own (HunyuanVideo's default mode) are sparse: "
    "the valid tokens by clusters, the padding by the operator itself. Where the starts of the sequences are others "
    "when the model runs, its result is the operator's, and the report shows a density of 100 %.",
    "",
    "So are tokens that a mask picks before attention and that are put back behind it (flash-attn's `unpad_input`: "
    "HunyuanVideo 1.5's own flash mode, Mochi's flash mode with a batch of several): as one attention over all rows, "
    "in which what was left out is masked. Where queries, keys and values are picked by different places, they stay "
    "dense with `picked_tokens`.",
    "",
    "What stays dense in such code, and why:",
    "",
    "- HunyuanVideo 1.5's own torch mode: an `assert` on the numbers in a mask breaks the graph in front of every "
    "attention over the video; the warning names the line. The two that are sparse by blocks are those of the text's "
    "refiner (so are two of the five in its flash mode), which only `min_tokens=0` lets in.",
    "- Attention behind a graph break whose queries, keys and values are not of one length: the warning names the line "
    "and the way out.",
    "- A block that is compiled alone and is handed video and text as one tensor, all of it with positions: nothing in "
    "it shows where the text begins, and it is clustered with the video. That is said once, where the model's "
    "`patch_size` and `in_channels` tell how many patches its video has. Compile the whole model.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, help="folder with a checkout of each repository, by its name")
    parser.add_argument("--only", choices=RECIPES, help="one repository, as JSON")
    parser.add_argument("--regional", action="store_true", help="with --only: compile blocks")
    chosen = parser.parse_args()
    if chosen.only:
        checkout = chosen.checkouts / (RECIPES[chosen.only].folder or chosen.only)
        print(json.dumps(try_one(chosen.only, checkout, chosen.regional)))
    else:
        print(page(chosen.checkouts))


if __name__ == "__main__":
    main()
