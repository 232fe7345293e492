"""Core ML packages, alone and as artifacts."""

import dataclasses
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from coremltools.proto import Model_pb2

from fuzz.readers import bytes_mutator as raw
from fuzz.readers import folders, json_mutator, proto_mutator, small
from fuzz.readers.shown import shown
from fuzz.readers.target import Target, require
from fuzz.readers.weights import change_folder
from rgexport.artifacts.coreml.mil.package import Package, open_package
from rgexport.artifacts.coreml.mil.program import FileValue
from rgexport.artifacts.describe import describe
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.griffin.checkpoint import open_checkpoint

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
_MANIFEST = "Manifest.json"


def _seeds(folder: Path) -> Iterable[bytes]:
    yield folders.pack(_tiny())
    config = dataclasses.replace(small.CONFIG, block_types=("attention",))
    checkpoint = open_checkpoint(small.write_model(folder / "model", config))
    options = CoreMLOptions(precision="int8", prefill_length=2)
    target = export_coreml(checkpoint, options, folder / "artifact")
    yield folders.pack(folders.files_in(target / "model.mlpackage"))


def _tiny() -> folders.Files:
    """One function of one operation, with a weight of two numbers in a file."""
    model = Model_pb2.Model(specificationVersion=9)
    for features, name in ((model.description.input, "x"), (model.description.output, "y")):
        feature = features.add(name=name)
        feature.type.multiArrayType.dataType = 65568
        feature.type.multiArrayType.shape.append(2)
    function = model.mlProgram.functions["main"]
    function.opset = "CoreML8"
    block = function.block_specializations["CoreML8"]
    block.outputs.append("y")
    _value_type(function.inputs.add(name="x").type)
    constant = block.operations.add(type="const")
    _value_type(constant.outputs.add(name="w").type)
    name = constant.attributes["name"]
    name.type.tensorType.dataType = 2
    name.immediateValue.tensor.strings.values.append("w")
    value = constant.attributes["val"]
    _value_type(value.type)
    value.blobFileValue.fileName, value.blobFileValue.offset = "@model_path/weights/weight.bin", 64
    add = block.operations.add(type="add")
    _value_type(add.outputs.add(name="y").type)
    add.inputs["x"].arguments.add(name="x")
    add.inputs["y"].arguments.add(name="w")
    items = {"1": {"author": "com.apple.CoreML", "path": "com.apple.CoreML/model.mlmodel"}}
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": "1"}
    blob = struct.pack("<II", 1, 2) + bytes(56) + struct.pack("<IIQQQ", 0xDEADBEEF, 2, 8, 128, 0)
    return {
        _MANIFEST: folders.Entry(json.dumps(manifest).encode()),
        MODEL: folders.Entry(model.SerializeToString(deterministic=True)),
        WEIGHTS: folders.Entry(blob + bytes(32) + struct.pack("<ff", 1, 2)),
    }


def _value_type(message: Any) -> None:
    message.tensorType.dataType, message.tensorType.rank = 11, 1
    message.tensorType.dimensions.add().constant.size = 2


def _mutate(data: bytes, random: Random) -> bytes:
    files = folders.unpack(data)
    name = random.choice(list(files) or [MODEL])
    if random.randrange(3) and MODEL in files:
        name = MODEL
    if name not in files:
        return data
    content = files[name].content
    if random.randrange(12) == 0:
        change_folder(files, name, random)
    elif name == MODEL:
        files[name] = folders.Entry(proto_mutator.mutate(content, random))
    elif name == _MANIFEST:
        files[name] = folders.Entry(json_mutator.mutate(content, random))
    else:
        files[name] = folders.Entry(raw.flip(content, random))
    return folders.pack(files)


def _read(data: bytes, folder: Path) -> tuple[Package, dict[str, Any], str]:
    folders.place(data, folder / "model.mlpackage")
    path = folder / "model.mlpackage"
    found = describe(str(path), verify=True)
    text = shown(found, data)
    package = open_package(path)
    if not found["problems"]:
        for value in _file_values(package):
            package.blob(value).read(0, value.type.nbytes)
    return package, found, text


def _file_values(package: Package) -> Iterable[FileValue]:
    for function in package.functions.values():
        for operation in function.walk():
            yield from (v for _, v in operation.constants if isinstance(v, FileValue))


def _agree(data: bytes, folder: Path, answer: tuple[Package, dict[str, Any], str]) -> None:
    """What the messages of the file say by themselves, and where its weights lie."""
    package, found, text = answer
    require(all(c.isprintable() or c == "\n" for c in text), "text that a terminal would obey")
    root = (folder / "model.mlpackage").resolve()
    paths = [package.model, *(blob.path for blob in package.blob_files.values())]
    require(all(path.resolve().is_relative_to(root) for path in paths), "a file elsewhere")
    if found["problems"]:
        return
    theirs = Model_pb2.Model.FromString(package.model.read_bytes())
    functions = theirs.mlProgram.functions
    require(set(functions) == set(package.functions), "other functions than the file has")
    for name, function in package.functions.items():
        block = functions[name].block_specializations[functions[name].opset]
        kinds = [operation.type for operation in block.operations]
        require([op.type for op in function.operations] == kinds, "other operations", name)
        require(list(function.outputs) == list(block.outputs), "other outputs", name)
    for value in _file_values(package):
        size = package.blob_files[value.file].size
        require(value.offset + 64 + value.type.nbytes <= size, "a weight outside of its file")


TARGETS = {"package": Target("package", _seeds, _mutate, _read, _agree, 1 << 18)}
