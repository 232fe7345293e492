from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.layout import EMBEDDING
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import INT8_ROWS, Affine, Float, Ggml, Palette, Scheme
from tests.models import ODD_CONFIGS

CONFIG = ODD_CONFIGS["regular"]
LINEAR = "layers.0.mlp_block.up_proj.weight"
PLAN = make_plan(CONFIG, Affine(4, 32, symmetric=True), Float("float32"))


def test_defaults() -> None:
    options = OnnxOptions()
    assert (options.precision_word, options.compute_word) == ("fp32", "fp32")
    assert OnnxOptions(precision="fp16").compute_word == "fp16"
    assert OnnxOptions(precision="fp16", compute="fp32").compute_word == "fp32"
    plan = OnnxOptions(precision="int4").resolve_plan(CONFIG)
    assert plan["embed_tokens.weight"] == Affine(4, 128, symmetric=False)


def test_the_embedding_may_be_finer() -> None:
    plan = OnnxOptions(precision="int4", embedding_precision="int8").resolve_plan(CONFIG)
    assert plan["embed_tokens.weight"] == Affine(8, 128, symmetric=True)
    assert plan["layers.0.mlp_block.up_proj.weight"] == Affine(4, 128, symmetric=False)


def test_a_plan_speaks_for_itself() -> None:
    options = OnnxOptions(plan=PLAN)
    assert options.resolve_plan(CONFIG) == PLAN
    assert options.precision_word == "int4"


@pytest.mark.parametrize(
    ("beside", "word"),
    [
        ({"precision": "int8"}, "precision"),
        ({"block_size": 64}, "block size"),
        ({"symmetric": False}, "symmetric"),
        ({"embedding_precision": "int8"}, "embedding precision"),
    ],
)
def test_nothing_stands_beside_a_plan(beside: dict[str, object], word: str) -> None:
    with pytest.raises(RequestError, match=f"leave out the {word}"):
        OnnxOptions(plan=PLAN, **beside)


def test_unknown_words() -> None:
    with pytest.raises(RequestError, match="--compute is 'bf16'"):
        OnnxOptions(compute="bf16")
    with pytest.raises(RequestError, match="'int3'"):
        OnnxOptions(precision="int3").resolve_plan(CONFIG)


def test_a_plan_for_gguf_is_refused() -> None:
    plan = make_plan(CONFIG, Ggml("q4_k"), Ggml("q6_k"))
    with pytest.raises(RequestError, match=r"embed_tokens\.weight as q6_k, which only GGUF"):
        OnnxOptions(plan=plan)


def test_each_profile_has_a_precision() -> None:
    assert OnnxOptions(profile="wasm").resolve_plan(CONFIG)[LINEAR] == INT8_ROWS
    assert OnnxOptions(profile="webgpu").resolve_plan(CONFIG)[LINEAR] == Affine(
        4, 128, symmetric=False
    )
    with pytest.raises(RequestError, match="--profile is 'phone'; expected one of cpu, wasm, web"):
        OnnxOptions(profile="phone")


@pytest.mark.parametrize("beside", [{"exact": True}, {"block_size": 32}, {"symmetric": False}])
def test_who_asks_for_blocks_gets_them(beside: dict[str, Any]) -> None:
    """What goes with integer products are rows, symmetric, with rounded activations."""
    plan = OnnxOptions(profile="wasm", precision="int8", **beside).resolve_plan(CONFIG)
    symmetric = beside.get("symmetric", True)
    assert plan[LINEAR] == Affine(8, beside.get("block_size", 128), symmetric)


def test_rows_of_int8_are_of_wasm_alone() -> None:
    plan = make_plan(CONFIG, INT8_ROWS, Float("float32"))
    assert OnnxOptions(plan=plan, profile="wasm").resolve_plan(CONFIG) == plan
    with pytest.raises(RequestError, match="as int8/row, which ONNX does not have"):
        OnnxOptions(plan=plan, profile="webgpu")
    with pytest.raises(RequestError, match="leave out --exact, or take blocks"):
        OnnxOptions(plan=plan, profile="wasm", exact=True)


def test_odd_zero_points_are_not_for_webgpu() -> None:
    """A row of the embedding with an odd number of blocks would share a byte with the next one."""
    asked: dict[str, Any] = {"precision": "int4", "block_size": 64}  # one block of a width of 64
    assert not OnnxOptions(**asked).resolve_plan(CONFIG)[EMBEDDING].symmetric
    found = OnnxOptions(profile="webgpu", **asked).resolve_plan(CONFIG)
    assert found[EMBEDDING] == Affine(4, 64, symmetric=True)
    assert found[LINEAR] == Affine(4, 64, symmetric=False)
    options = OnnxOptions(profile="webgpu", symmetric=False, **asked)
    with pytest.raises(RequestError, match="rows of 64 are an odd number of blocks; store it as"):
        options.resolve_plan(CONFIG)
    even = OnnxOptions(profile="webgpu", precision="int4", block_size=32, symmetric=False)
    assert not even.resolve_plan(CONFIG)[EMBEDDING].symmetric


@pytest.mark.parametrize(
    "scheme",
    [
        Affine(4, 16, symmetric=True),
        Affine(8, None, symmetric=True),
        Affine(4, 32, symmetric=True, scale="float16"),
        Palette(),
    ],
    ids=lambda scheme: scheme.label,
)
def test_a_plan_for_core_ml_is_refused(scheme: Scheme) -> None:
    plan = make_plan(CONFIG, Float("float32"), scheme)
    with pytest.raises(RequestError, match=r"embed_tokens\.weight as \S+, which ONNX does not"):
        OnnxOptions(plan=plan)
