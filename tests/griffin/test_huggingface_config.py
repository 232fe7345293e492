"""config.json in all dialects, and every way in which it can be wrong."""

import dataclasses
import json

import pytest

from rgexport.errors import RequestError
from rgexport.griffin.config import CONFIG_2B, CONFIG_9B
from rgexport.griffin.huggingface_config import read_config

HUB_2B = json.loads("""{
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma",
    "attention_bias": false, "attention_window_size": 2048, "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": true, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2560, "intermediate_size": 15360,
    "logits_soft_cap": 30.0, "lru_width": 2560, "num_attention_heads": 10,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "vocab_size": 256000
}""")
"""As google/recurrentgemma-2b has it."""
HUB_9B = {name: value for name, value in HUB_2B.items() if name != "_block_types"} | {
    "block_types": ["recurrent", "recurrent", "attention"],
    **{"hidden_size": 4096, "lru_width": 4096, "intermediate_size": 24576},
    **{"num_attention_heads": 16, "num_hidden_layers": 38},
}


def read(folder, fields, **options):
    path = folder / "config.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return read_config(path, **options)


def without(*names):
    return {key: value for key, value in HUB_2B.items() if key not in names}


def test_the_released_dialects(tmp_path):
    assert read(tmp_path, HUB_2B) == CONFIG_2B
    assert read(tmp_path, HUB_9B) == CONFIG_9B


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_theta": 5000, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "default", "rope_theta": 5000.0}},
        {"rope_scaling": None, "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ],
)
def test_old_and_new_rope_fields(tmp_path, rope):
    config = read(tmp_path, without("rope_theta", "partial_rotary_factor") | rope)
    assert (config.rope_theta, config.rope_dims) == (5000.0, 128)


def test_missing_fields_mean_what_transformers_makes_of_them(tmp_path):
    config = read(tmp_path, {"model_type": "recurrent_gemma", "num_key_value_heads": 1})
    assert (config.width, config.lru_width, config.head_dim) == (2560, 2560, 256)
    assert config.mlp_width == 3840  # the class's default is not that of 2B
    assert config.block_types == CONFIG_2B.block_types
    assert (config.window, config.soft_cap, config.embedding_scale) == (2048, 30.0, 50.5)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"lru_width": None}, "lru_width", 2560),
        ({"embeddings_scale_by_sqrt_dim": False}, "embedding_scale", 1.0),
        ({"_block_types": ["attention"], "lru_width": 2561}, "block_types", ("attention",) * 26),
        ({"num_attention_heads": 1, "num_key_value_heads": None}, "num_heads", 1),
    ],
)
def test_one_field(tmp_path, change, field, value):
    assert getattr(read(tmp_path, HUB_2B | change), field) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; expected 'recurrent_gemma'"),
        ({"architectures": ["GemmaForCausalLM"]}, "architectures is .*GemmaForCausalLM"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; expected 1"),
        ({"attention_bias": True}, "attention_bias is True; expected false"),
        ({"quantization_config": {"bits": 4}}, "weights are quantized"),
        ({"hidden_size": 10**40}, "hidden_size is 1000.*; expected a number from 1 to"),
        ({"lru_width": 2561}, "num_attention_heads is 10; expected a divisor of lru_width"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; expected .* from 1 to 512"),
        ({"_block_types": [["recurrent"]]}, "_block_types"),
        ({"block_types": ["attention"]}, "block_types and _block_types differ"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type is 'linear'; expected 'default'"),
        ({"rope_parameters": 7}, "rope_parameters is 7; expected an object"),
        ({"rope_theta": 0}, "rope_theta is 0; expected a number from 1e-30"),
        ({"head_dim": 10}, "RoPE would rotate 5 of 10 dimensions"),
        ({"logits_soft_cap": -1}, "logits_soft_cap is -1; expected a number from 0 to"),
        ({"rms_norm_eps": float("nan")}, "NaN is no number"),
        ("[1, 2]", "holds list"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_wrong_fields(tmp_path, change, message):
    with pytest.raises(RequestError, match=message) as caught:
        read(tmp_path, change if isinstance(change, str) else HUB_2B | change)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_options_fill_in_but_never_contradict(tmp_path):
    bare = without("attention_window_size", "logits_soft_cap")
    config = read(tmp_path, bare, window=96, soft_cap=0.0)
    assert (config.window, config.soft_cap) == (96, 0.0)
    assert read(tmp_path, HUB_2B, window=96) == dataclasses.replace(CONFIG_2B, window=96)
    with pytest.raises(RequestError, match="attention_window_size 2048, --window says 4096"):
        read(tmp_path, HUB_2B, window=4096)
    with pytest.raises(RequestError, match=r"logits_soft_cap 30.0, --soft-cap says 0"):
        read(tmp_path, HUB_2B, soft_cap=0.0)
