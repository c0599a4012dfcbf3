"""A damaged file is refused or loads equal, and never ends the process. A stranger's file runs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import svg2_compile
from svg2_compile import ExportError
from svg2_compile.export import serde
from tests.export.programs import block_inputs, exported_block
from tests.support import SELECTION

# In a process of its own: a crash of the process is what must not happen. Prints how many were refused, how many
# loaded equal, and everything else.
DAMAGE = """
import json, random, sys, warnings
from pathlib import Path
import torch, svg2_compile
warnings.simplefilter("ignore")
original, target = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
inputs = torch.load(sys.argv[3])
expected = svg2_compile.load(sys.argv[1])(*inputs)
random.seed(0)
directory = original.find(b"PK\\x01\\x02")
flips = [(position, 1 << random.randrange(8)) for position in range(directory, len(original), 4)]
flips += [(random.randrange(len(original)), 1 << random.randrange(8)) for _ in range(300)]
headers = [i for i in range(len(original)) if original.startswith(b"PK\\x03\\x04", i)]
flips += [(start + offset, 0xFF) for start in headers for offset in range(0, 40, 3)]
damaged = [original[:p] + bytes([original[p] ^ bit]) + original[p + 1 :] for p, bit in flips]
damaged += [original[: random.randrange(len(original))] for _ in range(60)] + [b"", original + b"x", original * 2]
damaged += [original[:1000] + original[1500:], original[:2000] + bytes(64) + original[2064:]]
refused, equal, wrong = 0, 0, []
for data in damaged:
    target.write_bytes(data)
    try:
        program = svg2_compile.load(target)
    except svg2_compile.ExportError:
        refused += 1
    except BaseException as error:
        wrong.append(repr(error))
    else:
        if torch.equal(program(*inputs), expected):
            equal += 1
        else:
            wrong.append("another result")
print(json.dumps({"refused": refused, "equal": equal, "wrong": wrong, "tried": len(damaged)}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "block.pt2"
    svg2_compile.save(svg2_compile.transform(exported_block(), **SELECTION), path)
    return path


@pytest.mark.slow
def test_a_damaged_file_is_refused_or_loads_equal(saved, tmp_path):
    torch.save(block_inputs(), tmp_path / "inputs")
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE, str(saved), str(tmp_path / "damaged.pt2"), str(tmp_path / "inputs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    # Dates and flags of the zip carry nothing; everything else must be noticed.
    assert result["refused"] > 0.8 * result["tried"] and result["equal"] > 0


def _graph(path: Path) -> dict:
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("graphs/sparse.json"))


def _nodes(graph: dict) -> list[dict]:
    return graph["graph_module"]["graph"]["nodes"]


def _calls_system(graph: dict) -> None:
    _nodes(graph)[0].update(target="torch.os.system")


def _calls_unpickler(graph: dict) -> None:
    _nodes(graph)[0].update(target="torch.load")


def _opens_file(graph: dict) -> None:
    _nodes(graph)[0].update(target="torch.ops.aten.from_file.default")


def _calls_builtin(graph: dict) -> None:
    _nodes(graph)[0].update(target="_operator.methodcaller")


def _expression(text: str):
    def change(graph: dict) -> None:
        value = next(iter(graph["graph_module"]["graph"]["tensor_values"].values()))
        value["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return change


def _guard(graph: dict) -> None:
    graph["guards_code"] = ["__import__('os').system('true') == 0"]


def _structure(kind: str, context):
    def change(graph: dict) -> None:
        signature = graph["graph_module"]["module_call_graph"][0]["signature"]
        leaf: dict = {"type": None, "context": None, "children_spec": []}
        signature["out_spec"] = json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])

    return change


def _metadata(graph: dict) -> None:
    _nodes(graph)[0]["metadata"]["source_fn_stack"] = "x,torch.os.system"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_calls_system, "calls 'torch.os.system'"),
        (_calls_unpickler, "calls 'torch.load'"),
        (_opens_file, "calls 'torch.ops.aten.from_file.default'"),
        (_calls_builtin, "calls '_operator.methodcaller'"),
        (_expression("__import__('os').system('true')"), "is no expression over sizes"),
        (_expression("exec('os')"), "is no expression over sizes"),
        (_expression("open"), "is no expression over sizes"),
        (_expression("lambdify(Symbol('x'), 'x')"), "is no expression over sizes"),
        (_expression("Symbol('s0').func"), "is no expression over sizes"),
        (_expression("1 +"), "is no expression over sizes"),
        (_guard, "carries source code"),
        (_structure("collections.defaultdict", {"default_factory_module": "os"}), "defaultdict with the context"),
        (_structure("builtins.dict", '{"__enum__": true, "fqn": "os:x", "name": "y"}'), "dict with the context"),
        (_structure("somebody.Output", "null"), "the type somebody.Output, which is not registered"),
        (_structure("diffusers.no_such_module.Output", "null"), "the type diffusers.no_such_module.Output, but"),
        (_metadata, "carries metadata"),
    ],
)  # fmt: skip
def test_a_graph_may_name_only_what_a_graph_needs(saved, change, message):
    graph = _graph(saved)
    change(graph)
    program = exported_block()
    with pytest.raises(ExportError, match=message):
        serde.graph_from_json(json.dumps(graph).encode(), program.state_dict, program.constants)


def test_the_graph_as_saved_is_read(saved):
    program = exported_block()
    again = serde.graph_from_json(json.dumps(_graph(saved)).encode(), program.state_dict, program.constants)
    assert [node.name for node in again.graph.nodes][-1] == "output"


def test_a_missing_operator_is_named(saved):
    graph = _graph(saved)
    _nodes(graph)[0].update(target="torch.ops.somebody.attention.default")
    with pytest.raises(ExportError, match="somebody::attention is not in this process"):
        serde.graph_from_json(json.dumps(graph).encode(), {}, {})
