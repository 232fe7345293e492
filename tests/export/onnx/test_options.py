from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import INT8_ROWS, Affine, Float, Ggml, Palette, Scheme
from tests.models import ODD_CONFIGS, make_config

CONFIG = ODD_CONFIGS["regular"]
LINEAR = "layers.0.mlp_block.up_proj.weight"
HEAD = Affine(8, 64, symmetric=True, scale="float16")
"""Blocks of 128, but that the rows have 64 weights."""
PLAN = make_plan(CONFIG, Affine(4, 32, symmetric=True), Float("float32"))


def test_defaults() -> None:
    options = OnnxOptions()
    assert (options.precision_word, options.compute_word) == ("int4", "fp32")
    assert OnnxOptions(precision="fp16").compute_word == "fp16"
    assert OnnxOptions(precision="fp16", compute="fp32").compute_word == "fp32"
    plan = options.resolve_plan(CONFIG)
    assert plan[EMBEDDING] == HEAD
    assert plan[LINEAR] == Affine(4, 32, symmetric=True, scale="float16")
    assert OnnxOptions(profile="wasm").resolve_plan(CONFIG)[LINEAR] == INT8_ROWS
    browser = OnnxOptions(profile="webgpu").resolve_plan(CONFIG)
    assert browser[LINEAR] == Affine(4, 64, symmetric=False)
    wasm = OnnxOptions(profile="wasm", precision="int4").resolve_plan(CONFIG)
    assert (wasm[LINEAR], wasm[EMBEDDING]) == (browser[LINEAR], INT8_ROWS)


@pytest.mark.parametrize(
    ("options", "linear", "embedding"),
    [
        ({"block_size": 64}, (4, 64, True), HEAD),
        ({"symmetric": False}, (4, 32, False), HEAD),
        ({"embedding_precision": "int4"}, (4, 32, True), (4, 32, True)),
        ({"precision": "int8", "block_size": 32}, (8, 32, True), (8, 32, True)),
        (
            {"precision": "fp32", "embedding_precision": "int8", "block_size": 32},
            Float("float32"),
            (8, 32, True),
        ),
    ],
)
def test_options_change_what_they_name(
    options: dict[str, Any], linear: Any, embedding: Any
) -> None:
    """The head keeps its own defaults, unless it is stored in the precision of the linears."""
    plan = OnnxOptions(**options).resolve_plan(CONFIG)
    for name, expected in ((LINEAR, linear), (EMBEDDING, embedding)):
        scheme = Affine(*expected, scale="float16") if isinstance(expected, tuple) else expected
        assert plan[name] == scheme


@pytest.mark.parametrize("asked", [None, 16, 32, 128])
def test_blocks_fit_the_rows_of_each_tensor(asked: int | None) -> None:
    """None takes more bytes than the asked size would; tensors of one input have one size."""
    config = make_config("ra", width=288, heads=4, lru_width=300, mlp_width=40)
    options = OnnxOptions(precision="int4", embedding_precision="int4", block_size=asked)
    plan, largest = options.resolve_plan(config), asked or 32
    found = {name: scheme.block for name, scheme in plan.items() if isinstance(scheme, Affine)}
    fitting = {288: 32, 300: 64, 40: 16}
    shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
    for name, block in found.items():
        assert block == min(largest, fitting[shapes[name][1]]), name
    assert {shapes[name][1] for name in found} == fitting.keys()


def test_a_plan_stays_as_it_is() -> None:
    config = make_config("ra", width=288, heads=4)
    plan = make_plan(config, Affine(4, 128, symmetric=True), Affine(8, 16, symmetric=True))
    options = OnnxOptions(plan=plan)
    assert options.resolve_plan(config) == plan and options.precision_word == "int4"


def test_a_plan_replaces_options() -> None:
    beside = {"precision": "int8", "block_size": 64, "symmetric": False}
    words = "leave out the precision, block size, symmetric, embedding precision$"
    with pytest.raises(RequestError, match=words):
        OnnxOptions(plan=PLAN, embedding_precision="int8", **beside)


@pytest.mark.parametrize("beside", [{"exact": True}, {"block_size": 32}, {"symmetric": False}])
def test_blocks_where_rows_will_not_do(beside: dict[str, Any]) -> None:
    """A scale per row needs symmetric weights and rounded activations."""
    plan = OnnxOptions(profile="wasm", precision="int8", **beside).resolve_plan(CONFIG)
    symmetric = beside.get("symmetric", True)
    assert plan[LINEAR] == Affine(8, beside.get("block_size", 64), symmetric)


def test_int8_rows_are_for_wasm_only() -> None:
    plan = make_plan(CONFIG, INT8_ROWS, Float("float32"))
    assert OnnxOptions(plan=plan, profile="wasm").resolve_plan(CONFIG) == plan
    with pytest.raises(RequestError, match="as int8/row, which the profile webgpu does not have"):
        OnnxOptions(plan=plan, profile="webgpu")
    with pytest.raises(RequestError, match="leave out --exact, or take blocks"):
        OnnxOptions(plan=plan, profile="wasm", exact=True)


def test_odd_zero_points_are_not_for_webgpu() -> None:
    """A row of the embedding with an odd number of blocks would share a byte with the next one."""
    asked: dict[str, Any] = {"precision": "int4", "block_size": 64}  # one block of a width of 64
    uniform = OnnxOptions(**asked, symmetric=False, embedding_precision="int4")
    assert not uniform.resolve_plan(CONFIG)[EMBEDDING].symmetric
    found = OnnxOptions(profile="webgpu", **asked).resolve_plan(CONFIG)
    assert found[EMBEDDING] == Affine(4, 64, symmetric=True)
    assert found[LINEAR] == Affine(4, 64, symmetric=False)
    options = OnnxOptions(profile="webgpu", symmetric=False, **asked)
    with pytest.raises(RequestError, match="rows of 64 are an odd number of blocks; store it as"):
        options.resolve_plan(CONFIG)
    even = OnnxOptions(profile="webgpu", precision="int4", block_size=32, symmetric=False)
    assert not even.resolve_plan(CONFIG)[EMBEDDING].symmetric


@pytest.mark.parametrize(
    ("scheme", "complaint"),
    [
        (Affine(4, 24, symmetric=True), "which the profile cpu does not"),
        (Affine(8, None, symmetric=True), "which the profile cpu does not"),
        (Affine(2, 32, symmetric=True), "which the profile cpu does not .* in 3, 4, 8 bits"),
        (Palette(), "which the profile cpu does not"),
        (Ggml("q6_k"), "which only GGUF files have"),
    ],
    ids=str,
)
def test_a_plan_for_another_format_is_refused(scheme: Scheme, complaint: str) -> None:
    plan = make_plan(CONFIG, Float("float32"), scheme)
    with pytest.raises(RequestError, match=rf"embed_tokens\.weight as \S+, {complaint}"):
        OnnxOptions(plan=plan)
