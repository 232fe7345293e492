"""Names, shapes and values of tensors on their way into a GGUF file and back."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.export.gguf.naming import FileTensor, file_tensors
from rgexport.griffin.layout import model_tensors
from tests.models import ODD_CONFIGS, random_weights

NORMS = ("temporal_pre_norm.weight", "channel_pre_norm.weight", "final_norm.weight")


def named(config_name: str) -> dict[str, FileTensor]:
    return {tensor.name: tensor for tensor in file_tensors(ODD_CONFIGS[config_name])}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_every_tensor_has_a_place_and_comes_back(name):
    config = ODD_CONFIGS[name]
    weights = random_weights(config)
    tensors = file_tensors(config)
    assert {t.canonical for t in tensors} == model_tensors(config).keys()
    assert len({t.name for t in tensors}) == len(tensors)
    for tensor in tensors:
        original = weights[tensor.canonical]
        stored = tensor.transform.store(original)
        assert stored.dtype == np.float32 and stored.size == np.prod(tensor.shape)
        restored = tensor.transform.restore(stored)
        rounded = tensor.canonical.endswith((*NORMS, "recurrent_param"))
        limits = {"rtol": 1e-6, "atol": 1.2e-7} if rounded else {"rtol": 0, "atol": 0}
        np.testing.assert_allclose(restored, original, **limits)


def test_order_is_that_of_llama_cpp():
    """`weight_name_comparer`: by the number after `blk.` (-1 without one), then by the name."""
    config = replace(ODD_CONFIGS["irregular"], block_types=("recurrent", "attention") * 6)
    names = [tensor.name for tensor in file_tensors(config)]
    assert names[:2] == ["output_norm.weight", "token_embd.weight"]
    keys = [(int(name.split(".")[1]), name) for name in names[2:]]
    assert keys == sorted(keys) and keys[-1][0] == 11


def test_shapes_and_what_may_be_quantized():
    tensors = named("wide_lru")  # width 64, 4 blocks of 24, 4 heads of 16
    shapes = {name.removeprefix("blk.0."): tensor.shape for name, tensor in tensors.items()}
    assert shapes["token_embd.weight"] == (256, 64)
    assert shapes["ssm_in.weight"] == shapes["attn_gate.weight"] == (96, 64)
    assert shapes["ssm_out.weight"] == (64, 96)
    assert shapes["ssm_conv1d.weight"] == (96, 4)
    assert shapes["ssm_a"] == shapes["rg_lru_a_gate.bias"] == (96,)
    assert shapes["rg_lru_input_gate.weight"] == (4, 24, 24)
    assert tensors["blk.2.attn_k.weight"].shape == (16, 64)
    alone = named("one_head")["blk.0.rg_lru_a_gate.weight"]  # ggml drops an outermost 1
    assert alone.shape == (64, 64) and not alone.quantizable
    quantizable = {name.split(".")[-2] for name, t in tensors.items() if t.quantizable}
    linears = {"attn_gate", "ffn_gate", "ffn_up", "ffn_down", "ssm_in", "ssm_out"}
    attention = {"attn_q", "attn_k", "attn_v", "attn_output"}
    assert quantizable == linears | attention | {"token_embd"}


def test_stored_values():
    config, weights = ODD_CONFIGS["wide_lru"], random_weights(ODD_CONFIGS["wide_lru"])
    by_canonical = {tensor.canonical: tensor for tensor in file_tensors(config)}

    def stored(name: str) -> np.ndarray:
        tensor = by_canonical[name]
        return tensor.transform.store(weights[name]).reshape(tensor.shape)

    for name in weights:
        if name.endswith(NORMS):
            np.testing.assert_array_equal(stored(name), weights[name] + 1)
    gate = "layers.0.temporal_block.rg_lru.recurrent_gate_weight"
    np.testing.assert_array_equal(stored(gate)[2, 5], weights[gate][2, :, 5])
    conv = "layers.0.temporal_block.conv_1d.weight"
    np.testing.assert_array_equal(stored(conv)[7], weights[conv][7, 0])
    a_param = "layers.0.temporal_block.rg_lru.recurrent_param"
    exact = -8 * np.logaddexp(0, weights[a_param].astype(np.float64))
    np.testing.assert_array_equal(stored(a_param), exact.astype(np.float32))


@given(st.floats(-80, 60, width=32))
def test_decay_has_an_inverse(value):
    transform = named("hawk")["blk.0.ssm_a"].transform
    a_param = np.array([value], np.float32)
    decay = transform.store(a_param)
    assert decay < 0
    restored = transform.restore(decay)
    np.testing.assert_allclose(restored, a_param, rtol=3e-7, atol=2e-7)
    np.testing.assert_allclose(transform.store(restored), decay, rtol=3e-7)


def test_extreme_decays_stay_finite():
    transform = named("hawk")["blk.0.ssm_a"].transform
    a_param = np.array([-1e4, -200, 200, 3e38], np.float32)
    with np.errstate(over="ignore"):
        decay = transform.store(a_param)
    assert np.isfinite(transform.restore(np.maximum(decay, -3e38))).all()
