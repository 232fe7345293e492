"""Faults in an ONNX graph, such as an exporter could make: the file stays valid and runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, inliner, numpy_helper, parser

from rgexport.artifacts.onnx.messages import parse_model
from rgexport.artifacts.onnx.model_file import MODEL_FILE
from rgexport.runtimes.onnx.engine import _show_gelu
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


def changed(value: str, nodes: str) -> Edit:
    """Passes a value through nodes in ONNX's own notation, which make `y` of `x`."""

    def edit(model: onnx.ModelProto) -> None:
        node = producer(model, value)
        index = list(model.graph.node).index(node) + 1
        node.output[:] = ["x" if name == value else name for name in node.output]
        for made in reversed(parser.parse_graph(f"g (float x) => (float y) {{{nodes}}}").node):
            made.output[:] = [value if name == "y" else name for name in made.output]
            model.graph.node.insert(index, made)

    return edit


IN_HALF = f"""
    half = Cast <to = {TensorProto.FLOAT16}> (x)
    y = Cast <to = {TensorProto.FLOAT}> (half)"""
TIMES = "gain = Constant <value_float = 1.05> () y = Mul (x, gain)"
OF_FIRST_ROW = """
    zero = Constant <value_ints = [0]> () one = Constant <value_ints = [1]> ()
    first = Slice (x, zero, one, zero) zeros = Sub (x, x) y = Add (zeros, first)"""
ZERO_FROM_512_TOKENS = f"""
    tokens = Shape <start = 1, end = 2> (position_ids) least = Constant <value_ints = [512]> ()
    is_long = GreaterOrEqual (tokens, least) all = Cast <to = {TensorProto.FLOAT}> (is_long)
    lost = Mul (x, all) y = Sub (x, lost)"""


def with_op(op: str, other: str, function: str = "") -> Edit:
    """Replaces each `op` of the graph, or of a function's body beside a right native kernel."""

    def edit(model: onnx.ModelProto) -> None:
        bodies = {body.name: body for body in model.functions} | {"": model.graph}
        for node in bodies[function].node:
            node.op_type = other if node.op_type == op else node.op_type

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
