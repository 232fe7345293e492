"""ONNX graphs that rgexport did not write: refused before they run, or when the engine fails."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, parser

import rgexport
from rgexport.cli import run
from rgexport.errors import RequestError
from tests.command_line import assert_matches, refused
from tests.models import make_config, random_weights, write_hugging_face
from tests.validate.faults.onnx_edits import of_type, producer, spoil, with_attribute

CONFIG = make_config("ra", width=32, heads=2, mlp_width=48, vocab_size=64)
Edit = Callable[[ModelProto], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_hugging_face(CONFIG, random_weights(CONFIG), folder / "model")
    model, target = folder / "model", folder / "sound"
    assert run(["onnx", "-m", str(model), "--int8", "-o", str(target)]) == 0
    return target


@pytest.fixture
def copied(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(sound, "copy"))


def after_logits(text: str) -> Edit:
    """Lets nodes, in ONNX's text form, make `logits` from `before`, a float32 [B, 1, V]."""

    def edit(model: ModelProto) -> None:
        node = producer(model, "logits")
        node.output[:] = ["before" if name == "logits" else name for name in node.output]
        body = parser.parse_graph(
            f"more (float[b, 1, v] before) => (float[b, 1, v] logits) {{{text}}}"
        )
        model.graph.node.extend(body.node)
        model.graph.initializer.extend(body.initializer)

    return edit


LOOP = """
    most = Constant <value_int = 9223372036854775807> ()
    on = Constant <value = bool {1}> ()
    logits = Loop (most, on, before) <body = b (int64 i, bool c, float[b, 1, v] x)
        => (bool d, float[b, 1, v] y) { d = Identity (c) y = Identity (x) }>
"""
IF = """
    on = Constant <value = bool {1}> ()
    logits = If (on) <then_branch = t () => (float[b, 1, v] y) { y = Identity (before) },
        else_branch = e () => (float[b, 1, v] z) { z = Identity (before) }>
"""
SCAN = """
    states, logits = Scan <num_scan_inputs = 1, body = s (float[w] a, float[w] b)
        => (float[w] c, float[w] d) { c = Erf (a) d = Identity (b) }> (before, before)
"""


def in_a_function(model: ModelProto) -> None:
    """Puts an op into the body of a function that all artifacts have."""
    function = next(f for f in model.functions if f.name == "RmsNorm")
    function.node.append(helper.make_node("Erf", [function.input[0]], ["unused"]))


def own_function(model: ModelProto) -> None:
    body = [helper.make_node("Identity", ["x"], ["y"])]
    opsets = [helper.make_opsetid("", 23)]
    model.functions.append(helper.make_function("evil", "Fn\x1b[2J", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("evil", 1))
    node = producer(model, "logits")
    node.output[:] = ["before"]
    model.graph.node.append(helper.make_node("Fn\x1b[2J", ["before"], ["logits"], domain="evil"))


FOREIGN: dict[str, tuple[Edit, str]] = {
    "an op": (after_logits("logits = Erf (before)"), "ai.onnx::Erf"),
    "an op of the engine": (
        after_logits("logits = com.microsoft.Inverse (before)"),
        "com.microsoft::Inverse",
    ),
    "another domain": (own_function, "evil::Fn.*2J"),
    "a loop": (after_logits(LOOP), "ai.onnx::Loop"),
    "a condition": (after_logits(IF), "ai.onnx::If"),
    "in a subgraph": (after_logits(SCAN), "ai.onnx::Erf"),
    "in a function": (in_a_function, "ai.onnx::Erf"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_op(case, copied, capsys):
    edit, op = FOREIGN[case]
    spoil(copied, edit)
    line = refused(["generate", "copy", "--ids", "2"], capsys)
    assert_matches(f"copy/model.onnx has the op {op}, .* --allow-foreign", line)


COMMANDS = (
    "generate copy --ids 2 -n 1",
    "validate copy --tokens 8",
    "bench copy -p 1 -n 1 -r 1",
    "evaluate copy --suite memory --trials 2 --farthest 32",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_the_option(command, copied, capsys):
    spoil(copied, after_logits("logits = Erf (before)"))
    assert_matches("ai.onnx::Erf", refused(command.split(), capsys))
    assert run([*command.split(), "--allow-foreign"]) in (0, 1)


def test_python_takes_a_keyword(demo_artifact, tmp_path):
    folder = Path(shutil.copytree(demo_artifact, tmp_path / "copy"))
    spoil(folder, after_logits("logits = Erf (before)"))
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
    largest = max(
        (t for t in model.graph.initializer if t.external_data), key=lambda t: np.prod(t.dims)
    )
    for number in range(2000):
        view = model.graph.initializer.add()
        view.CopyFrom(largest)
        view.name = f"view {number}"


def sparse(model: ModelProto) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, indices, [3_000_000_000])
    )


DOUBLED = "x0 = Concat <axis = 0> (before, before)" + "".join(
    f" x{n + 1} = Concat <axis = 0> (x{n}, x{n})" for n in range(40)
)
LARGE: dict[str, tuple[Edit, str]] = {
    "expanded": (
        after_logits(
            "shape = Constant <value_ints = [3000, 1000000]> ()"
            "one = Constant <value_float = 1.0> () logits = Expand (one, shape)"
        ),
        "3000000000 elements in Expand",
    ),
    "computed": (
        after_logits(
            "a = Constant <value_ints = [60000]> () b = Mul (a, a) c = Concat <axis = 0> (a, b)"
            "one = Constant <value_float = 1.0> () logits = Expand (one, c)"
        ),
        "elements in Expand",
    ),
    "counted": (
        after_logits(
            "a = Constant <value_int = 0> () b = Constant <value_int = 3000000000> ()"
            "c = Constant <value_int = 1> () d = Range (a, b, c) logits = Identity (before)"
        ),
        "3000000000 elements in Range",
    ),
    "doubled": (after_logits(f"{DOUBLED} logits = Identity (before)"), "elements in Concat"),
    "sparse": (sparse, "3000000000 elements in a sparse tensor"),
    "weight": (
        beside_weights,
        "12000000000 bytes, where rgexport.json has no weight",
    ),
    "views": (many_views, "bytes of weights in files of"),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_tensor(case, copied, capsys):
    edit, complaint = LARGE[case]
    spoil(copied, edit)
    line = refused(["generate", "copy", "--ids", "2"], capsys)
    assert_matches(f"copy/model.onnx .*{complaint}", line)


def of_a_foreign_op(model: ModelProto) -> None:
    after_logits(
        "n = Constant <value_ints = [3000000000]> () x = ConstantOfShape (n)"
        "logits = Identity (before)"
    )(model)


def test_an_allowed_graph_is_bounded_too(copied, capsys):
    spoil(copied, of_a_foreign_op)
    line = refused(["generate", "copy", "--ids", "2", "--allow-foreign"], capsys)
    assert_matches("3000000000 elements in ConstantOfShape", line)


def of_linear(attribute: str, number: int) -> Edit:
    """Sets an attribute of the first quantized product."""

    def edit(model: ModelProto) -> None:
        node = next(of_type(model, "QuantLinear"))
        with_attribute(node.output[0], attribute, number)(model)

    return edit


def swapped(model: ModelProto) -> None:
    node = next(of_type(model, "QuantLinear"))
    node.input[0], node.input[1] = node.input[1], node.input[0]


def other_logits(model: ModelProto) -> None:
    """Repeats the logits as many times as there are tokens, which no type tells."""
    after_logits(
        "n = Shape <start = 1, end = 2> (input_ids) two = Constant <value_ints = [2]> ()"
        "m = Mul (n, two) one = Constant <value_ints = [1]> ()"
        "s = Concat <axis = 0> (one, m, one) logits = Expand (before, s)"
    )(model)


def rejected_text(model: ModelProto) -> None:
    """Puts what a terminal obeys into the name of a node that fails."""
    node = next(of_type(model, "QuantLinear"))
    node.name = "\x1b]0;title\x07\x1b[2J\u202e"
    of_linear("K", 7)(model)


FAILING: dict[str, Edit] = {
    "K": of_linear("K", 7),
    "N": of_linear("N", 1 << 40),
    "bits": of_linear("bits", 5),
    "block size": of_linear("block_size", 48),
    "negative block size": of_linear("block_size", -32),
    "swapped inputs": swapped,
    "logits of another shape": other_logits,
    "control characters": rejected_text,
}


@pytest.mark.parametrize("native", [True, False], ids=["native", "stock"])
@pytest.mark.parametrize("case", FAILING)
def test_engine_error(case, native, copied, capfd):
    spoil(copied, FAILING[case])
    arguments = ["generate", "copy", "--ids", "2"]
    line = refused(arguments if native else [*arguments, "--no-native"], capfd)
    assert_matches("ONNX Runtime .* cannot (open|run)|model.onnx ", line)


def other_output(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 5


def other_input(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32


INTERFACE: dict[str, tuple[Edit, str]] = {
    "output": (other_output, r"output logits float32 .*5\); expected logits"),
    "input": (other_input, "input input_ids int32 .*; expected input_ids int64"),
    "no state": (lambda m: m.graph.input.pop(), "input .*; expected past_key_values"),
}


@pytest.mark.parametrize("case", INTERFACE)
def test_interface_that_the_manifest_does_not_have(case, copied, capsys):
    edit, complaint = INTERFACE[case]
    spoil(copied, edit)
    line = refused(["inspect", "copy"], capsys)
    assert_matches(f"copy is damaged: model.onnx: {complaint}", line)
