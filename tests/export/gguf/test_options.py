"""What a user can ask of a GGUF export."""

from pathlib import Path

import pytest

from rgexport.errors import RequestError
from rgexport.export.gguf.options import GgufOptions, type_word
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Affine, Float, Ggml
from tests.models import ODD_CONFIGS, make_config

CONFIG = make_config("rrar", width=256, heads=2, mlp_width=512)
EMBEDDING, DOWN = "token_embd.weight", "blk.0.ffn_down.weight"


def types(**options: object) -> dict[str, str]:
    return GgufOptions(**options).choose(CONFIG).types


def test_defaults():
    assert GgufOptions().file_type.name == "q4_k_m"
    words = {word: type_word(None, word) for word in ("int4", "int8", "fp16", "fp32")}
    assert words == {"int4": "q4_k_m", "int8": "q8_0", "fp16": "f16", "fp32": "f32"}
    assert types()[EMBEDDING] == types(type="q4_k_m")[EMBEDDING]
    chosen = types(type="f16")
    assert chosen[EMBEDDING] == chosen[DOWN] == "f16"
    assert chosen["blk.0.ssm_a"] == chosen["blk.0.rg_lru_a_gate.weight"] == "f32"


def test_a_mix_has_a_better_type_for_the_embedding():
    assert types(type="q4_0")[EMBEDDING] == "q6_k"
    assert types(type="Q4_0", pure=True)[EMBEDDING] == "q4_0"
    assert types(type="q4_0", embedding="int8")[EMBEDDING] == "q8_0"
    assert types(type="q4_0", pure=True, embedding="F16")[EMBEDDING] == "f16"
    assert types(type="q4_0", embedding="int4")[EMBEDDING] == "q4_k"


def test_overrides():
    chosen = types(type="q4_0", tensor_types=(r"blk\.0\.ffn_=q8_0", "attn_v=F16"))
    assert chosen[DOWN] == "q8_0" and chosen["blk.1.ffn_down.weight"] == "q4_0"
    assert chosen["blk.2.attn_v.weight"] == "f16"


def test_a_plan_gives_the_file_its_type():
    plan = make_plan(CONFIG, Ggml("q4_k"), Float("float16"))
    options = GgufOptions(plan=plan)
    assert options.file_type.name == "q4_k_m"
    chosen = options.choose(CONFIG).types
    assert chosen[EMBEDDING] == "f16" and chosen[DOWN] == "q4_k"
    assert chosen["output_norm.weight"] == "f32"
    everywhere = make_plan(CONFIG, Float("float32"), Float("float32"))
    assert GgufOptions(plan=everywhere).file_type.name == "f32"


def algorithms(**options: object) -> dict[str, str]:
    chosen = GgufOptions(**options).choose(CONFIG)
    return {name: scheme.algorithm for name, scheme in chosen.schemes.items()}


def test_an_algorithm_fills_quantized_types():
    found = algorithms(type="q4_k_m", tensor_types=("attn_v=f16",), algorithm="gptq")
    assert found[EMBEDDING] == found[DOWN] == "gptq"
    assert found["blk.0.ssm_a"] == found["blk.2.attn_v.weight"] == "ggml"
    assert set(algorithms(type="q4_k_m").values()) == {"ggml"}


@pytest.mark.parametrize("other", ["rtn", "search", "kmeans"])
def test_algorithms_for_other_layouts_leave_types_to_ggml(other):
    planned = make_plan(CONFIG, Ggml("q4_k", algorithm="gptq"), Ggml("q6_k"))
    assert set(algorithms(plan=planned, algorithm=other).values()) == {"ggml"}
    assert algorithms(plan=planned)[DOWN] == "gptq"
    assert algorithms(plan=planned)[EMBEDDING] == "ggml"
    assert algorithms(plan=planned, algorithm="gptq")[EMBEDDING] == "gptq"


def test_with_statistics_the_mix_is_that_for_importances():
    assert types(type="q4_0")[DOWN] == "q4_0"
    eight = make_config("rrarrarr", width=256, heads=2, mlp_width=512)
    chosen = GgufOptions(type="q4_0", algorithm="gptq").choose(eight)
    assert chosen.types[DOWN] == "q4_1"
    assert types(type="q2_k_s", algorithm="gptq")[DOWN] == "q2_k"


def test_one_source_of_importances():
    with pytest.raises(RequestError, match="--imatrix and --calibration both"):
        GgufOptions(type="q4_k_m", imatrix=Path("x"), algorithm="gptq")
    GgufOptions(type="q4_k_m", imatrix=Path("x"), algorithm="search")


def test_a_plan_replaces_options():
    plan = make_plan(CONFIG, Ggml("q4_k"), Ggml("q4_k"))
    asked = {"type": "q4_0", "pure": True, "tensor_types": ("a=q4_0",), "embedding": "q4_0"}
    words = "leave out the type, pure, tensor types, embedding, imatrix$"
    with pytest.raises(RequestError, match=words):
        GgufOptions(plan=plan, imatrix=Path("x"), **asked)


def test_options_that_are_idle_in_a_file_are_not_where_some_tensor_differs():
    idle = {"pure": True, "imatrix": Path("x")}
    with pytest.raises(
        RequestError, match="--pure and --imatrix change nothing in a file of type q8_0"
    ):
        GgufOptions(type="q8_0", **idle)
    GgufOptions(type="q8_0", tensor_types=("ffn_down=q4_k",), **idle)
    GgufOptions(type="f16", embedding="q4_k", **idle)
    GgufOptions(type="q4_0", **idle)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [("attn_v=q9", "'q9'"), ("(=q8_0", "regular expression"), ("rg_lru=q8_0", "matches no tensor")],
)
def test_overrides_that_are_refused(override, complaint):
    with pytest.raises(RequestError, match=complaint):
        types(type="q4_0", tensor_types=(override,))


@pytest.mark.parametrize(
    ("scheme", "complaint"),
    [
        (Affine(4, 32, symmetric=True), "as int4/32, which GGUF cannot"),
        (Ggml("q4_k"), "as q4_k, which GGUF cannot do for rows of 40; .* such as f16"),
    ],
)
def test_plans_that_gguf_cannot_express(scheme, complaint):
    config = ODD_CONFIGS["not_by_32"]
    plan = make_plan(config, scheme, Float("float32"))
    with pytest.raises(RequestError, match=complaint):
        GgufOptions(plan=plan).choose(config)
