"""torchrun: the example of docs/distributed.md as pasted, and a rank that fails ends all with a message."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/distributed.md").read_text(encoding="utf-8"), re.DOTALL)
SECONDS = 240

# On rank 1 the sparse graph fails after it has exchanged query, key and value.
FAILING_BACKEND = """
import os
from torch import fx
from torch._dynamo import register_backend

class Failing(fx.Interpreter):
    def run_node(self, node):
        if "kmeans" in str(node.target) and os.environ["RANK"] == "1":
            raise RuntimeError("this rank is broken")
        return super().run_node(node)

@register_backend
def failing(gm, example_inputs):
    return Failing(gm).run

"""


def _torchrun(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    script = folder / "small.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
    )


@pytest.mark.slow
def test_the_example(tmp_path):
    code = EXAMPLES[1].replace("min_tokens=0)", 'min_tokens=0, inner_backend="eager")')
    done = _torchrun(tmp_path, code)
    assert done.returncode == 0, done.stderr
    # Three layers, four steps of which the first is dense, two guidance branches.
    assert "ran 18 sparse and 6 dense attentions" in done.stdout
    assert float(done.stdout.rpartition("largest difference:")[2]) < 1e-4


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_with_a_message(tmp_path):
    code = EXAMPLES[1].replace("min_tokens=0)", 'min_tokens=0, inner_backend="failing")')
    done = _torchrun(tmp_path, FAILING_BACKEND + code)
    assert done.returncode != 0
    assert "rank 1: the sparse graph of graph_" in done.stderr and "this rank is broken" in done.stderr
    assert "The other ranks are in the middle of it" in done.stderr
