"""Folders with an `rgexport.json`, whoever wrote it."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx

from fuzz.readers import bytes_mutator as raw
from fuzz.readers import folders, json_mutator, small
from fuzz.readers.shown import shown
from fuzz.readers.target import Target, covers, require
from fuzz.readers.weights import change_folder
from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.describe import describe
from rgexport.artifacts.manifest import CARD, MANIFEST
from rgexport.artifacts.onnx.model_file import DATA_FILE, MODEL_FILE
from rgexport.artifacts.opening import open_artifact
from rgexport.export.onnx.exporter import OnnxOptions, export_onnx
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.quantize.plan import choose_scheme, make_plan

Answer = tuple[Artifact, dict[str, np.ndarray], str]


def _seeds(folder: Path) -> Iterable[bytes]:
    config = dataclasses.replace(small.CONFIG, block_types=("attention",))
    checkpoint = open_checkpoint(small.write_model(folder / "model", config))
    asked = {word: OnnxOptions(precision=word) for word in ("fp32", "int8", "int4")}
    plan = make_plan(config, choose_scheme("int4"), small.ROW_GROUPS)
    asked["groups"] = OnnxOptions(plan=plan)
    for word, options in asked.items():
        target = export_onnx(checkpoint, options, folder / word)
        files = folders.files_in(target)
        files[MODEL_FILE] = folders.Entry(_without_nodes(files[MODEL_FILE].content))
        yield folders.pack(fitted(_compact(files)))


def _without_nodes(content: bytes) -> bytes:
    """The graph's inputs and outputs alone: the rest is not read here."""
    model = onnx.load_model_from_string(content)
    for field in ("node", "initializer", "value_info"):
        model.graph.ClearField(field)
    model.ClearField("functions")
    return bytes(model.SerializeToString())


def _compact(files: folders.Files) -> folders.Files:
    """Without the gaps that let weights lie on pages of their own."""
    fields, content = json.loads(files[MANIFEST].content), files[DATA_FILE].content
    parts = [p for tensor in fields["tensors"].values() for p in tensor["parts"].values()]
    packed = b""
    for part in parts:
        size = math.prod(part["shape"]) * np.dtype(part["dtype"]).itemsize
        begin, part["offset"] = part["offset"], len(packed)
        packed += content[begin : begin + size]
    manifest = folders.Entry(json.dumps(fields).encode())
    return files | {DATA_FILE: folders.Entry(packed), MANIFEST: manifest}


def fitted(files: folders.Files) -> folders.Files:
    """With the hashes and sizes of the files, as whoever alters them can compute them."""
    entry = files.get(MANIFEST)
    if entry is None:
        return files
    try:
        fields = json_mutator.parse(entry.content)
    except ValueError:
        return files
    for key, records in fields if isinstance(fields, json_mutator.Pairs) else ():
        if key == "files" and isinstance(records, json_mutator.Pairs):
            records[:] = [(name, _record(files.get(name), old)) for name, old in records]
    return files | {MANIFEST: folders.Entry(json_mutator.write(fields))}


def _record(entry: folders.Entry | None, old: Any) -> Any:
    if entry is None or entry.kind != folders.FILE:
        return old
    digest = hashlib.sha256(entry.content).hexdigest()
    return json_mutator.Pairs([("sha256", digest), ("size", len(entry.content))])


def mutate(data: bytes, random: Random) -> bytes:
    """Mostly changes the manifest, and mostly makes its hashes fit again."""
    files = folders.unpack(data)
    name = random.choice(list(files) or [MANIFEST])
    if random.randrange(3) and MANIFEST in files:
        name = MANIFEST
    choice = random.randrange(10)
    if choice == 0 and name in files:
        change_folder(files, name, random)
    elif name == MANIFEST and name in files:
        files[name] = folders.Entry(_change_manifest(files[name].content, random))
    elif name in files:
        files[name] = folders.Entry(raw.flip(files[name].content, random))
    if random.randrange(10):
        files = fitted(files)
    return folders.pack(files)


def _change_manifest(content: bytes, random: Random) -> bytes:
    """One of its parts: there are many tensors, and they would hide the rest."""
    try:
        value = json_mutator.parse(content)
    except ValueError:
        return json_mutator.mutate(content, random)
    if not isinstance(value, json_mutator.Pairs) or not value or random.randrange(8) == 0:
        return json_mutator.mutate(content, random)
    at = random.randrange(len(value))
    key, part = value[at]
    if isinstance(part, list) and part and random.randrange(3):
        inside = random.randrange(len(part))
        if isinstance(part, json_mutator.Pairs):
            part[inside] = part[inside][0], json_mutator.change(part[inside][1], random)
        else:
            part[inside] = json_mutator.change(part[inside], random)
    else:
        value[at] = key, json_mutator.change(part, random)
    return json_mutator.write(value)


def _read(data: bytes, folder: Path) -> Answer:
    """As `inspect` and `validate` do."""
    folders.place(data, folder)
    artifact = open_artifact(folder)
    weights = {name: rows.whole() for name, rows in artifact.weights.items()}
    found = describe(str(folder))
    return artifact, weights, shown(found, data)


def agree(data: bytes, folder: Path, answer: Answer) -> None:
    """Written again it says the same; weights are those of the bytes; no file lies elsewhere."""
    artifact, weights, text = answer
    manifest = artifact.manifest
    require(all(c.isprintable() or c == "\n" for c in text), "text that a terminal would obey")
    stated = json.loads((folder / MANIFEST).read_bytes())
    again = json.loads(json.dumps(manifest.to_dict()))
    for key, value in again.items():
        require(key not in stated or covers(stated[key], value), "another value in it", key)
    for name, record in manifest.files.items():
        if name == CARD:  # its owner may edit it
            continue
        path = folder / name
        require(path.parent.resolve().is_relative_to(folder.resolve()), "a file elsewhere", name)
        require(path.stat().st_size == record.size, "a file of another size", name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        require(digest == record.sha256, "a file of another hash", name)
    for name, array in weights.items():
        require(array.shape == manifest.tensors[name].shape, "a weight of another shape", name)
        for part in manifest.tensors[name].parts.values():
            inside = (
                part.offset >= 0
                and part.offset + part.nbytes <= (folder / part.file).stat().st_size
            )
            require(inside, "a part outside of its file", name)


TARGETS = {"manifest": Target("manifest", _seeds, mutate, _read, agree)}
