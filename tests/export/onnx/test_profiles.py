"""What each lowering profile allows, in the files that come of it and in the check itself."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.describe import as_text, describe
from rgexport.export.manifest import COLUMNS
from rgexport.export.onnx import profiles, storage
from rgexport.export.onnx.functions import DOMAIN
from rgexport.export.onnx.profiles import PROFILES
from rgexport.export.opening import open_artifact
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.sites import sites
from tests.artifacts import export_random
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
"""What ONNX Runtime registers in core/providers/webgpu of ai.onnx. That each is there in
onnxruntime-web, for the types used, is what tests/runtimes/onnx/test_web.py sees."""


def _ops(artifact: Artifact) -> set[tuple[str, str]]:
    """Domain and name of every op in a file, read with onnx's own classes."""
    model = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)
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
    allowed = PROFILES[profile].ops
    found = _ops(artifact)
    assert all(name in allowed[domain] for domain, name in found)
    assert (DOMAIN in {domain for domain, _ in found}) is (profile == "cpu")
    names = {name for domain, name in found if domain == ""}
    if profile == "webgpu":
        assert names <= set(WEBGPU_KERNELS.split())
        assert ("com.microsoft", "LinearAttention") in found
    assert ("MatMulInteger" in names) is ((profile, precision, exact) == ("wasm", "int8", False))
    assert not {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"} & {name for _, name in found}
    model = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)
    assert bool(model.functions) is (profile == "cpu")
    assert artifact.manifest.profile == profile
    rounded = precision.startswith("int") and not exact
    if profile == "cpu":
        assert artifact.manifest.exact is exact
    else:
        assert artifact.manifest.exact is not (rounded and "MatMulInteger" in names)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("profile", WEB)
@pytest.mark.parametrize("name", ["not_by_32", "attention_only"])
def test_files_pass_the_checker(name: str, profile: str, precision: str, tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS[name], tmp_path, precision, profile=profile)
    onnx.checker.check_model(str(artifact.path / "model.onnx"))


def test_inspect_says_what_it_is_for(tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS["hawk"], tmp_path, "int8", profile="wasm")
    description = describe(str(artifact.path))
    assert description["profile"] == "wasm"
    assert ": onnx (wasm) artifact, int8 weights, fp32 activations (int8 in products)," in as_text(
        description
    )


@pytest.mark.parametrize("profile", WEB)
def test_sites_keep_their_names(profile: str, tmp_path: Path) -> None:
    """The observer and the bisection look for them."""
    config = ODD_CONFIGS["irregular"]
    artifact, _ = export_random(config, tmp_path, "int8", profile=profile)
    model = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)
    values = {value for node in model.graph.node for value in node.output}
    assert set(sites(config)) <= values
    assert [value.name for value in model.graph.output][0] == "logits"


def _model(body: str, functions: str = "") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 23, "{DOMAIN}" : 1]>
    step (float[N] x) => (float[N] y) {{ {body} }} {functions}"""
    return ir.serde.deserialize_model(parser.parse_model(text))


def test_an_op_that_is_not_allowed_is_named() -> None:
    model = _model("[first] y = Erf (x)")
    with pytest.raises(AssertionError, match=r"^first: ai\.onnx::Erf is no op of the profile cpu"):
        PROFILES["cpu"].require_allowed(model)


def test_bodies_of_functions_are_looked_into() -> None:
    function = f"""<domain: "{DOMAIN}", opset_import: ["" : 23]>
    RgLruScan (a) => (b) {{ [inner] b = Erf (a) }}"""
    model = _model(f"y = {DOMAIN}.RgLruScan (x)", function)
    with pytest.raises(AssertionError, match=r"^RgLruScan: inner: ai\.onnx::Erf"):
        PROFILES["cpu"].require_allowed(model)


def test_subgraphs_are_looked_into() -> None:
    body = "scan_out = Scan <num_scan_inputs = 1, body = inner (float e) => (float f) "
    body += "{ [deep] f = Erf (e) }> (x) y = Identity (scan_out)"
    with pytest.raises(AssertionError, match=r"deep: ai\.onnx::Erf is no op of the profile wasm"):
        PROFILES["wasm"].require_allowed(_model(body))


@pytest.mark.parametrize("profile", WEB)
def test_a_native_op_is_none_of_a_browser(profile: str) -> None:
    function = f"""<domain: "{DOMAIN}", opset_import: ["" : 23]>
    RgLruScan (a) => (b) {{ b = Neg (a) }}"""
    model = _model(f"[call] y = {DOMAIN}.RgLruScan (x)", function)
    with pytest.raises(AssertionError, match=f"{DOMAIN}::RgLruScan is no op of the profile"):
        PROFILES[profile].require_allowed(model)


@pytest.mark.parametrize("name", ["regular", "not_by_32"])
def test_what_is_stored_by_columns(name: str, tmp_path: Path) -> None:
    """One copy on disk for the embedding and the head; each weight within a step.

    Half a step, but for what lies opposite to the extreme: 128 levels are on its side alone.
    """
    artifact, weights = export_random(ODD_CONFIGS[name], tmp_path, "int8", profile="wasm")
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
    model = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)
    head = next(n for n in reversed(model.graph.node) if n.op_type == "MatMulInteger")
    assert head.input[1] in {n.input[0] for n in model.graph.node if n.op_type == "Gather"}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files of at most so many bytes, but for the embedding, which has one of its own."""
    limit = 4 * 4096
    files = storage.FileLimit(filled=limit, largest=3 * limit)
    for profile in WEB:
        object.__setattr__(PROFILES[profile], "files", files)
    yield limit
    for profile in WEB:
        object.__setattr__(PROFILES[profile], "files", profiles.WEB_FILES)


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
    model = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)
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


def test_one_file_for_processors(tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS["regular"], tmp_path, "int8")
    assert [name for name in artifact.manifest.files if "data" in name] == ["model.onnx.data"]
    assert PROFILES["cpu"].files is None


def test_the_largest_tensor_of_a_browser_is_below_a_gibibyte() -> None:
    """The embedding of the 9B in int8 is the only one above 10⁹ bytes that has to fit."""
    rows, width = 256_000, 4096
    assert 10**9 < rows * width + 4 * rows <= profiles.WEB_FILES.largest
