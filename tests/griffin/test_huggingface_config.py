"""config.json in all dialects, and every way in which it can be wrong."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.huggingface_config import block_pattern, read_config, to_hugging_face
from rgexport.griffin.sizes import CONFIG_2B, CONFIG_9B
from tests.models import ODD_CONFIGS

HUB_2B: dict[str, Any] = {
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 15360,
    "logits_soft_cap": 30.0,
    "lru_width": 2560,
    "model_type": "recurrent_gemma",
    "num_attention_heads": 10,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
"""As google/recurrentgemma-2b has it."""


def read(folder: Path, fields: Any, **options: Any) -> GriffinConfig:
    path = folder / "config.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return read_config(path, **options)


def without(*names: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in HUB_2B.items() if key not in names} | changes


def test_the_dialect_of_2b(tmp_path: Path) -> None:
    assert read(tmp_path, HUB_2B) == CONFIG_2B


def test_the_dialect_of_9b(tmp_path: Path) -> None:
    fields = without(
        "_block_types",
        block_types=["recurrent", "recurrent", "attention"],
        hidden_size=4096,
        lru_width=4096,
        intermediate_size=24576,
        num_attention_heads=16,
        num_hidden_layers=38,
    )
    assert read(tmp_path, fields) == CONFIG_9B


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_theta": 5000, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "default", "rope_theta": 5000.0}},
        {"rope_scaling": None, "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 5000.0, "rope_parameters": {"rope_theta": 5000.0}},
    ],
)
def test_old_and_new_rope_fields(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = read(tmp_path, without("rope_theta", "partial_rotary_factor", **rope))
    assert (config.rope_theta, config.rope_dims) == (5000.0, 128)


def test_missing_fields_mean_what_transformers_makes_of_them(tmp_path: Path) -> None:
    config = read(tmp_path, {"model_type": "recurrent_gemma", "num_key_value_heads": 1})
    assert (config.width, config.lru_width, config.head_dim) == (2560, 2560, 256)
    assert config.mlp_width == 3840  # the class's default is not that of 2B
    assert config.block_types == CONFIG_2B.block_types
    assert (config.window, config.soft_cap, config.embedding_scale) == (2048, 30.0, 50.5)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"lru_width": None}, "lru_width", 2560),
        ({"lru_width": 2600}, "lru_width", 2600),
        ({"embeddings_scale_by_sqrt_dim": False}, "embedding_scale", 1.0),
        ({"logits_soft_cap": None}, "soft_cap", 0.0),
        ({"logits_soft_cap": 0}, "soft_cap", 0.0),
        ({"num_hidden_layers": 1}, "block_types", ("recurrent",)),
        ({"_block_types": ["attention"]}, "block_types", ("attention",) * 26),
        ({"partial_rotary_factor": 1.0}, "rope_dims", 256),
        ({"head_dim": 64}, "rope_dims", 32),
        ({"num_attention_heads": 1, "num_key_value_heads": None}, "num_heads", 1),
        ({"hidden_size": 2560.0}, "width", 2560),
    ],
)
def test_one_field(tmp_path: Path, change: dict[str, Any], field: str, value: object) -> None:
    assert getattr(read(tmp_path, HUB_2B | change), field) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; expected 'recurrent_gemma'"),
        ({"model_type": None, "architectures": None}, "model_type is None"),
        ({"architectures": ["GemmaForCausalLM"]}, "architectures is .*GemmaForCausalLM"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; expected 1"),
        ({"num_key_value_heads": None}, "num_key_value_heads is None; expected 1"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ({"attention_bias": True}, "attention_bias is True; expected false"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"hidden_size": "big"}, "hidden_size is 'big'; expected a whole number"),
        ({"hidden_size": 10**40}, "hidden_size is 1000.*; expected a whole number"),
        ({"hidden_size": 2561, "head_dim": None}, "num_attention_heads is 10; expected a divisor"),
        ({"architectures": [["nested"]]}, "architectures is"),
        ({"architectures": {"a": 1}}, "architectures is"),
        ({"lru_width": 2561}, "num_attention_heads is 10; expected a divisor of the RG-LRU"),
        ({"vocab_size": 0}, "vocab_size is 0; expected a whole number from 1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 15361}, "intermediate_size is 15361; expected an even number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; expected .* from 1 to 512"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"_block_types": []}, "_block_types is \\[\\]; expected a list"),
        ({"_block_types": "recurrent"}, "_block_types is 'recurrent'; expected a list"),
        ({"_block_types": ["mamba"]}, "_block_types is \\['mamba'\\]"),
        ({"_block_types": [["recurrent"]]}, "_block_types"),
        ({"block_types": ["attention"]}, "block_types and _block_types differ"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type is 'linear'; expected 'default'"),
        ({"rope_parameters": {"type": "yarn"}}, "type is 'yarn'; expected 'default'"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta is 1.0; expected 10000"),
        ({"rope_parameters": 7}, "rope_parameters is 7; expected an object"),
        ({"rope_theta": 0}, "rope_theta is 0; expected a number above 0"),
        ({"rope_theta": [1]}, "rope_theta is \\[1\\]"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; expected at most 1"),
        ({"head_dim": 10}, "RoPE would rotate 5 of 10 dimensions"),
        ({"conv1d_width": 1}, "conv1d_width is 1"),
        ({"logits_soft_cap": -1}, "logits_soft_cap is -1; expected a number of at least 0"),
        ({"embeddings_scale_by_sqrt_dim": 1}, "expected true or false"),
    ],
)
def test_wrong_fields(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(tmp_path, HUB_2B | change)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("recurrent", {"hidden_size": 2562, "head_dim": None}),
        ("recurrent", {"head_dim": 10}),
        ("attention", {"lru_width": 2561}),
    ],
)
def test_sizes_that_no_layer_uses_are_not_checked(
    tmp_path: Path, kind: str, change: dict[str, Any]
) -> None:
    assert read(tmp_path, HUB_2B | change | {"_block_types": [kind]}).num_layers == 26
    with pytest.raises(RequestError):
        read(tmp_path, HUB_2B | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "holds list"), ("{", "is not JSON"), ("[" * 100_000, "is not JSON")],
)
def test_config_that_is_no_json_object(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(tmp_path, text)


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="NaN is no number"):
        read(tmp_path, json.dumps(HUB_2B | {"rms_norm_eps": float("nan")}))


def test_options_fill_in_but_never_contradict(tmp_path: Path) -> None:
    bare = without("attention_window_size", "logits_soft_cap")
    config = read(tmp_path, bare, window=96, soft_cap=0.0)
    assert (config.window, config.soft_cap) == (96, 0.0)
    assert read(tmp_path, HUB_2B, window=2048, soft_cap=30.0) == CONFIG_2B
    assert read(tmp_path, HUB_2B, window=96) == dataclasses.replace(CONFIG_2B, window=96)
    with pytest.raises(RequestError, match="attention_window_size 2048, --window says 4096"):
        read(tmp_path, HUB_2B, window=4096)
    with pytest.raises(RequestError, match=r"logits_soft_cap 30.0, --soft-cap says 0"):
        read(tmp_path, HUB_2B, soft_cap=0.0)


@pytest.mark.parametrize("name", ODD_CONFIGS)
@pytest.mark.parametrize("dialect", ["_block_types", "block_types"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str, dialect: Any) -> None:
    config = ODD_CONFIGS[name]
    fields = to_hugging_face(config, dialect)
    assert dialect in fields
    assert read(tmp_path, fields) == config


@given(st.lists(st.sampled_from(["recurrent", "attention"]), min_size=1, max_size=12))
def test_the_pattern_repeats_to_the_layers(types: Any) -> None:
    pattern = block_pattern(tuple(types))
    assert list((pattern * len(types))[: len(types)]) == types
    assert len(pattern) <= len(types)
