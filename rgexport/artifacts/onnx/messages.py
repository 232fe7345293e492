"""Parses the protobuf messages of ONNX without the package `onnx`.

Engines run without that package, so the schema of onnx.proto stands here. It is complete for
everything that rgexport's files may have, and shorter: enums are numbers, text is bytes.
"""

import re
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

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

_MESSAGE_START = re.compile(r"\n(?=\w)")
"""The end of a line before the next message: continuation lines are indented."""

_FIELD = re.compile(r"(?P<name>\w+)=(?P<number>\d+):(?P<type>\w+)(?P<repeated>\*?)")

_PACKAGE = "rgexport"

LOCATIONS = {"DEFAULT": 0, "EXTERNAL": 1}
"""Values of the enum `Location`: the data of a tensor stand in the model file, or in another."""


def parse_model(model: bytes) -> Any:
    """Returns the message `Model` of a serialized model.

    Raises:
        DecodeError: the bytes are damaged, or nested too deeply.
    """
    return _model_class().FromString(model)


def subgraphs(node: Any) -> list[Any]:
    """Returns the messages `Graph` among the attributes of a node, such as the body of a `Scan`."""
    graphs = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    for attribute in node.attribute:
        graphs.extend(attribute.graphs)
    return graphs


@cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="onnx.proto", package=_PACKAGE)
    locations = file.enum_type.add(name="Location")
    for name, number in LOCATIONS.items():
        locations.value.add(name=name, number=number)
    for text in _MESSAGE_START.split(_SCHEMA.strip()):
        _add_message(file, text)

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    descriptor = pool.FindMessageTypeByName(f"{_PACKAGE}.Model")
    return message_factory.GetMessageClass(descriptor)


def _add_message(file: descriptor_pb2.FileDescriptorProto, text: str) -> None:
    """Adds the message that an entry of `_SCHEMA` describes."""
    name, _, fields = text.partition(":")
    message = file.message_type.add(name=name)
    for match in _FIELD.finditer(fields):
        _add_field(message, match)


def _add_field(message: descriptor_pb2.DescriptorProto, match: re.Match[str]) -> None:
    field = message.field.add(name=match["name"], number=int(match["number"]))
    if match["repeated"]:
        field.label = field.LABEL_REPEATED
    else:
        field.label = field.LABEL_OPTIONAL

    type_name = match["type"]
    if type_name.islower():  # a scalar, such as int64
        field.type = getattr(field, f"TYPE_{type_name.upper()}")
        return
    field.type_name = f".{_PACKAGE}.{type_name}"
    if type_name == "Location":
        field.type = field.TYPE_ENUM
    else:
        field.type = field.TYPE_MESSAGE
