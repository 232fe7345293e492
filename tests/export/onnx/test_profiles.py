"""What each lowering profile allows: in exported files, and in the check itself."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from rgexport.errors import RequestError
from rgexport.export.describe import as_text, describe
from rgexport.export.manifest import COLUMNS
from rgexport.export.onnx import storage
from rgexport.export.onnx.functions import DOMAIN
from rgexport.export.onnx.profiles import PROFILES
from rgexport.export.opening import open_artifact
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.sites import sites
from tests.artifacts import export_random, load_graph
from tests.models import ODD_CONFIGS

WEB = ("wasm", "webgpu")
PRECISIONS = ("fp32", "fp16", "int8", "int4")

WEBGPU_KERNELS = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil
Clip Concat Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal
Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid Identity If InstanceNormalization
LayerNormalization LeakyRelu Less LessOrEqual Log MatMul MaxPool Mul Neg Not Pad Pow
RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding
ScatterElements ScatterND Shape Sigmoid Sin Sinh Slice Softmax Split Sqrt Squeeze Sub Tan Tanh
ThresholdedRelu Tile Transpose Unsqueeze Where
"""
"""The ops of ai.onnx that ONNX Runtime registers in core/providers/webgpu. Whether onnxruntime-web
has each for the types used is tested in tests/runtimes/onnx/test_web.py."""


def _ops(model: onnx.ModelProto) -> set[tuple[str, str]]:
    """Domain and name of every op, also in functions and subgraphs."""
    graphs = [model.graph.node, *(function.node for function in model.functions)]
    return {(node.domain, node.op_type) for nodes in graphs for node in _walk(nodes)}


def _walk(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _walk(attribute.g.node)


@pytest.mark.parametrize(
    ("precision", "exact"),
    [*((precision, False) for precision in PRECISIONS), ("int8", True), ("int4", True)],
)
@pytest.mark.parametrize("profile", PROFILES)
def test_files_have_no_other_ops(profile: str, precision: str, exact: bool, tmp_path: Path) -> None:
    artifact, _ = export_random(
        ODD_CONFIGS["not_by_32"], tmp_path, precision, profile=profile, exact=exact
    )
    allowed, model = PROFILES[profile].ops, load_graph(artifact)
    found = _ops(model)
    assert all(name in allowed[domain] for domain, name in found)
    assert (DOMAIN in {domain for domain, _ in found}) is (profile == "cpu")
    names = {name for domain, name in found if domain == ""}
    if profile == "webgpu":
        assert names <= set(WEBGPU_KERNELS.split())
        assert ("com.microsoft", "LinearAttention") in found
    rows = profile == "wasm" and precision in ("int8", "int4") and not exact
    assert ("MatMulInteger" in names) is rows, "in int4, too: the head is int8 there"
    assert not {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"} & {name for _, name in found}
    own = {name for domain, name in found if domain == DOMAIN}
    assert own == {function.name for function in model.functions}
    assert artifact.manifest.profile == profile
    rounded = not exact if profile == "cpu" else "MatMulInteger" in names
    assert artifact.manifest.exact is not rounded


def test_inspect_names_the_profile(tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS["not_by_32"], tmp_path, "int8", profile="wasm")
    shown = as_text(describe(str(artifact.path)))
    words = ": onnx (wasm) artifact, int8 weights, fp32 activations (int8 in products),"
    assert words in shown


@pytest.mark.parametrize("profile", WEB)
def test_sites_keep_their_names(profile: str, tmp_path: Path) -> None:
    """The observer and the bisection look for them."""
    config = ODD_CONFIGS["irregular"]
    model = load_graph(export_random(config, tmp_path, "int8", profile=profile)[0])
    values = {value for node in model.graph.node for value in node.output}
    assert set(sites(config)) <= values
    assert next(value.name for value in model.graph.output) == "logits"


NOT_ALLOWED = {
    "a node": (
        "cpu",
        "[first] y = Erf (x)",
        "",
        r"^first: ai\.onnx::Erf is no op of the profile cpu",
    ),
    "in a function": (
        "cpu",
        f"y = {DOMAIN}.RgLruScan (x)",
        "{ [inner] b = Erf (a) }",
        r"^RgLruScan: inner: ai\.onnx::Erf",
    ),
    "in a subgraph": (
        "wasm",
        "scan_out = Scan <num_scan_inputs = 1, body = inner (float e) => (float f) "
        "{ [deep] f = Erf (e) }> (x) y = Identity (scan_out)",
        "",
        r"deep: ai\.onnx::Erf is no op of the profile wasm",
    ),
    "a native op": (
        "webgpu",
        f"[call] y = {DOMAIN}.RgLruScan (x)",
        "{ b = Neg (a) }",
        f"{DOMAIN}::RgLruScan is no op of the profile",
    ),
}
"""Profile, body of a model, body of its function if it has one, and what is said of it."""


@pytest.mark.parametrize("case", NOT_ALLOWED)
def test_ops_that_are_not_allowed(case: str) -> None:
    profile, body, function, complaint = NOT_ALLOWED[case]
    if function:
        opset = f'<domain: "{DOMAIN}", opset_import: ["" : 23]>'
        function = f"{opset} RgLruScan (a) => (b) {function}"
    text = f"""<ir_version: 10, opset_import: ["" : 23, "{DOMAIN}" : 1]>
    step (float[N] x) => (float[N] y) {{ {body} }} {function}"""
    model = ir.serde.deserialize_model(parser.parse_model(text))
    with pytest.raises(AssertionError, match=complaint):
        PROFILES[profile].require_allowed(model)


@pytest.mark.parametrize("name", ["regular", "not_by_32"])
def test_int8_rows_are_stored_by_columns(name: str, tmp_path: Path) -> None:
    """One copy on disk for the embedding and the head; each weight within a step.

    Half a step, except opposite to the largest weight: only its side has 128 levels.
    """
    artifact, weights = export_random(
        ODD_CONFIGS[name], tmp_path, "int8", profile="wasm", algorithm="rtn"
    )
    for tensor, stored in artifact.manifest.tensors.items():
        if COLUMNS not in stored.parts:
            continue
        rows, columns = stored.shape
        part = stored.parts[COLUMNS]
        assert part.shape == (columns, rows)
        data = (artifact.path / part.file).read_bytes()
        levels = np.frombuffer(data, np.uint8, columns * rows, part.offset).reshape(columns, rows)
        scales = np.frombuffer(data, np.float32, rows, stored.parts["scales"].offset)
        by_hand = (levels.T.astype(np.float32) - 128) * scales[:, None]
        np.testing.assert_array_equal(artifact.tensor(tensor).read(0, rows), by_hand)
        np.testing.assert_array_equal(artifact.tensor(tensor).read(3, 5), by_hand[3:5])
        steps = np.abs(by_hand - weights[tensor]) / np.abs(scales[:, None])
        assert steps.max() <= 1.001 and steps.mean() <= 0.26
    model = load_graph(artifact)
    head = next(n for n in reversed(model.graph.node) if n.op_type == "MatMulInteger")
    assert head.input[1] in {n.input[0] for n in model.graph.node if n.op_type == "Gather"}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files of at most so many bytes, but for the embedding, which has one of its own."""
    limit = 4 * 4096
    files = storage.FileLimit(filled=limit, largest=3 * limit)
    for profile in WEB:
        changed = dataclasses.replace(PROFILES[profile], files=files)
        monkeypatch.setitem(PROFILES, profile, changed)
    return limit


@pytest.mark.parametrize("profile", WEB)
def test_weights_are_in_files_of_a_size(profile: str, small_files: int, tmp_path: Path) -> None:
    artifact, weights = export_random(ODD_CONFIGS["regular"], tmp_path, "int8", profile=profile)
    sizes = {
        name: record.size
        for name, record in artifact.manifest.files.items()
        if name.startswith("model.onnx.data")
    }
    first, *others = sizes
    assert {p.file for p in artifact.manifest.tensors[EMBEDDING].parts.values()} == {first}
    assert len(others) > 5 and max(sizes[name] for name in others) <= small_files < sizes[first]
    for stored in artifact.manifest.tensors.values():
        assert len({part.file for part in stored.parts.values()}) == 1
    model = load_graph(artifact)
    named = {e.value for t in model.graph.initializer for e in t.external_data}
    assert sizes.keys() <= named
    for tensor in (EMBEDDING, "layers.4.mlp_block.down_proj.weight"):
        found = artifact.tensor(tensor).read(0, len(weights[tensor]))
        assert np.abs(found - weights[tensor]).max() < 0.02 * np.abs(weights[tensor]).max()

    with open(artifact.path / "model.onnx.data.3", "r+b") as file:
        file.write(b"x")
    with pytest.raises(RequestError, match=r"model\.onnx\.data\.3 was altered"):
        open_artifact(artifact.path)


def test_a_tensor_that_fits_no_file_is_refused(small_files: int, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"embed_tokens\.weight takes 65,536 bytes as float32"):
        export_random(ODD_CONFIGS["regular"], tmp_path, "fp32", profile="webgpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
