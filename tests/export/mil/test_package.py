"""Reading packages that coremltools wrote, and refusing damaged ones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools as ct
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.proto import Model_pb2

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.mil.package import means_package, open_package
from rgexport.export.mil.program import FileValue, Immediate, Name, TensorType

WEIGHT = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A function with a state, a weight, and immediate values of several dtypes."""

    @mb.program(
        input_specs=[mb.TensorSpec((1, 4), types.fp32), mb.StateTensorSpec((1, 8), types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x: Any, s: Any) -> Any:
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
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy.mlpackage"))


def test_reads_all_of_it(saved: Path) -> None:
    package = open_package(saved)
    assert package.default_function == "main" and package.specification_version == 9
    function = package.functions["main"]
    assert function.inputs == {"x": TensorType("float32", (1, 4))}
    assert function.states == {"s": TensorType("float16", (1, 8))}
    assert function.outputs == ("out",)
    kinds = [op.type for op in function.operations]
    assert kinds.count("write_state") == 1 and kinds.count("read_state") == 2
    linear = next(op for op in function.walk() if op.type == "linear")
    assert linear.name == "product" and linear.inputs["x"] == (Name("x"),)
    assert linear.outputs == (("product", TensorType("float32", (1, 8))),)


def test_reads_weights_and_immediate_values(saved: Path) -> None:
    package = open_package(saved)
    values = [v for op in package.functions["main"].walk() for _, v in op.constants]
    (stored,) = (v for v in values if isinstance(v, FileValue))
    found = package.blob(stored).read(0, stored.type.nbytes).view(np.float32)
    np.testing.assert_array_equal(found.reshape(stored.type.shape), WEIGHT)
    arrays = [v.array for v in values if isinstance(v, Immediate)]
    assert any(a.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] and a.dtype == np.float16 for a in arrays)
    assert any(a.tolist() == [[True, False] * 4] and a.dtype == bool for a in arrays)
    assert any(a.dtype == object and a.item() == "fp16" for a in arrays)


def test_inspect_describes_a_package_of_another_tool(saved: Path, capsys: Any) -> None:
    assert run(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "mlpackage" and not found["made_by_rgexport"]
    assert found["problems"] == [] and found["unchecked"] == ["logical_not"]
    expected = {"summary": "D", "author": "A", "license": "L", "version": "V", "key": "value"}
    assert expected.items() <= found["metadata"].items()
    main = found["functions"]["main"]
    x = {"name": "x", "dtype": "float32", "shape": [1, 4], "help": "what x is"}
    assert main["inputs"] == [x] and main["states"][0]["shape"] == [1, 8]
    assert main["outputs"][0]["name"] == "out" and main["operations"]["write_state"] == 1
    (weights,) = found["weights"]
    assert weights == {"dtype": "float32", "blobs": 1, "items": 32, "bytes": 128}
    assert found["size"] == sum(record["size"] for record in found["files"].values())


def test_inspect_shows_it_as_text(saved: Path, tmp_path: Path, capsys: Any) -> None:
    copied = shutil.copytree(saved, tmp_path / "tiny-4.25")  # 25 is no suffix
    assert run(["inspect", str(copied)]) == 0
    text = capsys.readouterr().out
    assert "tiny-4.25: Core ML package, specification 9 (iOS 18 or later)" in text
    assert "Not made by rgexport" in text and "No problems" not in text
    assert "rgexport cannot run these operations: logical_not." in text


def test_says_what_is_a_package(saved: Path, tmp_path: Path) -> None:
    assert means_package(saved) and means_package(tmp_path / "missing.mlpackage")
    assert means_package(saved.rename(saved.with_name("renamed")))
    saved.with_name("renamed").rename(saved)
    assert not means_package(tmp_path)


def refused(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        open_package(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(path: Path, **fields: Any) -> None:
    manifest = path / "Manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | fields))


def edit_model(path: Path, change: Callable[[Any], Any]) -> None:
    model = Model_pb2.Model.FromString((path / MODEL).read_bytes())
    change(model)
    (path / MODEL).write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Manifest.json", "is not a Core ML package: it has no Manifest.json"),
        (MODEL, "model.mlmodel is missing"),
        (WEIGHTS, "weight.bin is missing"),
    ],
)
def test_missing_files(copied: Path, name: str, expected: str) -> None:
    (copied / name).unlink()
    assert expected in refused(copied)
    shutil.rmtree(copied)
    assert "is not a Core ML package: there is no such folder" in refused(copied)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"{}", b'{"itemInfoEntries": []}'])
def test_damaged_manifests(copied: Path, content: bytes) -> None:
    (copied / "Manifest.json").write_bytes(content)
    assert "Manifest.json" in refused(copied)


@pytest.mark.parametrize(
    "target", ["../../../secret", "/etc/hostname", "com.apple.CoreML/../../../secret", "a\0b"]
)
def test_paths_that_lead_out(copied: Path, target: str) -> None:
    (copied.parent / "secret").write_bytes(b"")
    edit_manifest(copied, rootModelIdentifier="x", itemInfoEntries={"x": {"path": target}})
    assert "leads out of" in refused(copied)


def test_links_that_lead_out(copied: Path) -> None:
    weights = copied / WEIGHTS
    weights.rename(copied.parent / "elsewhere.bin")
    weights.symlink_to(copied.parent / "elsewhere.bin")
    assert "leads out of" in refused(copied)


def test_weights_outside(copied: Path) -> None:
    names = {
        "@model_path/../../../elsewhere.bin": "leads out",
        "/etc/hostname": "expected @model_path",
        "@model_path/" + "x" * 5000: "is missing",
    }
    for name, expected in names.items():
        edit_model(copied, lambda model, name=name: set_file(model, name))
        assert expected in refused(copied)


def operations(model: Any) -> Any:
    (function,) = model.mlProgram.functions.values()
    return function.block_specializations[function.opset].operations


def set_file(model: Any, name: str) -> None:
    for op in operations(model):
        for value in op.attributes.values():
            if value.HasField("blobFileValue"):
                value.blobFileValue.fileName = name


def first_constant(model: Any, field: str) -> Any:
    constants = (op.attributes["val"] for op in operations(model) if op.type == "const")
    return next(v for v in constants if v.immediateValue.tensor.WhichOneof("value") == field)


def shrink(model: Any) -> None:
    tensor = first_constant(model, "bytes").immediateValue.tensor
    tensor.bytes.values = tensor.bytes.values[:-1]


def grow(model: Any) -> None:
    dimensions = first_constant(model, "bools").type.tensorType.dimensions
    dimensions[0].constant.size = 1 << 40


def unknown(model: Any) -> None:
    for dimension in first_constant(model, "bytes").type.tensorType.dimensions[:2]:
        dimension.unknown.variadic = False


def first_output(model: Any) -> Any:
    return operations(model)[0].outputs[0]


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fewer bytes than elements": (shrink, "and has 15 bytes"),
    "an enormous shape": (grow, "cannot have the shape"),
    "an immediate value of unknown shape": (unknown, "and has"),
    "no program": (lambda m: m.ClearField("mlProgram"), "holds no ML program"),
    "another opset": (
        lambda m: setattr(m.mlProgram.functions["main"], "opset", "CoreML99"),
        "has nothing for its opset 'CoreML99'",
    ),
    "no such default": (
        lambda m: setattr(m.description, "defaultFunctionName", "other"),
        "has no function 'other'",
    ),
    "an unknown dtype": (
        lambda m: setattr(first_output(m).type.tensorType, "dataType", 99),
        "has the unknown dtype 99",
    ),
    "a rank that is not its dimensions'": (
        lambda m: setattr(first_output(m).type.tensorType, "rank", 7),
        "has rank 7",
    ),
    "a value without a type": (lambda m: first_output(m).ClearField("type"), "has no type"),
    "a constant without a value": (
        lambda m: first_constant(m, "bools").ClearField("immediateValue"),
        "val has no value",
    ),
    "an input twice": (
        lambda m: m.mlProgram.functions["main"].inputs.extend(
            m.mlProgram.functions["main"].inputs[:1]
        ),
        "has the input x twice",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_programs_that_contradict_themselves(copied: Path, name: str) -> None:
    change, expected = CHANGES[name]
    edit_model(copied, change)
    assert expected in refused(copied)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\1\0\0\0\1\0\0\0" + b"\0" * 56, b"short"])
def test_weight_files_of_another_kind(copied: Path, content: bytes) -> None:
    (copied / WEIGHTS).write_bytes(content)
    assert "weight.bin is" in refused(copied)


def overwrite(path: Path, place: int, value: int, size: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(value.to_bytes(size, "little"))


@pytest.mark.parametrize(
    ("place", "size", "value", "expected"),
    [
        (0, 4, 0xDEADBEEE, "there is no weight at offset 64"),
        (4, 4, 1, "128 bytes of float16 at 128; the program needs 128 of float32"),
        (4, 4, 77, "of type 77"),
        (8, 8, 64, "describes 64 bytes"),
        (8, 8, 1 << 63, "the program needs 128"),
        (16, 8, 1 << 63, f"at {1 << 63}; the program needs"),
    ],
)
def test_weight_headers_that_do_not_fit(
    copied: Path, place: int, size: int, value: int, expected: str
) -> None:
    overwrite(copied / WEIGHTS, 64 + place, value, size)
    assert expected in refused(copied)


@pytest.mark.parametrize("size", [100, 200])
def test_truncated_weights(copied: Path, size: int) -> None:
    os.truncate(copied / WEIGHTS, size)
    assert f"has {size} bytes; expected 128 bytes of a weight at 128" in refused(copied)


def test_overlapping_weights(copied: Path) -> None:
    """All of them may be hashed: many long ones in a short file would take forever."""
    offsets = 128, 192, 256

    def use_it_four_times(model: Any) -> None:
        program = operations(model)
        first = next(o for o in program if o.attributes["val"].HasField("blobFileValue"))
        for offset in offsets:
            copy = program.add()
            copy.CopyFrom(first)
            copy.attributes["val"].blobFileValue.offset = offset

    edit_model(copied, use_it_four_times)
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[:64] + data[64:128] * 4 + data[128:256])
    for offset in offsets:
        overwrite(copied / WEIGHTS, offset + 16, offset + 64, 8)
    assert "its weights overlap" in refused(copied)


LOOK = """
import sys
from rgexport.export.mil.messages import messages
ours = messages("Model").Model
assert not {"coremltools", "torch"} & sys.modules.keys()
from coremltools.proto.Model_pb2 import Model
assert Model is ours
"""


@pytest.mark.full
def test_messages_are_those_of_coremltools_without_loading_it() -> None:
    subprocess.run([sys.executable, "-c", LOOK], check=True)
