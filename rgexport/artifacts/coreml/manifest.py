"""The manifest of a Core ML artifact, and the interface of its packages: features and states.

Core ML states are float16 of rank 4, padded with zeros to a last axis that is a multiple of 32. A
state that needs more precision is a pair, `hi` and `lo`, with 22 bits: all do with float32
computation, the RG-LRU's always (`hilo`), unless it is a float32 input and output (`io`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rgexport.artifacts.coreml.package import PackagePlan, Segment, packages
from rgexport.artifacts.manifest import ACTIVATIONS, IoRecord, Manifest, StateRecord, ValueRecord
from rgexport.artifacts.storage import aligned
from rgexport.choices import RecurrentState
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import StateSpec, state_specs

KIND = "coreml"
Shape = tuple[int, ...]
ALIGNMENT = 32  # the last axis of a state is a multiple of this, for the Neural Engine
LO_SCALE = 2048.0
"""x = hi + lo / 2048: the rest after float16's 11 bits is scaled up to have 11 bits again."""
RECURRENT, RECURRENT_OUTPUT = "recurrent_state", "recurrent_state_out"
HIDDEN, HIDDEN_OUTPUT = "hidden_state", "hidden_state_out"  # between two packages


@dataclass(frozen=True)
class Form:
    prefill_length: int  # tokens that the `prefill` function takes
    all_logits: bool
    recurrent_state: RecurrentState
    """`io`: the RG-LRU's state is an input and an output; `hilo`: a pair of float16 states."""
    compute: str

    @property
    def pairs(self) -> bool:
        return self.compute == "fp32"

    @property
    def activation(self) -> str:
        return ACTIVATIONS[self.compute]


@dataclass(frozen=True)
class CoreMLRecord:
    prefill_length: int
    all_logits: bool
    recurrent_state: RecurrentState
    blobs: dict[str, str]
    """`TENSOR.PART` → SHA-256 of its data, so that altered tensors can be named."""
    split: tuple[int, ...] = ()  # the layers of each package, if the model is cut into several


@dataclass(frozen=True, kw_only=True)
class CoreMLManifest(Manifest):
    kind: str = KIND
    coreml: CoreMLRecord

    @property
    def packages(self) -> tuple[PackagePlan, ...]:
        return packages(self.config.num_layers, self.coreml.split)

    @property
    def form(self) -> Form:
        r = self.coreml
        return Form(r.prefill_length, r.all_logits, r.recurrent_state, self.compute)


def feature_name(name: str) -> str:
    return name.replace(".", "_")


def recurrent_layers(config: GriffinConfig, segment: Segment) -> list[str]:
    names = {spec.name: spec for spec in state_specs(config) if _kind(spec) == "rg_lru"}
    return list(segment.of_layers(names))


def pair(name: str) -> tuple[str, str]:
    return f"{name}_hi", f"{name}_lo"


def stored_states(config: GriffinConfig, form: Form, segment: Segment) -> dict[str, Shape]:
    cached = segment.of_layers({spec.name: spec for spec in _cached(config)})
    states = [(feature_name(name), spec.shape, form.pairs) for name, spec in cached.items()]
    layers = recurrent_layers(config, segment)
    if form.recurrent_state == "hilo" and layers:
        states.append((RECURRENT, (len(layers), config.lru_width), True))
    return {
        feature: (1, 1, count, aligned(width, ALIGNMENT))
        for name, (count, width), paired in states
        for feature in (pair(name) if paired else (name,))
    }


def state_records(config: GriffinConfig, form: Form) -> tuple[StateRecord, ...]:
    stacked: tuple[Literal["row", "hilo"], str, str] = (
        ("row", RECURRENT, RECURRENT_OUTPUT)
        if form.recurrent_state == "io"
        else ("hilo", *pair(RECURRENT))
    )
    cached = {spec.name for spec in _cached(config)}
    records = []
    for spec in state_specs(config, form.activation):
        name, facts = feature_name(spec.name), (spec.name, spec.shape, spec.dtype)
        if _kind(spec) == "rg_lru":
            records.append(StateRecord(*facts, *stacked))
        elif spec.name in cached and form.pairs:
            records.append(StateRecord(*facts, "pair", *pair(name)))
        elif spec.name in cached:
            records.append(StateRecord(*facts, "canonical", name, name))
    return tuple(records)


def io_record(config: GriffinConfig, form: Form, segment: Segment) -> IoRecord:
    """Returns a segment's inputs and outputs, with `tokens` for the number a function takes."""
    logits = "tokens" if form.all_logits else 1
    hidden = "float32", (1, "tokens", config.width)
    ids = "int32", (1, "tokens")
    inputs = [ValueRecord("input_ids", *ids) if segment.begins else ValueRecord(HIDDEN, *hidden)]
    if segment.layers:
        inputs.append(ValueRecord("position_ids", *ids))
    result = ValueRecord("logits", "float32", (1, logits, config.vocab_size))
    outputs = [result if segment.ends else ValueRecord(HIDDEN_OUTPUT, *hidden)]
    layers = recurrent_layers(config, segment)
    if form.recurrent_state == "io" and layers:
        shape = (len(layers), config.lru_width)
        inputs.append(ValueRecord(RECURRENT, "float32", shape))
        outputs.append(ValueRecord(RECURRENT_OUTPUT, "float32", shape))
    return IoRecord(tuple(inputs), tuple(outputs))


def _cached(config: GriffinConfig) -> Iterator[StateSpec]:
    """Yields the states except the RG-LRU's; a convolution of width 1 has none."""
    for spec in state_specs(config):
        if _kind(spec) != "rg_lru" and spec.shape[0] > 0:
            yield spec


def _kind(spec: StateSpec) -> str:
    return spec.name.rpartition(".")[2]
