"""ONNX graphs that rgexport did not write: refused before they run, or when the engine fails."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

import rgexport
from rgexport.cli import run
from rgexport.errors import RequestError
from tests.artifacts import export_random
from tests.command_line import assert_matches, refused
from tests.models import make_config
from tests.validate.faults import onnx_edits as edits
from tests.validate.faults.onnx_edits import Edit, producer, spoil


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a sound artifact, which may be spoilt."""
    monkeypatch.chdir(tmp_path)
    config = make_config("ra", width=32, heads=2, mlp_width=48, vocab_size=64)
    return Path(shutil.copytree(export_random(config, tmp_path, "int8")[0].path, "copy"))


after_logits = partial(edits.changed, "logits")
"""Makes nodes, in ONNX's text form, give the logits `y` for `x`, a float32 [B, 1, V]."""


def in_a_function(model: ModelProto) -> None:
    """Puts an op into the body of a function that all artifacts have."""
    function = next(f for f in model.functions if f.name == "RmsNorm")
    function.node.append(helper.make_node("Erf", [function.input[0]], ["unused"]))


def in_another_domain(model: ModelProto) -> None:
    """Adds a function whose name holds what a terminal obeys."""
    body, opsets = [helper.make_node("Identity", ["x"], ["y"])], [helper.make_opsetid("", 23)]
    model.functions.append(helper.make_function("evil", "Fn\x1b[2J", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("evil", 1))
    producer(model, "logits").output[:] = ["before"]
    model.graph.node.append(helper.make_node("Fn\x1b[2J", ["before"], ["logits"], domain="evil"))


@pytest.mark.parametrize(
    ("edit", "op"),
    [
        (after_logits("y = com.microsoft.Inverse (x)"), "com.microsoft::Inverse"),
        (in_another_domain, "evil::Fn.*2J"),
        (in_a_function, "ai.onnx::Erf"),
    ],
)
def test_foreign_op(edit, op, copied, capsys):
    spoil(copied, edit)
    line = refused(["generate", "copy", "--ids", "2"], capsys)
    assert_matches(f"copy/model.onnx has the op {op}, .* --allow-foreign", line)


@pytest.mark.parametrize(
    "command",
    ["generate copy --ids 2 -n 1", "evaluate copy --suite memory --trials 2 --farthest 32"],
)
def test_commands_take_the_option(command, copied, capsys):
    spoil(copied, after_logits("y = Erf (x)"))
    assert_matches("ai.onnx::Erf", refused(command.split(), capsys))
    assert run([*command.split(), "--allow-foreign"]) in (0, 1)


def test_python_takes_a_keyword(demo_artifact, tmp_path):
    folder = Path(shutil.copytree(demo_artifact, tmp_path / "copy"))
    spoil(folder, after_logits("y = Erf (x)"))
    with pytest.raises(RequestError, match=r"ai.onnx::Erf.*allow_foreign=True"):
        rgexport.load(folder)
    with rgexport.load(folder, allow_foreign=True) as model:
        assert model.complete("The", max_new_tokens=2).reply().new_tokens == 2


def beside_weights(model: ModelProto) -> None:
    """Names 12 GB where a weight is stored."""
    tensor = next(t for t in model.graph.initializer if t.external_data and len(t.dims) > 1)
    tensor.dims[:] = [12_000, 1_000_000]
    for entry in tensor.external_data:
        if entry.key == "length":
            entry.value = str(12 * 10**9)


def many_views(model: ModelProto) -> None:
    """Names the largest weight two thousand times."""
    stored = (tensor for tensor in model.graph.initializer if tensor.external_data)
    largest = max(stored, key=lambda tensor: np.prod(tensor.dims))
    for number in range(2000):
        view = model.graph.initializer.add()
        view.CopyFrom(largest)
        view.name = f"view {number}"


def sparse(model: ModelProto) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    large = helper.make_sparse_tensor(values, indices, [3_000_000_000])
    model.graph.sparse_initializer.append(large)


DOUBLED = "x0 = Concat <axis = 0> (x, x)" + "".join(
    f" x{n + 1} = Concat <axis = 0> (x{n}, x{n})" for n in range(40)
)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (
            after_logits(
                "shape = Constant <value_ints = [60000]> () s = Mul (shape, shape)"
                "one = Constant <value_float = 1.0> () y = Expand (one, s)"
            ),
            "elements in Expand",
        ),
        (
            after_logits(
                "a = Constant <value_int = 0> () b = Constant <value_int = 3000000000> ()"
                "c = Constant <value_int = 1> () d = Range (a, b, c) y = Identity (x)"
            ),
            "3000000000 elements in Range",
        ),
        (after_logits(f"{DOUBLED} y = Identity (x)"), "elements in Concat"),
        (sparse, "3000000000 elements in a sparse tensor"),
        (beside_weights, r"12000\d+ bytes(, where rgexport.json has no| of weights in files)"),
        (many_views, "bytes of weights in files of"),
    ],
    ids=["expanded", "counted", "doubled", "sparse", "weight", "views"],
)
def test_large_tensor(edit, complaint, copied, capsys):
    spoil(copied, edit)
    for options in ([], ["--allow-foreign"]):
        line = refused(["generate", "copy", "--ids", "2", *options], capsys)
        assert_matches(f"copy/model.onnx .*{complaint}", line)


def of_linear(attribute: str, number: int) -> Edit:
    """Sets an attribute of the first quantized product, whose name a terminal obeys."""

    def edit(model: ModelProto) -> None:
        node = next(edits.of_type(model, "QuantLinear"))
        node.name = "\x1b]0;title\x07\x1b[2J\u202e"
        edits.with_attribute(node.output[0], attribute, number)(model)

    return edit


MORE_LOGITS = """
    n = Shape <start = 1, end = 2> (input_ids) two = Constant <value_ints = [2]> ()
    m = Mul (n, two) one = Constant <value_ints = [1]> ()
    s = Concat <axis = 0> (one, m, one) y = Expand (x, s)
"""
"""Repeats the logits as many times as there are tokens, which no type tells."""


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "edit",
    [
        *(of_linear("K", 7), of_linear("N", 1 << 40), of_linear("bits", 5)),
        *(of_linear("block_size", -32), after_logits(MORE_LOGITS)),
    ],
)
def test_engine_error(edit, native, copied, capfd):
    spoil(copied, edit)
    command = ["generate", "copy", "--ids", "2", *([] if native else ["--no-native"])]
    assert_matches("ONNX Runtime .* cannot (open|run)|model.onnx ", refused(command, capfd))


def test_interface_that_the_manifest_does_not_have(copied, capsys):
    spoil(copied, lambda model: model.graph.input.pop())
    line = refused(["inspect", "copy"], capsys)
    assert_matches("copy is damaged: model.onnx: input past_key_values.* is missing", line)
