"""Checks the places that CONTRIBUTING's "How to add an op" lists."""

import re
from importlib.resources import files

import pytest

from rgexport.artifacts.gguf.naming import file_tensors
from rgexport.export.coreml.lowering import LOWERINGS as COREML
from rgexport.export.onnx.lowering import LOWERINGS as ONNX
from rgexport.export.trace import trace
from rgexport.griffin import ops
from rgexport.griffin.deepmind import BRANCHES, NAMES
from rgexport.griffin.layer_ops import all_ops
from rgexport.griffin.layout import EMBEDDING, HEAD_SITES, input_site, model_tensors, sites
from rgexport.runtimes.llama_cpp.engine import taps
from tests.deepmind import deepmind_model
from tests.models import ODD_CONFIGS, random_weights

CONFIG = ODD_CONFIGS["regular"]
FROM_LLAMA_CPP = {"Qcur", "Kcur", "Vcur", "kqv_out"}
"""Named in llama.cpp's own src/llama-graph.cpp."""


@pytest.mark.parametrize("name", ["regular", "hawk", "attention_only"])
def test_tables_say_what_the_step_model_has(name):
    """Its ops have rows and lowerings, its sites this order, and its linears these inputs."""
    nodes = trace(ODD_CONFIGS[name]).nodes
    assert sites(ODD_CONFIGS[name]) == tuple(node.site for node in nodes)
    used = {node.op for node in nodes}
    assert used <= ONNX.keys() & COREML.keys() and all(hasattr(ops, op) for op in used)
    if name == "regular":
        in_layers = {n.site.split(".", 2)[2] for n in nodes if n.site.startswith("layers.")}
        assert in_layers == all_ops().keys()
    made_by = {output.name: node.site for node in nodes for output in node.outputs}
    linears = {node.site: made_by[node.inputs[0].name] for node in nodes if node.op == "linear"}
    assert linears.pop("lm_head") == input_site(EMBEDDING) == "final_norm"
    assert linears == {site: input_site(f"{site}.weight") for site in linears}


def test_deepmind_and_gguf_files_name_each_tensor():
    halves = {f"{branch}.{kind}" for branch in BRANCHES for kind in ("weight", "bias")}
    local = {name.split(".", 2)[2] for name in model_tensors(CONFIG) if name.startswith("layers.")}
    assert local - halves == set(NAMES.values())
    model = deepmind_model(CONFIG, random_weights(CONFIG))
    named = {tensor.name: tensor.canonical for tensor in file_tensors(CONFIG)}
    assert sorted(named.values()) == sorted(model_tensors(CONFIG))
    theirs = {re.sub(r"^blocks\.\d+\.", "", name) for name in model.state_dict()}
    assert set(NAMES) <= theirs


def test_llama_cpp_shows_each_op_but_what_it_fuses():
    ends, seen = ({s.rpartition(".")[2] for s in some(CONFIG)} for some in (sites, taps))
    assert ends - seen == {"gelu", "last_tokens"} and "last_tokens" in HEAD_SITES
    port = files("rgexport.kernels.llama_cpp").joinpath("recurrentgemma.cpp").read_text("utf-8")
    named = set(re.findall(r'cb\(\w+, "(\w+)"', port))
    tensors = {op.graph.partition("/")[0] for op in all_ops().values() if op.graph}
    assert tensors - named <= FROM_LLAMA_CPP
