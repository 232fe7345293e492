"""Reads `model.onnx`, prepares it for ONNX Runtime, and tells which native kernels it runs on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from rgexport.artifacts.manifest import Manifest, ValueRecord
from rgexport.artifacts.onnx.messages import LOCATIONS, parse_model
from rgexport.files.paths import read_regular, stays_inside
from rgexport.kernels.onnx import library

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

NUM_LOGITS = "num_logits"
"""Number of last tokens whose logits the graph returns: a scalar int64, constant in the file."""

DOMAIN = "ai.rgexport"
"""Domain of the ops that rgexport has kernels for."""

VERSION = 2
"""Version of the domain in files that are written now."""

SINCE = {"RgLruScan": 2}
"""Op → the first version of the domain that kernels implement, if not 1; else the body runs."""

STOCK = "stock"

MAX_NODES = 100_000
"""Limit of the nodes that are read: forty times as many as a 9B has."""

_MAX_RANK = 8
_INT64 = 7
_DTYPES = {1: "float32", 2: "uint8", 6: "int32", _INT64: "int64", 10: "float16", 16: "bfloat16"}
"""Number of a dtype in onnx.proto → its name."""

_STOCK_PRODUCTS = {"MatMul", "MatMulNBits", "Gemm"}
"""Ops of the engine that sum in another order for other numbers of tokens."""

_MOST_FOLDED_ELEMENTS = 1 << 16
"""A tensor of fewer elements is read by the engine to fold constants; a larger one is repacked."""


@dataclass(frozen=True)
class ModelNode:
    """A node of the main graph: its type, its domain, and the names of its inputs."""

    op: str
    domain: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor with its data in another file.

    Attributes:
        name: its name in the graph.
        data_type: the number of its dtype in onnx.proto.
        shape: its sizes.
        file: the file's path, relative to the model file.
        offset: the first byte of the data in the file.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True)
class ModelFile:
    """The contents of a model file; empty if it is damaged, since ONNX Runtime will refuse it.

    Attributes:
        nodes: the nodes of the main graph.
        tensors: the weights of the main graph, in data files inside the artifact.
        inputs: the graph's inputs.
        outputs: the graph's outputs.
        versions: domain → its version.
    """

    nodes: tuple[ModelNode, ...] = ()
    tensors: tuple[ExternalTensor, ...] = ()
    inputs: tuple[ValueRecord, ...] = ()
    outputs: tuple[ValueRecord, ...] = ()
    versions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class NativeOps:
    """The ops of a model in rgexport's domain, and the kernels that run them on this machine.

    Attributes:
        ops: type of an op → number of its nodes.
        native: the types that have a native kernel; the bodies of the others run.
        library: the library to register with the engine; None if no op is native.
        kernels: `native` and the instruction set, or `stock`.
        reason: why no op is native; empty if one is.
        weights: external tensors that kernels read in place: the engine does not repack them.
        small: external tensors that the engine reads by itself, to fold constants.
        exact_tokens: largest step, in tokens of all rows, in which each token gets the bits that
            it has in a step of its own.
    """

    ops: dict[str, int] = field(default_factory=dict)
    native: tuple[str, ...] = ()
    library: Path | None = None
    kernels: str = STOCK
    reason: str = ""
    weights: tuple[ExternalTensor, ...] = ()
    small: tuple[ExternalTensor, ...] = ()
    exact_tokens: int = 1


def read_graph(path: Path) -> bytes:
    """Returns the serialized model of a file.

    Raises:
        RequestError: the file is no regular one, or larger than any graph without its weights.
    """
    return read_regular(path)


def read_model(model: bytes) -> ModelFile:
    """Returns the contents of a serialized model; empty ones if it is damaged or too large."""
    try:
        message = parse_model(model)
        if len(message.graph.node) > MAX_NODES:
            return ModelFile()
        return _contents(message)
    except (DecodeError, ValueError):  # ValueError: text that is not UTF-8, or a malformed tensor
        return ModelFile()


def _contents(message: Any) -> ModelFile:
    graph = message.graph
    return ModelFile(
        nodes=tuple(_model_node(node) for node in graph.node),
        tensors=tuple(_tensors_inside(graph)),
        inputs=tuple(_value_record(value) for value in graph.input),
        outputs=tuple(_value_record(value) for value in graph.output),
        versions={opset.domain.decode(): opset.version for opset in message.opset_import},
    )


def _model_node(node: Any) -> ModelNode:
    inputs = tuple(name.decode() for name in node.input)
    return ModelNode(node.op_type.decode(), node.domain.decode(), inputs)


def _tensors_inside(graph: Any) -> Iterator[ExternalTensor]:
    """Yields the external tensors in files inside the artifact's folder."""
    for initializer in graph.initializer:
        if initializer.data_location == LOCATIONS["EXTERNAL"]:
            tensor = external_tensor(initializer)
            if stays_inside(tensor.file) and tensor.offset >= 0:
                yield tensor


def external_tensor(tensor: Any) -> ExternalTensor:
    """Reads a message `Tensor` with its data in another file.

    Raises:
        ValueError: it cannot be a weight: a malformed shape, name or offset.
    """
    shape = tuple(tensor.dims)
    if len(shape) > _MAX_RANK or min(shape, default=0) < 0:
        raise ValueError(f"a tensor has the shape {shape}; expected up to {_MAX_RANK} sizes >= 0")

    location = {entry.key: entry.value for entry in tensor.external_data}
    return ExternalTensor(
        name=tensor.name.decode(),
        data_type=tensor.data_type,
        shape=shape,
        file=location.get(b"location", b"").decode(),
        offset=int(location.get(b"offset", b"0")),
    )


def _value_record(value: Any) -> ValueRecord:
    tensor = value.type.tensor_type
    shape: list[int | str] = []
    for dim in tensor.shape.dim:
        if dim.HasField("value"):
            shape.append(dim.value)
        else:
            shape.append(dim.symbol.decode())
    dtype = _DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}")
    return ValueRecord(value.name.decode(), dtype, tuple(shape))


def prepare_model(model: bytes, extra_outputs: Iterable[str] = ()) -> bytes:
    """Returns a serialized model as sessions run it; a damaged model is returned unchanged.

    The constant `num_logits` becomes an input. `extra_outputs`, names of values in the graph,
    become outputs if the graph has them all.
    """
    try:
        message = parse_model(model)
    except DecodeError:
        return model
    _make_num_logits_an_input(message.graph)
    _make_length_of_logits_symbolic(message.graph)
    _add_outputs(message.graph, {name.encode() for name in extra_outputs})
    return bytes(message.SerializeToString())


def _make_num_logits_an_input(graph: Any) -> None:
    """Adds the scalar input; an input of a constant's name takes the place of the constant."""
    name = NUM_LOGITS.encode()
    if name in [value.name for value in graph.input]:
        return
    added = graph.input.add(name=name)
    added.type.tensor_type.elem_type = _INT64
    added.type.tensor_type.shape.SetInParent()  # an empty shape: a scalar


def _make_length_of_logits_symbolic(graph: Any) -> None:
    """Replaces the 1 in the shape [batch_size, 1, vocab_size] of the output `logits`."""
    for output in graph.output:
        dims = output.type.tensor_type.shape.dim
        if output.name == b"logits" and len(dims) > 1:
            dims[1].ClearField("value")
            dims[1].symbol = NUM_LOGITS.encode()


def _add_outputs(graph: Any, names: set[bytes]) -> None:
    values: set[bytes] = set()
    for node in graph.node:
        values.update(node.output)
    if not names <= values:
        return
    outputs = {output.name for output in graph.output}
    for name in sorted(names - outputs):
        graph.output.add(name=name)


def weight_files(manifest: Manifest) -> list[str]:
    """Returns the names of the files that hold weights, in the order of the tensors."""
    files: dict[str, None] = {}
    for stored in manifest.tensors.values():
        for part in stored.parts.values():
            files[part.file] = None
    return list(files)


def native_ops(model: Path | bytes) -> NativeOps:
    """Compares the ops of a model file, or a serialized model, with the ops of our library.

    Raises:
        RequestError: the file cannot be read, or `RGEXPORT_CPU` names no instruction set.
    """
    if not isinstance(model, bytes):
        model = read_graph(model)
    file = read_model(model)
    ops = _ops_of_our_domain(file)
    kernels = library.kernels()
    path = library.library()

    version = file.versions.get(DOMAIN, VERSION)
    native = tuple(op for op in ops if op in kernels.ops and SINCE.get(op, 1) <= version)
    if not native or not path:
        reason = kernels.reason or f"the file has no op of {', '.join(sorted(kernels.ops))}"
        return NativeOps(ops, reason=reason)

    exact_tokens = kernels.exact_tokens
    if len(native) < len(ops) or any(node.op in _STOCK_PRODUCTS for node in file.nodes):
        exact_tokens = 1
    weights, small = _weights_by_reader(file)
    return NativeOps(
        ops,
        native,
        path,
        kernels=f"native {kernels.instruction_set}",
        weights=weights,
        small=small,
        exact_tokens=exact_tokens,
    )


def _ops_of_our_domain(file: ModelFile) -> dict[str, int]:
    """Returns type → number of nodes, in the types' alphabetical order."""
    counts = Counter(node.op for node in file.nodes if node.domain == DOMAIN)
    return dict(sorted(counts.items()))


def _weights_by_reader(
    file: ModelFile,
) -> tuple[tuple[ExternalTensor, ...], tuple[ExternalTensor, ...]]:
    """Returns the tensors that kernels read in place, and the small ones that the engine reads.

    `Gather` reads in place too, because the embedding is the head's table: if it were mapped twice,
    its pages would count twice as memory.
    """
    names: set[str] = set()
    for node in file.nodes:
        if node.domain == DOMAIN or node.op == "Gather":
            names.update(node.inputs)

    weights = []
    small = []
    for tensor in file.tensors:
        if tensor.name in names:
            weights.append(tensor)
        elif prod(tensor.shape) < _MOST_FOLDED_ELEMENTS:
            small.append(tensor)
    return tuple(weights), tuple(small)
