"""Reads and checks the manifest of an artifact folder."""

import math
import reprlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rgexport.artifacts.format import FolderFormat, folder_format
from rgexport.artifacts.manifest import (
    ACTIVATIONS,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    StoredTensor,
)
from rgexport.errors import RequestError
from rgexport.files.paths import stays_inside
from rgexport.files.typed_json import Mismatch, from_json, read_json, require_version, shown_key
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.state import state_specs
from rgexport.units import amount

MAX_STATE_BYTES = 1 << 30  # the largest state of a conversation in float32: twenty times a 9B's


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a folder's manifest; RequestError names the file and place of a fault."""
    path = folder / MANIFEST
    if not folder.exists():
        raise RequestError(f"there is no {folder}")
    if not path.is_file():
        raise RequestError(
            f"{folder} is not an rgexport artifact: it has no {MANIFEST}; name a folder that an "
            "export made, or export the model again"
        )
    fields = read_json(path)
    version, kind = fields.get("format_version"), fields.get("kind")
    artifact_format = folder_format(kind) if isinstance(kind, str) else None
    if artifact_format is None or type(version) is not int:
        raise RequestError(f"{path} is not the manifest of an rgexport artifact")
    require_version(path, version, FORMAT_VERSION, "export the model again")
    try:
        manifest = from_json(artifact_format.manifest, fields)
        _check(manifest, artifact_format)
    except (Mismatch, RequestError) as error:
        raise RequestError(f"{path} is damaged: {error}") from None
    return manifest


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _check(manifest: Manifest, artifact_format: FolderFormat) -> None:
    for name, record in manifest.files.items():
        is_safe = stays_inside(name) and name != MANIFEST and str(PurePosixPath(name)) == name
        _require(is_safe, f"files: {name!r} is no plain path within the artifact")
        is_sound = record.size >= 0 and len(record.sha256) == 64
        _require(is_sound, f"files.{name}: not a hash and size")
    precisions = *artifact_format.precisions, *artifact_format.planned_precisions
    for field, names in (("precision", precisions), ("compute", ACTIVATIONS)):
        name = getattr(manifest, field)
        _require(name in names, f"{field} is {name!r}; expected {' or '.join(names)}")
    check_config(manifest.config)
    expected_shapes = {name: spec.shape for name, spec in model_tensors(manifest.config).items()}
    shapes = {name: tensor.shape for name, tensor in manifest.tensors.items()}
    for name in expected_shapes.keys() | shapes.keys():
        shape, expected = shapes.get(name), expected_shapes.get(name)
        complaint = f"tensors.{shown_key(name)} has shape {shape}; expected {expected}"
        _require(shape == expected, complaint)
        is_planned = manifest.plan.get(name) == manifest.tensors[name].scheme
        _require(is_planned, f"tensors.{name} is not stored as the plan says")
        _check_parts(f"tensors.{name}.parts", manifest, manifest.tensors[name], artifact_format)
    artifact_format.check_manifest(manifest)
    states, io = artifact_format.interface(manifest)
    _check_records("states", manifest.states, states)
    _check_records("io.inputs", manifest.io.inputs, io.inputs)
    _check_records("io.outputs", manifest.io.outputs, io.outputs)


def check_config(config: GriffinConfig) -> None:
    """Raises Mismatch for sizes that do not fit one another."""
    _require(config.block_types, "config.block_types is empty; expected one for each layer")
    state_bytes = sum(4 * math.prod(spec.shape) for spec in state_specs(config))
    _require(
        state_bytes <= MAX_STATE_BYTES,
        f"config.window is {config.window}: the state of a conversation would take "
        f"{amount(state_bytes)}; expected at most {amount(MAX_STATE_BYTES)}",
    )
    lru_heads, lru_width, rope_dims = config.lru_heads, config.lru_width, config.rope_dims
    _require(
        "recurrent" not in config.block_types or lru_width % lru_heads == 0,
        f"config.lru_heads is {lru_heads}; expected a divisor of lru_width, {lru_width}",
    )
    _require(
        "attention" not in config.block_types or rope_dims <= config.head_dim,
        f"config.rope_dims is {rope_dims}; expected at most head_dim, {config.head_dim}",
    )


def _check_records(field: str, records: Sequence[Any], expected: Sequence[Any]) -> None:
    complaint = f"{field} has {len(records)} entries; expected {len(expected)}"
    _require(len(records) == len(expected), complaint)
    for index, (record, expected_record) in enumerate(zip(records, expected, strict=True)):
        for name, value in vars(expected_record).items():
            actual = getattr(record, name)
            complaint = f"{field}[{index}].{name} is {reprlib.repr(actual)}; expected {value!r}"
            _require(actual == value, complaint)


def _check_parts(
    label: str, manifest: Manifest, stored: StoredTensor, artifact_format: FolderFormat
) -> None:
    _require(not stored.scheme.is_gguf_only, f"{label}: only GGUF files have ggml types")
    is_quantized = stored.scheme.is_quantized
    _require(len(stored.shape) == 2 or not is_quantized, f"{label}: only matrices are quantized")
    try:
        expected = dict(artifact_format.part_shapes(stored.shape, stored.scheme))
    except RequestError as error:
        raise Mismatch(f"{label}: {error}") from None
    actual = {name: (part.dtype, part.shape) for name, part in stored.parts.items()}
    _require(actual == expected, f"{label} are {actual}; expected {expected}")
    for name, part in stored.parts.items():
        record = manifest.files.get(part.file)
        is_inside = record is not None and 0 <= part.offset <= record.size - part.nbytes
        _require(is_inside, f"{label}.{name} lies outside of {part.file!r}")


def _require(condition: object, complaint: str) -> None:
    if not condition:
        raise Mismatch(complaint)
