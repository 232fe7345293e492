"""Which ops of a model are fused, how they compute, and which kernels run them."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.onnx.model_file import MODEL_FILE, NativeOps, native_ops
from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.functions import DOMAIN
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.griffin.reference import Reference
from rgexport.kernels.onnx import library as build
from rgexport.kernels.onnx.library import NO_NATIVE, Kernels
from rgexport.quantize.plan import make_plan
from rgexport.quantize.schemes.registry import BFLOAT16, Affine, Float
from rgexport.runtimes.onnx.mapped_weights import MappedWeights
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate.weights.steps import step_sizes
from tests.artifacts import export_random, load_graph
from tests.models import ODD_CONFIGS, make_config, random_weights, write_hugging_face
from tests.sessions import distance, ragged, random_tokens

OURS = "ai.rgexport"


def file_of(*nodes: tuple[str, str]) -> bytes:
    """A graph of nodes (domain, op), and a function of our domain that is never called."""
    chain = [
        helper.make_node(op, [f"v{i}"], [f"v{i + 1}"], domain=domain, f=0.5)
        for i, (domain, op) in enumerate(nodes)
    ]
    graph = helper.make_graph(chain, OURS, [], [])
    body = helper.make_node("QuantLinear", ["x"], ["y"], domain=OURS)
    function = helper.make_function(
        OURS, "Unused", ["x"], ["y"], [body], [helper.make_opsetid("", 23)]
    )
    return helper.make_model(graph, functions=[function]).SerializeToString()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    kernels = Kernels("avx2", ("QuantLinear", "RgLruScan"), ("scalar", "avx2"))
    monkeypatch.setattr(build, "kernels", lambda: kernels)
    monkeypatch.setattr(build, "library", lambda: Path("library.so"))
    return monkeypatch


def test_native_where_built_and_damaged_files_raise_nothing(built):
    standard = ("", "Add"), ("com.microsoft", "MatMulNBits"), ("ai.rgexport.other", "RgLruScan")
    scan = (OURS, "RgLruScan")
    whole = file_of(scan, *standard, (OURS, "Later"), scan)
    ops = {"Later": 1, "RgLruScan": 2}
    expected = NativeOps(ops, ("RgLruScan",), Path("library.so"), "native avx2", "")
    assert native_ops(whole) == expected
    for end in range(0, len(whole), 7):
        assert sum(native_ops(whole[:end]).ops.values()) <= 3
        native_ops(whole[:end] + b"\xff" + whole[end + 1 :])


def test_inspect_names_the_kernels(demo_artifact, built, capsys):
    """Weights that native ops read are mapped; the engine folds decays, and repacks the rest."""
    ops = native_ops(demo_artifact / "model.onnx")
    weights, small = ({tensor.name for tensor in group} for group in (ops.weights, ops.small))
    assert any("linear_out" in name for name in weights) and not weights & small
    assert small and all(name.endswith("rg_lru.recurrent_param") for name in small)
    assert run(["inspect", str(demo_artifact)]) == 0
    shown = capsys.readouterr().out
    assert "It runs on native avx2 kernels: " in shown and "RgLruScan" in shown
    built.setattr(build, "kernels", lambda: Kernels(reason="nobody built them"))
    assert run(["inspect", str(demo_artifact)]) == 0
    reason = "Native kernels: none (nobody built them); it runs on stock kernels."
    assert reason in capsys.readouterr().out


FIVE_LAYERS = ODD_CONFIGS["regular"]
RECURRENT, ATTENTION = 4, 1
LAYERS = RECURRENT + ATTENTION


def ops(artifact: Artifact) -> Counter:
    nodes = load_graph(artifact).graph.node
    return Counter(node.op_type for node in nodes if node.domain == DOMAIN)


def with_two(artifact: Artifact) -> set[str]:
    """The weights of the products that have an attribute `digits`, which is 2."""
    names = set()
    for node in load_graph(artifact).graph.node:
        digits = [a.i for a in node.attribute if a.name == "digits"]
        assert digits in ([], [2])
        if digits:
            names |= {name.partition(".data")[0] for name in node.input if ".data" in name}
    return names


@pytest.mark.parametrize(("precision", "exact"), [("int8", False), ("int4", False), ("int4", True)])
def test_what_is_fused_and_has_two_digits(precision: str, exact: bool, tmp_path: Path) -> None:
    asked = {"exact": exact, "block_size": 32}
    artifact, weights = export_random(FIVE_LAYERS, tmp_path, precision, **asked)
    counts, nodes = ops(artifact), load_graph(artifact).graph.node
    scans = [node for node in nodes if node.op_type == "RgLruScan"]
    assert len(scans) == counts["RgLruScan"] == RECURRENT
    assert all("rg_lru.recurrent_gate_weight" in scan.input[3] for scan in scans)
    if exact:
        assert not [op for op in counts if op.startswith("QuantLinear")]
        assert any(node.op_type == "MatMulNBits" for node in nodes)
        assert with_two(artifact) == set()
        return
    assert counts["QuantLinear3"] == ATTENTION  # q, k, v
    assert counts["QuantLinear2"] == RECURRENT + LAYERS  # linear_y, linear_x; gate, up
    assert counts["QuantLinear"] == 2 * LAYERS + 1  # the last of each block; the head
    words = "_proj.weight", "linear_x.weight", "linear_y.weight", "linear_out.weight", EMBEDDING
    linears = {name for name in weights if name.endswith(words)}
    sensitive = {n for n in linears if n.startswith("layers.0.") or ".mlp_block." not in n}
    assert with_two(artifact) == {EMBEDDING} | (sensitive if precision == "int8" else set())


def test_only_linears_of_one_scheme_are_one_op(tmp_path: Path) -> None:
    four, eight = Affine(4, 32, symmetric=True), Affine(8, 32, symmetric=True)
    plan = make_plan(FIVE_LAYERS, four, eight)
    plan["layers.2.temporal_block.k_proj.weight"] = eight
    plan["layers.0.temporal_block.linear_x.weight"] = Float("float32")
    plan["layers.1.mlp_block.up_proj.weight"] = Affine(4, 32, symmetric=False)
    plan["layers.3.mlp_block.up_proj.weight"] = Affine(4, 64, symmetric=True)
    artifact, _ = export_random(FIVE_LAYERS, tmp_path, None, plan=plan)
    counts = ops(artifact)
    assert counts["QuantLinear3"] == 0
    assert counts["QuantLinear2"] == RECURRENT + LAYERS + 1 - 3  # q with v; not in layers 0, 1, 3
    assert counts["QuantLinear"] == 2 * LAYERS + 1 + 1 + 1 + 4
    tokens = random_tokens(FIVE_LAYERS, 1, 40)
    dequantized = Reference(FIVE_LAYERS, artifact.weights)
    expected = dequantized.logits(dequantized.run(tokens)[0])
    for native, sizes in product((True, False), ([40], [1])):
        session = OrtSession(artifact, native=native)
        assert distance(ragged(session, tokens, sizes), expected) < 0.05


GATED = make_config("ra", width=64, heads=8, window=24)
GATES = {name for name, spec in model_tensors(GATED).items() if spec.role == "gate"}
MATRICES = {name for name in GATES if name.endswith("weight")}


def gated(folder: Path, dtype: str, **options) -> Artifact:
    """From weights that bfloat16 holds, in a checkpoint of that dtype."""
    weights = {
        name: array.astype("bfloat16").astype(np.float32)
        for name, array in random_weights(GATED).items()
    }
    model = write_hugging_face(GATED, weights, folder / dtype, dtype=dtype)
    target = folder / f"{dtype}-{'-'.join(options)}-{options.get('profile')}"
    return open_artifact(export_onnx(open_checkpoint(model), OnnxOptions(**options), target))


def dtypes(artifact: Artifact, names: set[str]) -> set[str]:
    return {artifact.manifest.tensors[name].parts["data"].dtype for name in names}


@pytest.mark.parametrize(("native", "compute"), [(False, None), (True, "fp16")])
def test_results_are_those_of_float32_gates(native, compute, tmp_path, monkeypatch):
    if not native:
        monkeypatch.setenv(NO_NATIVE, "1")
    short, wide = (gated(tmp_path, dtype, compute=compute) for dtype in ("bfloat16", "float32"))
    assert dtypes(short, MATRICES) == {"bfloat16"} and dtypes(wide, MATRICES) == {"float32"}
    assert dtypes(short, GATES - MATRICES) == {"float32"}
    tokens = random_tokens(GATED, 2, 30)
    first, second = sessions = [OrtSession(artifact) for artifact in (short, wide)]
    for session in sessions:
        session.reset(2)
    for at in (slice(0, 25), slice(25, 26), slice(26, 30)):
        count = len(range(30)[at])
        logits = first.prefill(tokens[:, at], count)
        np.testing.assert_array_equal(logits, second.prefill(tokens[:, at], count))


def test_they_are_mapped_and_validation_allows_no_rounding_of_them(tmp_path):
    """The checkpoint has these numbers, so half a step of bfloat16 would be a fault."""
    artifact = gated(tmp_path, "bfloat16")
    weights = native_ops(artifact.file(MODEL_FILE)).weights
    assert {tensor.name for tensor in weights} >= MATRICES
    mapped = MappedWeights(artifact.path, weights).values
    assert mapped.keys() == {tensor.name for tensor in weights}
    for name in MATRICES:
        whole = artifact.weights[name].whole()
        rows = whole.reshape(len(whole), -1)
        steps = step_sizes(name, rows, artifact.manifest.tensors[name].uniform).step
        assert (steps <= np.maximum(np.abs(rows) * 2.0**-22, 2.0**-126)).all()


def test_a_plan_says_it_but_what_would_be_rounded_is_float32(tmp_path):
    """Such as a plan of a model in bfloat16, for one that was tuned in float32."""
    eight = Affine(8, 64, symmetric=True)
    plan = make_plan(GATED, eight, eight)
    short = plan | dict.fromkeys(MATRICES, BFLOAT16)
    for dtype, asked, stored in [
        ("bfloat16", plan, "float32"),
        ("bfloat16", short, "bfloat16"),
        ("float32", short, "float32"),
    ]:
        folder = tmp_path / f"{dtype}-{stored}"
        model = write_hugging_face(GATED, random_weights(GATED), folder / "model", dtype=dtype)
        target = export_onnx(open_checkpoint(model), OnnxOptions(plan=asked), folder / "onnx")
        assert dtypes(open_artifact(target), MATRICES) == {stored}
