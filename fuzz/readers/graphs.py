"""ONNX models whose weights lie in files beside them."""

import io
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import onnx
from onnx import TensorProto, helper

from fuzz.readers import folders, proto_mutator
from fuzz.readers.target import Target, require
from rgexport.artifacts.onnx.model_file import ModelFile, native_ops, read_model

MODEL = "model.onnx"


def _seeds(folder: Path) -> Iterable[bytes]:
    yield _tiny()


def _tiny() -> bytes:
    """Two nodes, one of our domain, and two tensors beside the file."""
    tensors = []
    for name, kind, dims, offset in (("w", TensorProto.FLOAT, (4, 2), 0), ("v", 2, (3,), 64)):
        tensor = TensorProto(name=name, data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", 12)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    nodes = [
        helper.make_node("Gather", ["w", "i"], ["x"]),
        helper.make_node("RgLruScan", ["x", "v"], ["y"], domain="ai.rgexport"),
    ]
    value = helper.make_tensor_value_info("i", TensorProto.INT64, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [value], [out], initializer=tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.rgexport", 2)]
    return bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())


def _mutate(data: bytes, random: Random) -> bytes:
    return proto_mutator.mutate(data, random)


def _read(data: bytes, folder: Path) -> ModelFile:
    folders.place(folders.pack({MODEL: folders.Entry(data)}), folder)
    native_ops(folder / MODEL)
    return read_model(data)


def _agree(data: bytes, folder: Path, found: ModelFile) -> None:
    """The nodes and tensors that the package onnx reads, where it can read the file."""
    try:
        model = onnx.load_model(io.BytesIO(data), load_external_data=False)
    except Exception:  # a damaged file: onnx reads nothing
        return
    nodes = [(n.op_type, n.domain, tuple(n.input)) for n in model.graph.node]
    read = [(n.op, n.domain, n.inputs) for n in found.nodes]
    require(read == nodes[: len(read)], "other nodes than onnx has")
    theirs: Any = [_external(tensor) for tensor in model.graph.initializer]
    theirs = [tensor for tensor in theirs if tensor]
    ours = [(t.name, t.data_type, t.shape, t.file, t.offset) for t in found.tensors]
    require(ours == theirs[: len(ours)], "other external tensors than onnx has", ours)


def _external(tensor: TensorProto) -> tuple[Any, ...] | None:
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    places = {entry.key: entry.value for entry in tensor.external_data}
    try:
        offset = int(places.get("offset", "0"))
    except ValueError:
        return None
    file = places.get("location", "")
    if isinstance(file, bytes):  # no UTF-8
        return None
    leads_out = file.startswith("/") or ".." in file.split("/") or set(file) & set("\\:")
    if leads_out or not file.strip("./") or not file.isprintable() or offset < 0:
        return None  # such a tensor is left to the engine, which refuses it
    return tensor.name, tensor.data_type, tuple(tensor.dims), file, offset


TARGETS = {"onnx": Target("onnx", _seeds, _mutate, _read, _agree, 1 << 13)}
