"""What the emitted program looks like; what it computes is test_parity's matter."""

import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest

from rgexport.export.coreml.model import build_model
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.segments import packages, whole
from rgexport.export.coreml.states import Form, state_records, stored_states
from rgexport.export.coreml.storage import Storage
from rgexport.export.trace import trace
from rgexport.griffin.layout import EMBEDDING, model_tensors
from tests.models import make_config

CONFIG = make_config("rra", width=64, heads=2, lru_width=96, window=8)
WHOLE = whole(CONFIG.num_layers)


def built(config=CONFIG, precision="fp16", prefill_length=5, **asked):
    """The model of a configuration, and where its weights lie."""
    options = CoreMLOptions(precision=precision, prefill_length=prefill_length, **asked)
    shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
    (plan,) = packages(config.num_layers, ())
    tensors = Storage(options.resolve_plan(config), shapes, (plan,)).tensors
    program = trace(config, options.form.activation)
    return build_model(program, config, tensors, options.form, plan), tensors


def operations(model, function):
    (block,) = model.mlProgram.functions[function].block_specializations.values()
    return block.operations


def file_values(model, function):
    """Name of a weight and, of a compressed one, of its part → offset in the file of weights."""
    found = {}
    for operation in operations(model, function):
        name = operation.outputs[0].name if operation.outputs else ""
        values = {key: argument.arguments[0].value for key, argument in operation.inputs.items()}
        if operation.type == "const":
            values[""] = operation.attributes["val"]
        for key, value in values.items():
            if value.WhichOneof("value") == "blobFileValue":
                found[name, key] = value.blobFileValue.offset
    return found


@pytest.mark.parametrize(
    "asked",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"precision": "fp16", "compute": "fp32"},
        {"precision": "int8"},
        {"precision": "int4"},
        {"precision": "int4", "symmetric": False, "embedding_precision": "int4"},
        {"precision": "pal4", "embedding_precision": "pal4"},
    ],
    ids=lambda asked: "-".join(map(str, asked.values())),
)
def test_both_functions_share_each_blob_and_use_it_once(asked):
    model, tensors = built(**asked)
    parts = {
        name.replace(".", "_"): [part.offset - 64 for part in stored.parts.values()]
        for name, stored in tensors.items()
    }
    decode, prefill = (file_values(model, name) for name in ("decode", "prefill"))
    assert decode == prefill
    assert Counter(decode.values()) == Counter(
        offset for found in parts.values() for offset in found
    )
    for (name, _), offset in decode.items():
        assert offset in parts[name]


def test_a_weight_takes_no_memory():
    """That of the embedding alone would be 131 MB."""
    config = replace(CONFIG, vocab_size=1 << 20)
    trace(config, "float16")  # what torch keeps for itself does not count
    tracemalloc.start()
    model, tensors = built(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensors[EMBEDDING].parts["data"].nbytes == config.vocab_size * 128
    zeros = 2 * config.vocab_size  # the bias that coremltools gives a linear that has none
    assert peak < 30e6 + 8 * zeros
    assert model.ByteSize() < 1e6 + 2 * zeros


def test_states_are_single_in_half_precision_and_pairs_in_full():
    half, full = (stored_states(CONFIG, Form(5, False, "io", c), WHOLE) for c in ("fp16", "fp32"))
    single = {"layers_0_conv1d", "layers_1_conv1d", "layers_2_key", "layers_2_value"}
    assert half.keys() == single
    assert full.keys() == {f"{name}_{half}" for name in single for half in ("hi", "lo")}
    for shape in (*half.values(), *full.values()):  # as the Neural Engine takes them
        assert len(shape) == 4 and shape[-1] % 32 == 0
    assert half["layers_0_conv1d"] == (1, 1, 3, 96) and half["layers_2_key"] == (1, 1, 8, 32)


@pytest.mark.parametrize(("state", "features"), [("io", set()), ("hilo", {"hi", "lo"})])
def test_the_recurrent_state_is_a_matrix_or_a_pair(state, features):
    form = Form(5, False, state, "fp16")
    model, _ = built(recurrent_state=state)
    for function in model.description.functions:
        inputs = {feature.name for feature in function.input}
        outputs = {feature.name for feature in function.output}
        states = {feature.name for feature in function.state}
        assert ("recurrent_state" in inputs) == ("recurrent_state_out" in outputs) == (not features)
        assert {f"recurrent_state_{half}" for half in features} <= states
        assert states == stored_states(CONFIG, form, WHOLE).keys()
    rows = [record for record in state_records(CONFIG, form) if record.name.endswith("rg_lru")]
    assert [record.name for record in rows] == ["layers.0.rg_lru", "layers.1.rg_lru"]


@pytest.mark.parametrize(
    ("name", "all_logits", "shape"),
    [
        ("decode", True, [1, 1, 256]),
        ("prefill", True, [1, 5, 256]),
        ("prefill", False, [1, 1, 256]),
    ],
)
def test_logits_of_all_tokens_or_of_the_last(name, all_logits, shape):
    model, _ = built(all_logits=all_logits)
    (function,) = (each for each in model.description.functions if each.name == name)
    (logits,) = (each for each in function.output if each.name == "logits")
    assert list(logits.type.multiArrayType.shape) == shape
