"""The manifest of a Core ML artifact, and the interface of its packages: features and states.

Core ML states are float16 of rank 4, padded with zeros to a last axis that is a multiple of 32. A
state that needs more precision is a pair, `hi` and `lo`, with 22 bits. With float32 computation
all states are pairs. The RG-LRU's is always a pair (`hilo`), unless it is a float32 input and
output (`io`).
"""

from dataclasses import dataclass
from typing import Literal

from rgexport.artifacts.coreml.package import PackagePlan, Segment, packages
from rgexport.artifacts.manifest import (
    ACTIVATIONS,
    IoRecord,
    Manifest,
    StateRecord,
    ValueRecord,
)
from rgexport.artifacts.storage import aligned
from rgexport.choices import RecurrentState
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import StateSpec, state_specs

KIND = "coreml"
Shape = tuple[int, ...]

ALIGNMENT = 32
"""The last axis of a state is a multiple of this, for the Neural Engine."""

LO_SCALE = 2048.0
"""x = hi + lo / 2048: the rest after float16's 11 bits is scaled up to have 11 bits again."""

RECURRENT = "recurrent_state"
"""The input with the RG-LRU states of a segment's layers, or the name of their pair of states."""

RECURRENT_OUTPUT = "recurrent_state_out"
"""The output with the new RG-LRU states."""

HIDDEN = "hidden_state"
"""The input of a segment that takes the hidden state from the segment before."""

HIDDEN_OUTPUT = "hidden_state_out"
"""The output of a segment that gives the hidden state to the next one."""


@dataclass(frozen=True)
class Form:
    """The choices that determine the interface of an artifact's packages.

    Attributes:
        prefill_length: number of tokens that the `prefill` functions take.
        all_logits: whether `prefill` gives logits of all its tokens, not of the last alone.
        recurrent_state: where the RG-LRU states are: an input and an output (`io`), or a pair of
            float16 states (`hilo`).
        compute: the word of `--compute`.
    """

    prefill_length: int
    all_logits: bool
    recurrent_state: RecurrentState
    compute: str

    @property
    def pairs(self) -> bool:
        """Whether caches are pairs of states, since computation is in float32."""
        return self.compute == "fp32"

    @property
    def activation(self) -> str:
        """The dtype of activations."""
        return ACTIVATIONS[self.compute]


@dataclass(frozen=True)
class CoreMLRecord:
    """The fields of a manifest that only Core ML artifacts have.

    Attributes:
        prefill_length: number of tokens that the `prefill` functions take.
        all_logits: whether `prefill` gives logits of all its tokens.
        recurrent_state: where the RG-LRU states are; see `Form`.
        blobs: `TENSOR.PART` → SHA-256 of its data, so that altered tensors can be named.
        split: number of layers of each package, if the model is cut into several.
    """

    prefill_length: int
    all_logits: bool
    recurrent_state: RecurrentState
    blobs: dict[str, str]
    split: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CoreMLManifest(Manifest):
    """The manifest of a Core ML artifact."""

    kind: str = KIND
    coreml: CoreMLRecord

    @property
    def packages(self) -> tuple[PackagePlan, ...]:
        """The plans of the artifact's packages."""
        return packages(self.config.num_layers, self.coreml.split)

    @property
    def form(self) -> Form:
        """The choices that determine the interface of the packages."""
        record = self.coreml
        return Form(
            prefill_length=record.prefill_length,
            all_logits=record.all_logits,
            recurrent_state=record.recurrent_state,
            compute=self.compute,
        )


def feature_name(name: str) -> str:
    """Returns a name that Core ML accepts for a state or a site."""
    return name.replace(".", "_")


def recurrent_layers(config: GriffinConfig, segment: Segment) -> list[str]:
    """Returns the names of the RG-LRU states of a segment's layers."""
    specs = {}
    for spec in state_specs(config):
        if _is_recurrent(spec):
            specs[spec.name] = spec
    return list(segment.of_layers(specs))


def pair(name: str) -> tuple[str, str]:
    """Returns the names of the two Core ML states of a pair."""
    return f"{name}_hi", f"{name}_lo"


def stored_states(config: GriffinConfig, form: Form, segment: Segment) -> dict[str, Shape]:
    """Returns the name and the shape [1, 1, rows, columns] of each Core ML state of a segment."""
    shapes = {}
    cached = segment.of_layers(_cached_states(config))
    for name, spec in cached.items():
        feature = feature_name(name)
        shape = _stored_shape(*spec.shape)
        if form.pairs:
            shapes.update(dict.fromkeys(pair(feature), shape))
        else:
            shapes[feature] = shape

    layers = recurrent_layers(config, segment)
    if form.recurrent_state == "hilo" and layers:
        shape = _stored_shape(len(layers), config.lru_width)
        shapes.update(dict.fromkeys(pair(RECURRENT), shape))
    return shapes


def state_records(config: GriffinConfig, form: Form) -> tuple[StateRecord, ...]:
    """Returns the records of all canonical states that packages store, in canonical order."""
    cached = _cached_states(config)
    records = []
    for spec in state_specs(config, form.activation):
        feature = feature_name(spec.name)
        hi, lo = pair(feature)
        if _is_recurrent(spec):
            records.append(_recurrent_record(spec, form))
        elif spec.name in cached and form.pairs:
            records.append(_record(spec, "pair", hi, lo))
        elif spec.name in cached:
            records.append(_record(spec, "canonical", feature, feature))
    return tuple(records)


def io_record(config: GriffinConfig, form: Form, segment: Segment) -> IoRecord:
    """Returns a segment's inputs and outputs, with `tokens` for the number a function takes."""
    inputs = []
    if segment.begins:
        inputs.append(ValueRecord("input_ids", "int32", (1, "tokens")))
    else:
        inputs.append(ValueRecord(HIDDEN, "float32", (1, "tokens", config.width)))
    if segment.layers:
        inputs.append(ValueRecord("position_ids", "int32", (1, "tokens")))

    outputs = []
    if segment.ends:
        num_logits = "tokens" if form.all_logits else 1
        outputs.append(ValueRecord("logits", "float32", (1, num_logits, config.vocab_size)))
    else:
        outputs.append(ValueRecord(HIDDEN_OUTPUT, "float32", (1, "tokens", config.width)))

    layers = recurrent_layers(config, segment)
    if form.recurrent_state == "io" and layers:
        shape = (len(layers), config.lru_width)
        inputs.append(ValueRecord(RECURRENT, "float32", shape))
        outputs.append(ValueRecord(RECURRENT_OUTPUT, "float32", shape))
    return IoRecord(tuple(inputs), tuple(outputs))


def _record(
    spec: StateSpec,
    layout: Literal["canonical", "pair", "row", "hilo"],
    input_name: str,
    output_name: str,
) -> StateRecord:
    return StateRecord(
        name=spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        layout=layout,
        input=input_name,
        output=output_name,
    )


def _recurrent_record(spec: StateSpec, form: Form) -> StateRecord:
    """Returns the record of an RG-LRU state, which is a row of a matrix for all layers."""
    if form.recurrent_state == "io":
        return _record(spec, "row", RECURRENT, RECURRENT_OUTPUT)
    hi, lo = pair(RECURRENT)
    return _record(spec, "hilo", hi, lo)


def _stored_shape(rows: int, columns: int) -> Shape:
    return (1, 1, rows, aligned(columns, ALIGNMENT))


def _cached_states(config: GriffinConfig) -> dict[str, StateSpec]:
    """Returns the states except the RG-LRU's; a convolution of width 1 has none."""
    specs = {}
    for spec in state_specs(config):
        if not _is_recurrent(spec) and spec.shape[0] > 0:
            specs[spec.name] = spec
    return specs


def _is_recurrent(spec: StateSpec) -> bool:
    """Whether a state belongs to an RG-LRU."""
    return spec.name.endswith(".rg_lru")
