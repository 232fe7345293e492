"""Reading packages that coremltools wrote, and refusing damaged ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools as ct
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.proto import Model_pb2

from rgexport.artifacts.coreml.mil.package import open_package
from rgexport.artifacts.coreml.mil.program import FileValue, Immediate, Name, TensorType
from rgexport.cli import run
from rgexport.errors import RequestError

WEIGHT = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function with a state, a weight, and immediate values of several dtypes."""

    @mb.program(
        input_specs=[mb.TensorSpec((1, 4), types.fp32), mb.StateTensorSpec((1, 8), types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x, s):
        y = mb.linear(x=x, weight=WEIGHT, name="product")
        half = mb.add(x=mb.cast(x=y, dtype="fp16"), y=mb.read_state(input=s))
        half = mb.mul(x=half, y=np.float16([[1, 2, 3, 4, 5, 6, 7, 8]]))
        after = mb.coreml_update_state(state=s, value=half)
        flags = mb.logical_not(x=np.array([[True, False] * 4]))
        return mb.select(cond=flags, a=after, b=mb.const(val=np.float16([[0.5] * 8])), name="out")

    path = tmp_path_factory.mktemp("saved") / "toy.mlpackage"
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.author, model.license, model.version = "A", "L", "V"
    model.short_description = "D"
    model.user_defined_metadata["key"] = "value"
    model.input_description["x"] = "what x is"
    model.save(str(path))
    return path


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy.mlpackage"))


def test_reads_all_of_it(saved):
    package = open_package(saved)
    assert package.default_function == "main" and package.specification_version == 9
    function = package.functions["main"]
    linear = next(op for op in function.walk() if op.type == "linear")
    assert linear.name == "product" and linear.inputs["x"] == (Name("x"),)
    assert linear.outputs == (("product", TensorType("float32", (1, 8))),)
    values = [value for op in function.walk() for _, value in op.constants]
    (stored,) = (value for value in values if isinstance(value, FileValue))
    weight = package.blob(stored).read(0, stored.type.nbytes).view(np.float32)
    np.testing.assert_array_equal(weight.reshape(stored.type.shape), WEIGHT)
    arrays = [value.array for value in values if isinstance(value, Immediate)]
    assert any(a.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] and a.dtype == np.float16 for a in arrays)
    assert any(a.tolist() == [[True, False] * 4] and a.dtype == bool for a in arrays)
    assert any(a.dtype == object and a.item() == "fp16" for a in arrays)


def test_inspect_describes_a_package_of_another_tool(saved, tmp_path, capsys):
    copied = shutil.copytree(saved, tmp_path / "tiny-4.25")  # 25 is no suffix
    assert run(["inspect", str(copied), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "mlpackage" and not facts["made_by_rgexport"]
    assert facts["problems"] == [] and facts["unchecked"] == ["logical_not"]
    expected = {"summary": "D", "author": "A", "license": "L", "version": "V", "key": "value"}
    assert expected.items() <= facts["metadata"].items()
    main = facts["functions"]["main"]
    x = {"name": "x", "dtype": "float32", "shape": [1, 4], "help": "what x is"}
    assert main["inputs"] == [x] and main["states"][0]["shape"] == [1, 8]
    assert main["outputs"][0]["name"] == "out" and main["operations"]["write_state"] == 1
    assert facts["weights"] == [{"dtype": "float32", "blobs": 1, "items": 32, "bytes": 128}]
    assert run(["inspect", str(copied)]) == 0
    text = capsys.readouterr().out
    assert "tiny-4.25: Core ML package, specification 9 (iOS 18 or later)" in text
    assert "Not made by rgexport" in text and "No problems" not in text
    assert "rgexport cannot run these operations: logical_not." in text


def refused(path):
    with pytest.raises(RequestError) as caught:
        open_package(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("Manifest.json", None, "is not a Core ML package: it has no Manifest.json"),
        (MODEL, None, "model.mlmodel is missing"),
        (WEIGHTS, None, "weight.bin is missing"),
        ("Manifest.json", b"[]", "Manifest.json"),
        ("Manifest.json", b"\xff", "Manifest.json"),
        ("Manifest.json", b'{"itemInfoEntries": []}', "Manifest.json"),
        (WEIGHTS, b"", "weight.bin is"),
        (WEIGHTS, b"\0" * 64, "weight.bin is"),
    ],
)
def test_files_that_are_missing_or_of_another_kind(copied, name, content, expected):
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_bytes(content)
    assert expected in refused(copied)


@pytest.mark.parametrize("target", ["../../../secret", "/etc/hostname", "a\0b"])
def test_paths_and_links_that_lead_out(copied, target):
    (copied.parent / "secret").write_bytes(b"")
    path = copied / "Manifest.json"
    changed = {"rootModelIdentifier": "x", "itemInfoEntries": {"x": {"path": target}}}
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | changed))
    assert "leads out of" in refused(copied)
    path.write_text(text)
    weights = (copied / WEIGHTS).rename(copied.parent / "elsewhere.bin")
    (copied / WEIGHTS).symlink_to(weights)
    assert "leads out of" in refused(copied)


def main(model):
    return model.mlProgram.functions["main"]


def operations(model):
    return main(model).block_specializations[main(model).opset].operations


def stored_weight(model):
    return next(op for op in operations(model) if op.attributes["val"].HasField("blobFileValue"))


def constant(model, field):
    constants = (op.attributes["val"] for op in operations(model) if op.type == "const")
    return next(v for v in constants if v.immediateValue.tensor.WhichOneof("value") == field)


def first_type(model):
    return operations(model)[0].outputs[0].type


def name_file(name):
    return lambda model: setattr(
        stored_weight(model).attributes["val"].blobFileValue, "fileName", name
    )


def shrink(model):
    tensor = constant(model, "bytes").immediateValue.tensor
    tensor.bytes.values = tensor.bytes.values[:-1]


def grow(model):
    constant(model, "bools").type.tensorType.dimensions[0].constant.size = 1 << 40


CHANGES = [
    (name_file("@model_path/../../../elsewhere.bin"), "leads out"),
    (name_file("/etc/hostname"), "expected @model_path"),
    (name_file("@model_path/" + "x" * 5000), "is missing"),
    (shrink, "and has 15 bytes"),
    (grow, "cannot have the shape"),
    (lambda m: m.ClearField("mlProgram"), "holds no ML program"),
    (lambda m: setattr(main(m), "opset", "CoreML99"), "has nothing for its opset 'CoreML99'"),
    (lambda m: setattr(m.description, "defaultFunctionName", "other"), "has no function 'other'"),
    (lambda m: setattr(first_type(m).tensorType, "dataType", 99), "has the unknown dtype 99"),
    (lambda m: setattr(first_type(m).tensorType, "rank", 7), "has rank 7"),
    (lambda m: operations(m)[0].outputs[0].ClearField("type"), "has no type"),
    (lambda m: constant(m, "bools").ClearField("immediateValue"), "val has no value"),
    (lambda m: main(m).inputs.extend(main(m).inputs[:1]), "has the input x twice"),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES, ids=[words for _, words in CHANGES])
def test_programs_that_contradict_themselves(copied, change, expected):
    model = Model_pb2.Model.FromString((copied / MODEL).read_bytes())
    change(model)
    (copied / MODEL).write_bytes(model.SerializeToString())
    assert expected in refused(copied)


def overwrite(path, start, value, size):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(value.to_bytes(size, "little"))


@pytest.mark.parametrize(
    ("start", "size", "value"),
    [(64, 4, 0xDEADBEEE), (68, 4, 1), (68, 4, 77), (72, 8, 64), (80, 8, 1 << 63)],
)
def test_weight_headers_that_do_not_fit(copied, start, size, value):
    overwrite(copied / WEIGHTS, start, value, size)
    assert "there is no header at 64 of 128 bytes of float32" in refused(copied)


def test_overlapping_weights(copied):
    """All of them may be hashed: many long ones in a short file would take forever."""
    offsets = 128, 192, 256
    model = Model_pb2.Model.FromString((copied / MODEL).read_bytes())
    program = operations(model)
    for offset in offsets:
        copy = program.add()
        copy.CopyFrom(stored_weight(model))
        copy.attributes["val"].blobFileValue.offset = offset
    (copied / MODEL).write_bytes(model.SerializeToString())
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[:64] + data[64:128] * 4 + data[128:256])
    for offset in offsets:
        overwrite(copied / WEIGHTS, offset + 16, offset + 64, 8)
    assert "its weights overlap" in refused(copied)
