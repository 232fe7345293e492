"""Checks of whole programs: small ones by hand, and packages that other tools make."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools as ct
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function as MilFunction
from coremltools.converters.mil.mil import Program, types
from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder

from rgexport.cli import run
from rgexport.export.describe import describe
from rgexport.export.mil.package import open_package
from rgexport.export.mil.program import Function, Immediate, Name, Operation, TensorType
from rgexport.export.mil.state_checks import check_recurrences, check_states
from rgexport.export.mil.structure import check_package
from rgexport.export.mil.typing_checks import check_operations

STATE = TensorType("float16", (1, 1, 4, 32))
ROW = TensorType("float16", (1, 1, 1, 32))


def operation(kind: str, name: str, result: TensorType | None = None, **inputs: str) -> Operation:
    given = {key: (Name(value),) for key, value in inputs.items()}
    return Operation(kind, name, given, ((name, result),) if result else ())


def function(*operations: Operation, tokens: int = 1, outputs: tuple[str, ...] = ()) -> Function:
    inputs = {"input_ids": TensorType("int32", (1, tokens)), "row": ROW}
    return Function("main", inputs, {"a": STATE, "b": STATE}, outputs, operations)


def read(state: str) -> Operation:
    return operation("read_state", f"{state}_read", STATE, input=state)


def write(state: str, data: str) -> Operation:
    return operation("write_state", f"{state}_write", input=state, data=data)


def shifted(state: str) -> Operation:
    return operation("add", f"{state}_new", STATE, x=f"{state}_read", y="row")


SOUND = (
    read("a"),
    shifted("a"),
    write("a", "a_new"),
    read("b"),
    shifted("b"),
    write("b", "b_new"),
)


def test_sound_states():
    sound = function(*SOUND, outputs=("a_new",))
    assert not [*check_states(sound, 32), *check_operations(sound), *check_recurrences(sound)]


def test_state_that_is_read_after_it_was_written():
    again = operation("read_state", "a_after", STATE, input="a")
    sound = function(*SOUND, again, outputs=("a_after",))
    assert not [*check_states(sound, 32), *check_operations(sound), *check_recurrences(sound)]


def test_state_that_is_never_written():
    complaints = list(check_states(function(*SOUND[:5]), 32))
    assert complaints == ["main: state b is never written: 1 write_state for 2 states"]


def test_state_that_is_written_twice():
    wrong = function(*SOUND, write("a", "b_new"))
    assert not list(check_states(wrong, 32))  # others may do so
    assert list(check_recurrences(wrong)) == [
        "main: write_state a_write: it writes the state a a second time"
    ]


def test_state_that_does_not_follow_from_itself():
    swapped = (*SOUND[:2], read("b"), shifted("b"), write("a", "b_new"), write("b", "a_new"))
    assert [text.split(": ")[1] for text in check_recurrences(function(*swapped))] == [
        "write_state a_write",
        "write_state b_write",
    ]


def test_chunk_that_fills_a_state():
    anew = [operation("tile", "new", STATE, x="row"), write("a", "new")]
    assert list(check_recurrences(function(read("a"), *anew)))
    assert not list(check_recurrences(function(read("a"), *anew, tokens=4)))


@pytest.mark.parametrize(
    ("kind", "alignment", "complaint"),
    [
        (TensorType("float32", (1, 32)), 32, "is float32; Core ML takes float16 states alone"),
        (TensorType("float16", (1, 20)), 32, "expected a last axis that is a multiple of 32"),
        (TensorType("float16", (1, 20)), None, ""),
        (TensorType("float16", ()), 32, "expected a last axis"),
    ],
)
def test_types_of_states(kind, alignment, complaint):
    states = Function("main", {}, {"a": kind}, (), (write("a", "a_new"),))
    assert complaint in "".join(check_states(states, alignment))
    assert bool(complaint) == bool(list(check_states(states, alignment)))


def test_one_mistake_is_one_complaint():
    wrong = operation("exp", "y", TensorType("float16", (1, 1, 1, 31)), x="row")
    rest = operation("exp", "z", ROW, x="y")
    complaints = list(check_operations(function(wrong, rest, outputs=("z",))))
    assert complaints == [
        f"main: exp y: it declares y as float16 [1, 1, 1, 31]; computed {ROW}",
    ]


def test_output_that_nothing_gives():
    complaint = "main: its output z is given by no operation"
    assert complaint in list(check_operations(function(*SOUND, outputs=("z",))))


def test_constant_of_another_type():
    value = Immediate(TensorType("float32", (2,)), np.zeros(2, np.float32))
    outputs = (("c", TensorType("float32", (3,))),)
    wrong = Operation("const", "c", {}, outputs, {"val": value})
    complaint = "main: const c: it declares c as float32 [3]; computed float32 [2]"
    assert list(check_operations(function(wrong))) == [complaint]


# Packages that coremltools makes of programs that have nothing to do with ours.


def save(path: Path, *functions: MilFunction) -> Path:
    program = Program()
    for index, body in enumerate(functions):
        program.add_function("main" if len(functions) == 1 else f"main_{index}", body)
    if len(functions) > 1:
        program.default_function_name = "main_0"
        program.export_as_multifunction = True
    model = ct.converters.mil.converter.mil_convert(
        program,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=ct.target.iOS18,
        compute_units=ct.ComputeUnit.CPU_ONLY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def network(width: int) -> MilFunction:
    """Convolutions, which rgexport does not make; a state that two steps write; weights."""
    generator = np.random.default_rng(width)
    kernel = generator.normal(size=(width, 3, 3, 3)).astype(np.float32)
    matrix = generator.normal(size=(7, width)).astype(np.float32)
    inputs = {
        "image": Placeholder((1, 3, 8, 8), dtype=types.fp32, name="image"),
        "sum": StateTensorPlaceholder((1, width), dtype=types.fp16, name="sum"),
    }
    with MilFunction(inputs, opset_version=ct.target.iOS18) as body:
        x = mb.conv(x=body.inputs["image"], weight=kernel, pad_type="same")
        x = mb.reduce_mean(x=mb.relu(x=x), axes=[2, 3])
        half = mb.cast(x=x, dtype="fp16")
        before = mb.read_state(input=body.inputs["sum"])
        once = mb.coreml_update_state(state=body.inputs["sum"], value=mb.add(x=before, y=half))
        mb.coreml_update_state(state=body.inputs["sum"], value=mb.mul(x=once, y=np.float16(0.5)))
        body.set_outputs([mb.softmax(x=mb.linear(x=x, weight=matrix), name="classes")])
    return body


def test_foreign_package(tmp_path, capsys):
    path = save(tmp_path / "network.mlpackage", network(20))
    assert check_package(open_package(path), alignment=None) == []
    assert run(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "mlpackage" and not found["made_by_rgexport"]
    assert found["problems"] == [] and found["unchecked"] == ["conv", "relu"]
    (name,) = found["functions"]
    described = found["functions"][name]
    assert name == found["default_function"] == "main"
    assert [value["name"] for value in described["inputs"]] == ["image"]
    assert described["outputs"][0] | {"help": ""} == {
        **{"name": "classes", "dtype": "float32", "shape": [1, 7], "help": ""},
    }
    assert described["states"][0]["shape"] == [1, 20]
    assert described["operations"]["write_state"] == 2
    sizes = {share["dtype"]: share["items"] for share in found["weights"]}
    assert sizes["float32"] == 20 * 27 + 7 * 20
    assert found["size"] == sum(record["size"] for record in found["files"].values())


def test_foreign_package_as_text(tmp_path, capsys):
    path = save(tmp_path / "network.mlpackage", network(20))
    assert run(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "network: Core ML package, specification 9 (iOS 18 or later)" in text
    assert "No problems. What these operations give was believed: conv, relu." in text


def test_state_of_another_size_in_another_function(tmp_path):
    path = save(tmp_path / "two.mlpackage", network(20), network(24))
    complaint = "main_1: state sum is float16 [1, 24]; in main_0 it is float16 [1, 20]"
    assert describe(str(path))["problems"] == [complaint]


def test_what_is_no_package(tmp_path, capsys):
    for name in ("none.mlpackage", "empty.mlpackage"):
        if name.startswith("empty"):
            (tmp_path / name).mkdir()
        assert run(["inspect", str(tmp_path / name)]) == 2
        assert f"{name} is not a Core ML package" in capsys.readouterr().err
