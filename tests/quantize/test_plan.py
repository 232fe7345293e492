import json
from pathlib import Path
from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.quantize.plan import (
    COREML_PRECISIONS,
    WEB_PRECISIONS,
    choose_scheme,
    load_plan,
    make_plan,
    precision_of,
)
from rgexport.quantize.scheme import (
    Affine,
    Float,
    Palette,
    Plan,
    Scheme,
    scheme_from_dict,
    scheme_to_dict,
)
from tests.models import ODD_CONFIGS

CONFIG = ODD_CONFIGS["irregular"]
LINEAR = "layers.0.mlp_block.up_proj.weight"
LINEAR_BIAS = "layers.0.mlp_block.up_proj.bias"
GATE = "layers.0.temporal_block.rg_lru.input_gate_weight"
GATE_BIAS = "layers.0.temporal_block.rg_lru.input_gate_bias"
CONV_BIAS = "layers.0.temporal_block.conv_1d.bias"


def _plan() -> Plan:
    return make_plan(CONFIG, Affine(4, 32, symmetric=False), Affine(8, 64, symmetric=True))


def _written(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    entries = {name: scheme_to_dict(scheme) for name, scheme in _plan().items()}
    path = folder / "plan.json"
    path.write_text(json.dumps({"plan": entries | (changes or {})}))
    return path


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({LINEAR: {"kind": "affine", "bits": 4, "block": 32.0, "symmetric": True}}, "block = 32.0"),
        ({LINEAR: {"kind": "affine", "bits": 4, "block": 32, "symmetric": 0}}, "symmetric = 0"),
        ({LINEAR: {"kind": "affine", "bits": 4}}, "expected bits, block, symmetric"),
        ({LINEAR: {"kind": "codebook"}}, "kind 'codebook'"),
        ({LINEAR: {"kind": "affine", "bits": 4, "block": 0, "symmetric": True}}, "block = 0"),
        ({LINEAR: {"kind": "affine", "bits": 4, "block": True, "symmetric": True}}, "block = True"),
        ({LINEAR: {"kind": "palette", "bits": 8}}, "bits = 8"),
        ({LINEAR: {"kind": "palette", "algorithm": "rtn"}}, "algorithm = 'rtn'; expected kmeans"),
        ({LINEAR: {"kind": "palette", "group": None}}, "a whole number"),
        ({LINEAR: "int4"}, "kind None"),
        ({"final_norm.weight": {"kind": "float", "dtype": "float16"}}, "expected float32$"),
        ({"final_norm.weight": {"kind": "ggml", "type": "f16"}}, "expected float32$"),
        ({CONV_BIAS: {"kind": "float", "dtype": "float16"}}, "expected float32$"),
        ({LINEAR_BIAS: {"kind": "palette"}}, "expected float32 or float16$"),
        ({GATE: {"kind": "float", "dtype": "float16"}}, "expected float32 or bfloat16$"),
        ({GATE_BIAS: {"kind": "float", "dtype": "bfloat16"}}, "a gate .* expected float32$"),
        ({LINEAR: {"kind": "float", "dtype": "bfloat16"}}, "only the matrices of gates"),
        ({LINEAR: {"kind": "ggml", "type": "q4_k_m"}}, "type = 'q4_k_m'"),
        ({"layers.9.mlp_block.up_proj.weight": {}}, "layers.9"),
    ],
)
def test_wrong_plans(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=complaint) as refusal:
        load_plan(_written(tmp_path, changes), CONFIG)
    assert "plan.json" in str(refusal.value)


@pytest.mark.parametrize("word", COREML_PRECISIONS)
def test_a_plan_is_called_by_its_coarsest_tensor(word: str) -> None:
    scheme = choose_scheme(word, words=COREML_PRECISIONS)
    assert precision_of(make_plan(CONFIG, scheme, scheme)) == word
    assert precision_of(make_plan(CONFIG, scheme, Float("float32"))) == word


def test_a_plan_may_have_the_schemes_of_core_ml(tmp_path: Path) -> None:
    """As `inspect --json` prints them."""
    schemes: dict[str, Scheme] = {
        LINEAR: Palette(group=7, lut="float32"),
        "layers.0.mlp_block.gate_proj.weight": Affine(4, 10, symmetric=True, scale="float16"),
        "embed_tokens.weight": Affine(8, None, symmetric=False, scale="float16"),
        LINEAR_BIAS: Float("float16"),
    }
    changes = {name: scheme_to_dict(scheme) for name, scheme in schemes.items()}
    plan = load_plan(_written(tmp_path, changes), CONFIG)
    assert plan == _plan() | schemes


def test_a_scheme_of_an_older_manifest_has_float32_scales() -> None:
    older = {"kind": "affine", "bits": 4, "block": 32, "symmetric": True, "algorithm": "rtn"}
    assert scheme_from_dict(older) == Affine(4, 32, symmetric=True, scale="float32")


def test_options_that_are_not_given_have_the_precision_s_defaults() -> None:
    assert choose_scheme("int4", 64) == Affine(4, 64, symmetric=True)
    assert choose_scheme("int4") == Affine(4, 32, symmetric=True)
    assert choose_scheme("int8") == Affine(8, 128, symmetric=True)
    assert choose_scheme("int4", symmetric=False) == Affine(4, 32, symmetric=False)
    assert choose_scheme("int4", words=WEB_PRECISIONS) == Affine(4, 128, symmetric=False)
