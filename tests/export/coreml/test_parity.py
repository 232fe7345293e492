"""Saved packages, run by the tests' own interpreter, against DeepMind's implementation."""

from collections.abc import Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import types
from coremltools.proto import MIL_pb2
from torch import Tensor

from rgexport.export.artifact import Artifact
from rgexport.griffin.config import GriffinConfig
from tests.artifacts import export_random_coreml
from tests.mil_oracle import Function, Oracle
from tests.models import ODD_CONFIGS, deepmind_logits, deepmind_model, make_config

FP32, FP16, STATE, SCAN, EXACT = 2e-4, 3e-2, 5e-4, 1e-5, 1e-5
"""Largest errors allowed, as shares of the largest number: logits with float32 arithmetic and
float16 states, logits with float16 linears, the RG-LRU's state end to end, the scan by itself,
logits where nothing is rounded to float16."""
RECURRENT_STATES = ("io", "hilo")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of small products are faster without threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Conversation:
    """One sequence of tokens through the two functions of a package."""

    def __init__(self, oracle: Oracle, config: GriffinConfig) -> None:
        self.oracle, self.states, self.position = oracle, oracle.new_state(), 0
        self.prefill_length = oracle.functions["prefill"].inputs["input_ids"][1][1]
        layers = config.block_types.count("recurrent")
        self.io = "recurrent_state" in oracle.functions["decode"].inputs
        self.rows = torch.zeros(layers, config.lru_width)
        self.kept: list[dict[str, Tensor]] = []

    def take(self, tokens: np.ndarray, *, chunks: bool, keep: Iterable[str] = ()) -> np.ndarray:
        """The logits [T, V] of `tokens` [T], in whole chunks as far as they go, or one by one.

        The last chunk may be ragged: its tokens are decoded one by one.
        """
        logits = []
        while len(tokens):
            whole = chunks and len(tokens) >= self.prefill_length
            count = self.prefill_length if whole else 1
            outputs = self._run("prefill" if whole else "decode", tokens[:count], keep)
            logits.append(outputs["logits"][0].numpy())
            tokens = tokens[count:]
        return np.concatenate(logits)

    def _run(self, function: str, tokens: np.ndarray, keep: Iterable[str]) -> dict[str, Tensor]:
        positions = np.arange(self.position, self.position + len(tokens))
        inputs: dict[str, Any] = {"input_ids": tokens[None], "position_ids": positions[None]}
        if self.io:
            inputs["recurrent_state"] = self.rows.numpy()
        outputs = self.oracle.run(function, inputs, self.states, keep)
        self.position += len(tokens)
        self.kept.append({name: outputs[name] for name in keep})
        if self.io:
            self.rows = outputs["recurrent_state_out"]
        return outputs

    def recurrent_states(self) -> np.ndarray:
        """The RG-LRU's states, float64 [recurrent layers, lru_width]."""
        if self.io or not len(self.rows):
            return self.rows.double().numpy()
        layers, width = self.rows.shape
        hi, lo = (self.states[f"recurrent_state_{part}"].double().numpy() for part in ("hi", "lo"))
        return (hi + lo / 2048)[0, 0, :layers, :width]


def _tokens(config: GriffinConfig, length: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, length)


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _oracle(artifact: Artifact, *, rounding: bool = True) -> Oracle:
    return Oracle(artifact.path / "model.mlpackage", rounding=rounding)


@torch.no_grad()
def _deepmind_states(model: Any, tokens: np.ndarray) -> np.ndarray:
    positions = torch.arange(len(tokens))[None]
    _, cache = model(torch.from_numpy(tokens)[None], positions, return_logits=False)
    states = [getattr(block, "rg_lru_state", None) for block in cache.values()]
    return np.stack([state[0].numpy() for state in states if state is not None])


@pytest.mark.parametrize(
    ("name", "recurrent_state", "beyond_window"),
    zip(ODD_CONFIGS, cycle(RECURRENT_STATES), cycle([-9, -9, 5, 5])),
)
def test_fp32_equals_deepmind(
    name: str, recurrent_state: str, beyond_window: int, tmp_path: Path
) -> None:
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_coreml(
        config,
        tmp_path,
        "fp32",
        all_logits=True,
        prefill_length=config.window + beyond_window,
        recurrent_state=recurrent_state,
    )
    tokens = _tokens(config, 4 * config.window + 3)
    model = deepmind_model(config, weights)
    expected = deepmind_logits(model, tokens[None])[0]
    for rounding, chunks, limit in ((True, False, FP32), (True, True, FP32), (False, True, EXACT)):
        conversation = Conversation(_oracle(artifact, rounding=rounding), config)
        assert _distance(conversation.take(tokens, chunks=chunks), expected) <= limit
        if len(conversation.rows):
            states = _deepmind_states(model, tokens)
            assert _distance(conversation.recurrent_states(), states) <= STATE


@pytest.mark.parametrize("name", ["regular", "not_by_32", "hawk", "attention_only"])
def test_fp16_is_near_deepmind(name: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_coreml(
        config, tmp_path, "fp16", all_logits=True, prefill_length=9
    )
    tokens = _tokens(config, 4 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens[None])[0]
    for chunks in (False, True):
        found = Conversation(_oracle(artifact), config).take(tokens, chunks=chunks)
        assert _distance(found, expected) <= FP16


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp16", {}),
        ("int8", {}),
        ("int4", {}),
        ("int4", {"symmetric": False, "compute": "fp32"}),
        ("pal4", {}),
        ("int4", {"embedding_precision": "pal4", "compute": "fp32"}),
    ],
)
def test_stored_weights_are_those_of_the_artifact(
    precision: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """What the artifact says it holds, in DeepMind's model, gives what the package computes."""
    config = ODD_CONFIGS["narrow_lru"]
    artifact, weights = export_random_coreml(
        config, tmp_path, precision, all_logits=True, prefill_length=5, **options
    )
    held = {name: artifact.tensor(name).whole() for name in weights}
    tokens = _tokens(config, 2 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, held), tokens[None])[0]
    found = Conversation(_oracle(artifact, rounding=False), config).take(tokens, chunks=True)
    assert _distance(found, expected) <= EXACT


def test_last_logits_alone_are_the_last_of_all(tmp_path: Path) -> None:
    config = ODD_CONFIGS["irregular"]
    last, _ = export_random_coreml(config, tmp_path, "fp32", prefill_length=6)
    every, _ = export_random_coreml(config, tmp_path, "fp32", prefill_length=6, all_logits=True)
    tokens = _tokens(config, 12)
    found = Conversation(_oracle(last), config).take(tokens, chunks=True)
    expected = Conversation(_oracle(every), config).take(tokens, chunks=True)
    assert found.shape == (2, config.vocab_size)
    assert _distance(found, expected[[5, 11]]) <= EXACT


def test_conversations_do_not_meet(tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    oracle = _oracle(export_random_coreml(config, tmp_path, "fp16", prefill_length=4)[0])
    tokens = [_tokens(config, 22, seed) for seed in (1, 2)]
    apart = [Conversation(oracle, config).take(each, chunks=False) for each in tokens]
    both = [Conversation(oracle, config) for _ in tokens]
    mixed: list[list[np.ndarray]] = [[], []]
    for step in range(22):
        for row, conversation in enumerate(both):
            mixed[row].append(conversation.take(tokens[row][step : step + 1], chunks=False))
    for row in range(2):
        assert np.array_equal(np.concatenate(mixed[row]), apart[row])


def _scan_operands(decode: Function) -> tuple[str, str]:
    """The names of a and b of the only layer's scan `h = b + a · h0`.

    Both functions compute a and b by the same operations, under the same names.
    """
    calls = {call.output: call for call in decode.calls if call.op != "write_state"}

    def arguments(name: str) -> list[str]:
        given = calls[name].arguments.values() if name in calls else ()
        return [value[0] for value in given if isinstance(value, tuple)]

    def has_state(name: str) -> bool:
        return name.startswith("recurrent_state") or any(map(has_state, arguments(name)))

    b, product = sorted(arguments("layers_0_temporal_block_rg_lru"), key=has_state)
    a, _ = sorted(arguments(product), key=has_state)
    return a, b


@pytest.mark.parametrize("recurrent_state", RECURRENT_STATES)
def test_scan_of_4096_steps_on_equal_inputs(recurrent_state: str, tmp_path: Path) -> None:
    config = make_config("r", width=64, heads=2, mlp_width=32, vocab_size=64)
    artifact, _ = export_random_coreml(
        config, tmp_path, "fp32", prefill_length=128, recurrent_state=recurrent_state
    )
    oracle = _oracle(artifact)
    operands = _scan_operands(oracle.functions["decode"])
    tokens = _tokens(config, 4096)
    for chunks in (False, True):
        conversation = Conversation(oracle, config)
        conversation.take(tokens, chunks=chunks, keep=operands)
        a, b = (
            torch.cat([kept[name].reshape(-1, config.lru_width) for kept in conversation.kept])
            for name in operands
        )
        assert len(a) == len(b) == len(tokens)
        h = torch.zeros(config.lru_width, dtype=torch.float64)
        for step in range(len(tokens)):
            h = a[step].double() * h + b[step].double()
        assert _distance(conversation.recurrent_states()[0], h.numpy()) <= SCAN


@pytest.mark.parametrize("precision", ["fp32", "int4", "pal4"])
def test_coremltools_rebuilds_the_program(precision: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS["wide_lru"]
    artifact, _ = export_random_coreml(config, tmp_path, precision, recurrent_state="hilo")
    path = str(artifact.path / "model.mlpackage")
    for name in ("prefill", "decode"):
        model = ct.models.MLModel(path, skip_model_load=True, function_name=name)
    with pytest.raises(ValueError, match="not found"):
        ct.models.MLModel(path, skip_model_load=True, function_name="main")
    spec = model.get_spec()
    assert spec.description.defaultFunctionName == "decode"
    program = load_program(spec, spec.specificationVersion, model.weights_dir)
    assert program.functions.keys() == {"decode", "prefill"}
    for name, function in program.functions.items():
        declared = _declared(spec.mlProgram.functions[name])
        inferred = {
            value.name: (types.builtin_to_string(value.dtype), tuple(value.shape))
            for operation in function.operations
            for value in operation.outputs
        }
        assert declared.keys() <= inferred.keys()
        assert {key: inferred[key] for key in declared} == declared


def _declared(function: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the saved program says of its values."""
    words = {"FLOAT16": "fp16", "FLOAT32": "fp32", "INT32": "int32", "BOOL": "bool"}
    found = {}
    for operation in function.block_specializations[function.opset].operations:
        for output in operation.outputs:
            tensor = output.type.tensorType
            dtype = MIL_pb2.DataType.Name(tensor.dataType)
            shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
            found[output.name] = (words.get(dtype, dtype.lower()), shape)
    return found
