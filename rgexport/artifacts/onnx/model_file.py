"""Reads `model.onnx` without the package `onnx`, finds kernels, prepares it for ONNX Runtime."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from rgexport.artifacts.manifest import Manifest, ValueRecord
from rgexport.files.paths import read_regular, stays_inside
from rgexport.kernels.onnx import library

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
_SCHEMA = """
Model: ir_version=1:int64 producer_name=2:bytes producer_version=3:bytes domain=4:bytes
  model_version=5:int64 doc_string=6:bytes graph=7:Graph opset_import=8:Opset*
  metadata_props=14:Entry* function=25:Function*
Opset: domain=1:bytes version=2:int64
Function: name=1:bytes input=4:bytes* output=5:bytes* attribute=6:bytes* node=7:Node*
  doc_string=8:bytes opset_import=9:Opset* domain=10:bytes attribute_proto=11:Attribute*
  value_info=12:Value* overload=13:bytes metadata_props=14:Entry*
Graph: node=1:Node* name=2:bytes initializer=5:Tensor* doc_string=10:bytes input=11:Value*
  output=12:Value* value_info=13:Value* sparse=15:Sparse* metadata_props=16:Entry*
Node: input=1:bytes* output=2:bytes* name=3:bytes op_type=4:bytes attribute=5:Attribute*
  doc_string=6:bytes domain=7:bytes overload=8:bytes metadata_props=9:Entry*
Attribute: name=1:bytes f=2:float i=3:int64 s=4:bytes t=5:Tensor g=6:Graph floats=7:float*
  ints=8:int64* strings=9:bytes* tensors=10:Tensor* graphs=11:Graph* doc_string=13:bytes
  type=20:int32 ref_attr_name=21:bytes sparse=22:Sparse
Sparse: values=1:Tensor indices=2:Tensor dims=3:int64*
Tensor: dims=1:int64* data_type=2:int32 float_data=4:float* int32_data=5:int32*
  int64_data=7:int64* name=8:bytes raw_data=9:bytes doc_string=12:bytes external_data=13:Entry*
  data_location=14:Location metadata_props=16:Entry*
Entry: key=1:bytes value=2:bytes
Value: name=1:bytes type=2:Type doc_string=3:bytes metadata_props=4:Entry*
Type: tensor_type=1:TensorType denotation=6:bytes
TensorType: elem_type=1:int32 shape=2:Shape
Shape: dim=1:Dim*
Dim: value=1:int64 symbol=2:bytes denotation=3:bytes
"""
"""Protobuf messages, each `NAME: FIELD=NUMBER:TYPE …`; `*` marks repeated fields."""
LOCATIONS = {"DEFAULT": 0, "EXTERNAL": 1}
_MAX_RANK = 8
_INT64 = 7
DTYPES = {1: "float32", 2: "uint8", 6: "int32", _INT64: "int64", 10: "float16", 16: "bfloat16"}
MAX_NODES = 100_000  # maximum number of nodes that are read: forty times that of the 9B
NUM_LOGITS = "num_logits"
"""Number of last tokens whose logits the graph returns: a scalar int64, constant in the file."""


@dataclass(frozen=True)
class ModelNode:
    op: str
    domain: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class ExternalTensor:
    name: str
    data_type: int
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True)
class ModelFile:
    """The contents of a model file; empty if it is damaged, since ONNX Runtime will refuse it."""

    nodes: tuple[ModelNode, ...] = ()
    tensors: tuple[ExternalTensor, ...] = ()
    inputs: tuple[ValueRecord, ...] = ()
    outputs: tuple[ValueRecord, ...] = ()
    versions: dict[str, int] = field(default_factory=dict)


def read_graph(path: Path) -> bytes:
    return read_regular(path)


def parse_model(model: bytes) -> Any:
    """Returns the message `Model`; raises DecodeError if it is damaged or nested too deeply."""
    return _model_class().FromString(model)


def subgraphs(node: Any) -> list[Any]:
    inner = [a.g for a in node.attribute if a.HasField("g")]
    return inner + [graph for a in node.attribute for graph in a.graphs]


def read_model(model: bytes) -> ModelFile:
    try:
        message = parse_model(model)
        graph = message.graph
        if len(graph.node) > MAX_NODES:
            return ModelFile()
        tensors = [
            external_tensor(initializer)
            for initializer in graph.initializer
            if initializer.data_location == LOCATIONS["EXTERNAL"]
        ]
        return ModelFile(
            nodes=tuple(
                ModelNode(n.op_type.decode(), n.domain.decode(), tuple(x.decode() for x in n.input))
                for n in graph.node
            ),
            tensors=tuple(t for t in tensors if stays_inside(t.file) and t.offset >= 0),
            inputs=tuple(map(_value_record, graph.input)),
            outputs=tuple(map(_value_record, graph.output)),
            versions={opset.domain.decode(): opset.version for opset in message.opset_import},
        )
    except (DecodeError, ValueError):
        return ModelFile()


def prepare_model(model: bytes, extra_outputs: Iterable[str] = ()) -> bytes:
    """Makes the constant `num_logits` an input, and adds outputs; a damaged model is unchanged."""
    try:
        message = parse_model(model)
    except DecodeError:
        return model
    graph = message.graph
    if NUM_LOGITS.encode() not in (value.name for value in graph.input):
        added = graph.input.add(name=NUM_LOGITS.encode())
        added.type.tensor_type.elem_type = _INT64
        added.type.tensor_type.shape.SetInParent()
    for output in graph.output:
        if output.name == b"logits" and len(output.type.tensor_type.shape.dim) > 1:
            num_tokens = output.type.tensor_type.shape.dim[1]
            num_tokens.ClearField("value")
            num_tokens.symbol = NUM_LOGITS.encode()
    names = {name.encode() for name in extra_outputs}
    if names <= {name for node in graph.node for name in node.output}:
        for name in sorted(names - {output.name for output in graph.output}):
            graph.output.add(name=name)
    return bytes(message.SerializeToString())


def _value_record(value: Any) -> ValueRecord:
    tensor = value.type.tensor_type
    shape = (
        dim.value if dim.HasField("value") else dim.symbol.decode() for dim in tensor.shape.dim
    )
    dtype = DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}")
    return ValueRecord(value.name.decode(), dtype, tuple(shape))


def external_tensor(tensor: Any) -> ExternalTensor:
    """Reads an initializer in another file; ValueError if it cannot be a weight."""
    location = {entry.key: entry.value for entry in tensor.external_data}
    shape = tuple(tensor.dims)
    if len(shape) > _MAX_RANK or min(shape, default=0) < 0:
        raise ValueError(f"a tensor has the shape {shape}; expected up to {_MAX_RANK} sizes >= 0")
    file, offset = location.get(b"location", b"").decode(), int(location.get(b"offset", b"0"))
    return ExternalTensor(tensor.name.decode(), tensor.data_type, shape, file, offset)


@cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="onnx.proto", package="rgexport")
    locations = file.enum_type.add(name="Location")
    for name, number in LOCATIONS.items():
        locations.value.add(name=name, number=number)
    for text in re.split(r"\n(?=\w)", _SCHEMA.strip()):  # continuation lines are indented
        message = file.message_type.add(name=text.partition(":")[0])
        for name, number, kind, repeated in re.findall(r"(\w+)=(\d+):(\w+)(\*?)", text):
            entry = message.field.add(name=name, number=int(number))
            entry.label = entry.LABEL_REPEATED if repeated else entry.LABEL_OPTIONAL
            if kind.islower():
                entry.type = getattr(entry, f"TYPE_{kind.upper()}")
            else:
                entry.type = entry.TYPE_ENUM if kind == "Location" else entry.TYPE_MESSAGE
                entry.type_name = f".rgexport.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("rgexport.Model"))


def weight_files(manifest: Manifest) -> list[str]:
    stored_parts = (part for stored in manifest.tensors.values() for part in stored.parts.values())
    return list(dict.fromkeys(part.file for part in stored_parts))


DOMAIN, VERSION = "ai.rgexport", 2
SINCE = {"RgLruScan": 2}
"""Op → the first version of the domain that kernels implement, if not 1; else the body runs."""
STOCK = "stock"
_PRODUCTS = {"MatMul", "MatMulNBits", "Gemm"}
"""Ops of the engine that sum in another order for other numbers of tokens."""
_SMALL = 1 << 16
"""Elements. A tensor of fewer is read to fold constants; a larger one is repacked."""


@dataclass(frozen=True)
class NativeOps:
    ops: dict[str, int] = field(default_factory=dict)
    native: tuple[str, ...] = ()
    library: Path | None = None  # what to register with the engine, if any op is native
    kernels: str = STOCK  # `native` and the instruction set, or `stock`
    reason: str = ""
    weights: tuple[ExternalTensor, ...] = ()
    """External tensors that kernels read in place: the engine does not repack them."""
    small: tuple[ExternalTensor, ...] = ()
    """External tensors that the engine reads by itself, to fold constants."""
    exact_tokens: int = 1
    """Largest step, in tokens of all rows, with the bits that a token has in its own step."""


def native_ops(model: Path | bytes) -> NativeOps:
    """Compares the ops of a model file, or a serialized model, with the ops of our library."""
    file = read_model(model if isinstance(model, bytes) else read_graph(model))
    counts = Counter(node.op for node in file.nodes if node.domain == DOMAIN)
    ops = dict(sorted(counts.items()))
    kernels, path = library.kernels(), library.library()
    version = file.versions.get(DOMAIN, VERSION)
    native = tuple(n for n in ops if n in kernels.ops and SINCE.get(n, 1) <= version)
    if not native or not path:
        reason = kernels.reason or f"the file has no op of {', '.join(sorted(kernels.ops))}"
        return NativeOps(ops, reason=reason)
    # The embedding is the head's table: mapped twice, its pages would count twice as memory.
    readers = (node for node in file.nodes if node.domain == DOMAIN or node.op == "Gather")
    names = {name for node in readers for name in node.inputs}
    has_stock_sums = len(native) < len(ops) or any(node.op in _PRODUCTS for node in file.nodes)
    return NativeOps(
        ops,
        native,
        path,
        kernels=f"native {kernels.instruction_set}",
        weights=tuple(t for t in file.tensors if t.name in names),
        small=tuple(t for t in file.tensors if t.name not in names and prod(t.shape) < _SMALL),
        exact_tokens=1 if has_stock_sums else kernels.exact_tokens,
    )
