"""Faults in an ONNX graph, such as an exporter could make: the file stays valid and runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, inliner, numpy_helper

from rgexport.export.onnx.artifact import MODEL_FILE
from rgexport.export.onnx.model_file import parse_model
from rgexport.runtimes.onnx.observer import _show_gelu
from tests.validate.conftest import claim

Edit = Callable[[onnx.ModelProto], None]


def producer(model: onnx.ModelProto, value: str) -> NodeProto:
    return next(node for node in model.graph.node if value in node.output)


def of_type(model: onnx.ModelProto, kind: str) -> Iterator[NodeProto]:
    return (node for node in model.graph.node if node.op_type == kind)


def flat(edit: Edit = lambda model: None) -> Edit:
    """An edit of the graph with the bodies of its functions in their place: they are what runs.

    In a body alone a fault would not show, since a native kernel does not look at the body.
    """

    def edit_flat(model: onnx.ModelProto) -> None:
        parsed = parse_model(model.SerializeToString())
        _show_gelu(parsed)
        model.ParseFromString(parsed.SerializeToString())
        model.CopyFrom(inliner.inline_local_functions(model))
        edit(model)

    return edit_flat


def without_soft_cap(model: onnx.ModelProto) -> None:
    bare = helper.make_node("Identity", ["lm_head"], ["logits"], name="logits/Identity")
    producer(model, "logits").CopyFrom(bare)


def with_window(window: int) -> Edit:
    """The mask's; the ring keeps its size."""

    def edit(model: onnx.ModelProto) -> None:
        (node,) = of_type(model, "LessOrEqual")
        node.input[1] = "fault/window"
        model.graph.initializer.append(numpy_helper.from_array(np.array(window), "fault/window"))

    return edit


def in_half(value: str) -> Edit:
    """Rounds a value to float16 and back."""

    def edit(model: onnx.ModelProto) -> None:
        node = producer(model, value)
        index = list(model.graph.node).index(node) + 1
        exact, half = f"{value}/exact", f"{value}/half"
        node.output[:] = [exact if name == value else name for name in node.output]
        back = helper.make_node("Cast", [half], [value], name=f"{value}/Cast", to=TensorProto.FLOAT)
        model.graph.node.insert(index, back)
        there = helper.make_node("Cast", [exact], [half], name=half, to=TensorProto.FLOAT16)
        model.graph.node.insert(index, there)

    return edit


def not_written(state: str) -> Edit:
    """A state such as `3.recurrent_state` comes out as it went in."""

    def edit(model: onnx.ModelProto) -> None:
        past, present = f"past_key_values.{state}", f"present.{state}"
        outputs = producer(model, present).output
        outputs[:] = ["fault/lost" if name == present else name for name in outputs]
        model.graph.node.append(helper.make_node("Identity", [past], [present], name="fault/kept"))

    return edit


def with_attribute(result: str, attribute: str, value: float | str) -> Edit:
    """Sets an attribute of the node that gives `result`."""

    def edit(model: onnx.ModelProto) -> None:
        attributes = producer(model, result).attribute
        (old,) = (found for found in attributes if found.name == attribute)
        old.CopyFrom(helper.make_attribute(attribute, value))

    return edit


def spoil(artifact: Path, edit: Edit) -> None:
    """Edits the graph of an artifact; its hashes are made to fit."""
    model = onnx.load(artifact / MODEL_FILE, load_external_data=False)
    edit(model)
    onnx.save(model, artifact / MODEL_FILE)
    claim(artifact)
