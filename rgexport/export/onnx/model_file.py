"""Reads inputs, outputs, nodes and external tensors of an ONNX model file; adds inputs and outputs.

The fields that a graph of ours may have are declared here, as in onnx.proto, so that the core needs
no package `onnx`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from rgexport.export.manifest import ValueRecord
from rgexport.files.paths import read_regular, stays_inside

_SCHEMA: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {
        "ir_version": (1, "int64"),
        "producer_name": (2, "bytes"),
        "producer_version": (3, "bytes"),
        "domain": (4, "bytes"),
        "model_version": (5, "int64"),
        "doc_string": (6, "bytes"),
        "graph": (7, "Graph"),
        "opset_import": (8, "Opset*"),
        "metadata_props": (14, "Entry*"),
        "function": (25, "Function*"),
    },
    "Opset": {"domain": (1, "bytes"), "version": (2, "int64")},
    "Function": {
        "name": (1, "bytes"),
        "input": (4, "bytes*"),
        "output": (5, "bytes*"),
        "attribute": (6, "bytes*"),
        "node": (7, "Node*"),
        "doc_string": (8, "bytes"),
        "opset_import": (9, "Opset*"),
        "domain": (10, "bytes"),
        "attribute_proto": (11, "Attribute*"),
        "value_info": (12, "Value*"),
        "overload": (13, "bytes"),
        "metadata_props": (14, "Entry*"),
    },
    "Graph": {
        "node": (1, "Node*"),
        "name": (2, "bytes"),
        "initializer": (5, "Tensor*"),
        "doc_string": (10, "bytes"),
        "input": (11, "Value*"),
        "output": (12, "Value*"),
        "value_info": (13, "Value*"),
        "sparse": (15, "Sparse*"),
        "metadata_props": (16, "Entry*"),
    },
    "Node": {
        "input": (1, "bytes*"),
        "output": (2, "bytes*"),
        "name": (3, "bytes"),
        "op_type": (4, "bytes"),
        "attribute": (5, "Attribute*"),
        "doc_string": (6, "bytes"),
        "domain": (7, "bytes"),
        "overload": (8, "bytes"),
        "metadata_props": (9, "Entry*"),
    },
    "Attribute": {
        "name": (1, "bytes"),
        "f": (2, "float"),
        "i": (3, "int64"),
        "s": (4, "bytes"),
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "floats": (7, "float*"),
        "ints": (8, "int64*"),
        "strings": (9, "bytes*"),
        "tensors": (10, "Tensor*"),
        "graphs": (11, "Graph*"),
        "doc_string": (13, "bytes"),
        "type": (20, "int32"),
        "ref_attr_name": (21, "bytes"),
        "sparse": (22, "Sparse"),
    },
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor"), "dims": (3, "int64*")},
    "Tensor": {
        "dims": (1, "int64*"),
        "data_type": (2, "int32"),
        "float_data": (4, "float*"),
        "int32_data": (5, "int32*"),
        "int64_data": (7, "int64*"),
        "name": (8, "bytes"),
        "raw_data": (9, "bytes"),
        "doc_string": (12, "bytes"),
        "external_data": (13, "Entry*"),
        "data_location": (14, "Location"),
        "metadata_props": (16, "Entry*"),
    },
    "Entry": {"key": (1, "bytes"), "value": (2, "bytes")},
    "Value": {
        "name": (1, "bytes"),
        "type": (2, "Type"),
        "doc_string": (3, "bytes"),
        "metadata_props": (4, "Entry*"),
    },
    "Type": {"tensor_type": (1, "TensorType"), "denotation": (6, "bytes")},
    "TensorType": {"elem_type": (1, "int32"), "shape": (2, "Shape")},
    "Shape": {"dim": (1, "Dim*")},
    "Dim": {"value": (1, "int64"), "symbol": (2, "bytes"), "denotation": (3, "bytes")},
}
"""Message → field → its number and type; `*` means repeated."""
LOCATIONS = {"DEFAULT": 0, "EXTERNAL": 1}
_MAX_RANK = 8
_INT64 = 7
DTYPES = {1: "float32", 2: "uint8", 6: "int32", _INT64: "int64", 10: "float16", 16: "bfloat16"}
"""Numbers of onnx.proto for the dtypes that artifacts have."""
MAX_NODES = 100_000
"""The most nodes that are read: forty times those of a 9B."""
NUM_LOGITS = "num_logits"
"""The initializer that says for how many last tokens there are logits, a scalar int64."""


@dataclass(frozen=True)
class ModelNode:
    """One node of the graph."""

    op: str
    domain: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose bytes are in a file beside the model."""

    name: str
    data_type: int
    """As onnx.proto numbers them: 1 float32, 2 uint8."""
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True)
class ModelFile:
    """What was read; nothing of a damaged file, which the engine will refuse."""

    nodes: tuple[ModelNode, ...] = ()
    tensors: tuple[ExternalTensor, ...] = ()
    inputs: tuple[ValueRecord, ...] = ()
    outputs: tuple[ValueRecord, ...] = ()
    versions: dict[str, int] = field(default_factory=dict)
    """Domain → version of its op set that the model imports."""


def read_graph(path: Path) -> bytes:
    """Reads a serialized model without its weights.

    Raises:
        RequestError: it is too large for a graph.
    """
    return read_regular(path)


def parse_model(model: bytes) -> Any:
    """Parses a serialized model, as a message of the schema above.

    Raises:
        DecodeError: it is damaged, or its subgraphs are nested too deeply.
    """
    return _model_class().FromString(model)


def subgraphs(node: Any) -> list[Any]:
    """Returns the graphs that a node runs, such as the body of a loop."""
    inner = [a.g for a in node.attribute if a.HasField("g")]
    return inner + [graph for a in node.attribute for graph in a.graphs]


def read_model(model: bytes) -> ModelFile:
    """The nodes and external tensors of a serialized model, without those of subgraphs."""
    try:
        found = parse_model(model)
        if len(found.graph.node) > MAX_NODES:
            return ModelFile()
        external = (t for t in found.graph.initializer if t.data_location == LOCATIONS["EXTERNAL"])
        tensors = (external_tensor(tensor) for tensor in external)
        return ModelFile(
            tuple(_node(node) for node in found.graph.node),
            tuple(tensor for tensor in tensors if stays_inside(tensor.file) and tensor.offset >= 0),
            tuple(map(_value, found.graph.input)),
            tuple(map(_value, found.graph.output)),
            {opset.domain.decode(): opset.version for opset in found.opset_import},
        )
    except (DecodeError, ValueError):
        return ModelFile()


def for_session(model: bytes, shown: Iterable[str] = ()) -> bytes:
    """A serialized model with an input that says for how many last tokens logits are wanted.

    In the file, `num_logits` is a constant, 1: ONNX Runtime warns of inputs that have a default,
    and other programs want it to be 1. The values that are to be `shown` become outputs, if all are
    there. What is not declared above stays as it is; so does a damaged model, which the engine
    refuses.
    """
    try:
        made = parse_model(model)
    except DecodeError:
        return model
    if NUM_LOGITS.encode() not in (value.name for value in made.graph.input):
        added = made.graph.input.add(name=NUM_LOGITS.encode())
        added.type.tensor_type.elem_type = _INT64
        added.type.tensor_type.shape.SetInParent()
    for output in made.graph.output:
        if output.name == b"logits" and len(output.type.tensor_type.shape.dim) > 1:
            count = output.type.tensor_type.shape.dim[1]
            count.ClearField("value")
            count.symbol = NUM_LOGITS.encode()
    names = {name.encode() for name in shown}
    if names <= {name for node in made.graph.node for name in node.output}:
        for name in sorted(names - {output.name for output in made.graph.output}):
            made.graph.output.add(name=name)
    return bytes(made.SerializeToString())


def _node(node: Any) -> ModelNode:
    inputs = tuple(name.decode() for name in node.input)
    return ModelNode(node.op_type.decode(), node.domain.decode(), inputs)


def _value(value: Any) -> ValueRecord:
    tensor = value.type.tensor_type
    shape = (
        dim.value if dim.HasField("value") else dim.symbol.decode() for dim in tensor.shape.dim
    )
    dtype = DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}")
    return ValueRecord(value.name.decode(), dtype, tuple(shape))


def external_tensor(tensor: Any) -> ExternalTensor:
    """Reads where the bytes of an external tensor are.

    Raises:
        ValueError: its shape, offset or file name cannot be one of ours.
    """
    places = {entry.key: entry.value for entry in tensor.external_data}
    shape = tuple(tensor.dims)
    if len(shape) > _MAX_RANK or min(shape, default=0) < 0:
        raise ValueError(f"no tensor of ours has the shape {shape}")
    file, offset = places.get(b"location", b"").decode(), int(places.get(b"offset", b"0"))
    return ExternalTensor(tensor.name.decode(), tensor.data_type, shape, file, offset)


@cache
def _model_class() -> Any:
    """The class of `Model` messages."""
    file = descriptor_pb2.FileDescriptorProto(name="onnx.proto", package="rgexport")
    locations = file.enum_type.add(name="Location")
    for word, number in LOCATIONS.items():
        locations.value.add(name=word, number=number)
    for message, fields in _SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            word = kind.removesuffix("*")
            row = described.field.add(name=name, number=number)
            row.label = row.LABEL_REPEATED if kind.endswith("*") else row.LABEL_OPTIONAL
            if word.islower():
                row.type = getattr(row, f"TYPE_{word.upper()}")
            else:
                row.type = row.TYPE_MESSAGE if word in _SCHEMA else row.TYPE_ENUM
                row.type_name = f".rgexport.{word}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("rgexport.Model"))
