"""Checks the places that CONTRIBUTING's "How to add an op" lists."""

import re
from importlib.resources import files

import pytest

from rgexport.export.coreml.lowering import LOWERINGS as COREML
from rgexport.export.gguf.naming import file_tensors
from rgexport.export.onnx.lowering import LOWERINGS as ONNX
from rgexport.export.trace import trace
from rgexport.griffin import ops
from rgexport.griffin.deepmind import BRANCHES, NAMES
from rgexport.griffin.layer import all_ops
from rgexport.griffin.layout import EMBEDDING, input_site, model_tensors
from rgexport.griffin.sites import HEAD_SITES, sites
from rgexport.runtimes.llama_cpp.observer import taps
from tests.deepmind import deepmind_model
from tests.models import ODD_CONFIGS, random_weights

CONFIG = ODD_CONFIGS["regular"]
FROM_LLAMA_CPP = {"Qcur", "Kcur", "Vcur", "kqv_out"}
"""Named in llama.cpp's own src/llama-graph.cpp."""


def test_each_op_of_the_step_has_a_row():
    local = {site.split(".", 2)[2] for site in sites(CONFIG) if site.startswith("layers.")}
    assert local == all_ops().keys()


@pytest.mark.parametrize("name", ["regular", "hawk", "attention_only"])
def test_sites_are_those_of_the_step_model_in_its_order(name):
    config = ODD_CONFIGS[name]
    assert sites(config) == tuple(node.site for node in trace(config).nodes)


@pytest.mark.parametrize("name", ["regular", "hawk", "attention_only"])
def test_the_table_says_what_each_linear_reads(name):
    config = ODD_CONFIGS[name]
    nodes = trace(config).nodes
    made_by = {output.name: node.site for node in nodes for output in node.outputs}
    linears = {node.site: made_by[node.inputs[0].name] for node in nodes if node.op == "linear"}
    assert linears.pop("lm_head") == input_site(EMBEDDING) == "final_norm"
    assert linears == {site: input_site(f"{site}.weight") for site in linears}


@pytest.mark.parametrize("table", [ONNX, COREML], ids=["onnx", "coreml"])
def test_each_op_is_lowered(table):
    used = {node.op for node in trace(CONFIG).nodes}
    assert used <= table.keys() and all(hasattr(ops, op) for op in used)


def test_deepmind_has_each_tensor_under_the_name_of_its_row():
    halves = {f"{branch}.{kind}" for branch in BRANCHES for kind in ("weight", "bias")}
    local = {name.split(".", 2)[2] for name in model_tensors(CONFIG) if name.startswith("layers.")}
    assert local - halves == set(NAMES.values())
    model = deepmind_model(CONFIG, random_weights(CONFIG))
    theirs = {re.sub(r"^blocks\.\d+\.", "", name) for name in model.state_dict()}
    assert set(NAMES) <= theirs


def test_gguf_files_have_each_tensor_under_a_name_of_its_own():
    tensors = file_tensors(CONFIG)
    assert {tensor.canonical for tensor in tensors} == model_tensors(CONFIG).keys()
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_llama_cpp_shows_each_op_but_what_it_fuses():
    unseen = {site.rpartition(".")[2] for site in sites(CONFIG)} - {
        site.rpartition(".")[2] for site in taps(CONFIG)
    }
    assert unseen == {"gelu", "last_tokens"} and "last_tokens" in HEAD_SITES


def test_the_port_names_what_the_rows_say():
    port = files("rgexport.kernels.llama_cpp").joinpath("recurrentgemma.cpp").read_text("utf-8")
    named = set(re.findall(r'cb\(\w+, "(\w+)"', port))
    tensors = {op.graph.partition("/")[0] for op in all_ops().values() if op.graph}
    assert tensors - named <= FROM_LLAMA_CPP
