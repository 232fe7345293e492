"""Wrong models, and wrong artifacts of the right one: what `validate` must not let pass.

Each wrong model is a sound checkpoint of the right shape, with other weights; what is exported from
it is as near to its own original as any artifact. Only what knows the right weights can tell.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.artifacts.artifact import Artifact, record_files
from rgexport.artifacts.coreml.manifest import CoreMLManifest
from rgexport.artifacts.coreml.package import model_file
from rgexport.artifacts.gguf.integrity import data_start, seal
from rgexport.artifacts.manifest import write_manifest
from rgexport.artifacts.opening import open_artifact
from rgexport.files.hashing import hash_file
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, QUANTIZABLE, layer_tensors, model_tensors
from rgexport.quantize.gguf_header import read_header
from rgexport.quantize.schemes.packing import pack, unpack
from rgexport.quantize.schemes.registry import Affine, Ggml

Weights = dict[str, np.ndarray]
Wrong = Callable[[GriffinConfig, Weights], Weights]
"""Other weights of the same shapes, float32, by canonical name."""
Spoil = Callable[[Path], None]
"""Changes an artifact in its place; its hashes are made to fit."""


# ---- Other weights --------------------------------------------------------------------------


def _matrices(config: GriffinConfig) -> list[str]:
    tensors = model_tensors(config)
    return [name for name, spec in tensors.items() if spec.role in QUANTIZABLE]


def _shuffled(values: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.permutation(values.reshape(-1)).reshape(values.shape)


def _all_shuffled(config: GriffinConfig, weights: Weights) -> Weights:
    return {name: _shuffled(weights[name]) for name in _matrices(config)}


def _fresh(gain: float, embedding: float = 1.0) -> Wrong:
    """Random matrices of the same spread, times `gain`; the embedding once more by another."""

    def make(config: GriffinConfig, weights: Weights) -> Weights:
        rng = np.random.default_rng(2)
        found = {}
        for name in _matrices(config):
            values = weights[name]
            size = values.std() * gain * (embedding if name == EMBEDDING else 1.0)
            found[name] = size * rng.standard_normal(values.shape, np.float32)
        return found

    return make


def _shifted_embedding(config: GriffinConfig, weights: Weights) -> Weights:
    return {EMBEDDING: np.roll(weights[EMBEDDING], 1, axis=0)}


def _exchanged_mlps(config: GriffinConfig, weights: Weights) -> Weights:
    first, second = 0, config.num_layers - 1
    names = [name for name in layer_tensors(config, first) if ".mlp_block." in name]
    pairs = [(name, name.replace(f"layers.{first}.", f"layers.{second}.")) for name in names]
    return {a: weights[b] for a, b in pairs} | {b: weights[a] for a, b in pairs}


def _one_shuffled(config: GriffinConfig, weights: Weights) -> Weights:
    name = matrix_of(config)
    return {name: _shuffled(weights[name])}


def _larger_layer(config: GriffinConfig, weights: Weights) -> Weights:
    return {
        name: np.float32(1.05) * weights[name]
        for name, spec in layer_tensors(config, config.num_layers // 2).items()
        if spec.role in QUANTIZABLE
    }


def matrix_of(config: GriffinConfig) -> str:
    """The name of one matrix in the middle of a model."""
    return f"layers.{config.num_layers // 2}.mlp_block.up_proj.weight"


WRONG_WEIGHTS: dict[str, Wrong] = {
    "all matrices shuffled": _all_shuffled,
    "fresh random matrices": _fresh(1.0),
    "fresh ones of a twentieth of the size": _fresh(0.05),
    "the same with a dull embedding": _fresh(0.05, 0.05),
    "the embedding's rows shifted by one": _shifted_embedding,
    "MLPs of two layers exchanged": _exchanged_mlps,
    "one tensor shuffled": _one_shuffled,
    "one layer's matrices times 1.05": _larger_layer,
}
"""What is wrong → what makes it so."""


# ---- Artifacts that were altered ------------------------------------------------------------


@dataclass(frozen=True)
class GgmlBlock:
    """Where a block of a ggml type has its scale (float16) and its levels, in bytes."""

    size: int
    scale: int
    levels: slice
    bits: int


GGML_BLOCKS = {
    "q4_0": GgmlBlock(18, 0, slice(2, 18), 4),
    "q8_0": GgmlBlock(34, 0, slice(2, 34), 8),
    "q4_k": GgmlBlock(144, 0, slice(16, 144), 4),
}
"""The types that an artifact can be spoiled in (ggml-common.h)."""


def shuffle_scales(path: Path) -> None:
    """Exchanges the scales of one tensor's blocks among them."""
    artifact, name, scheme = _spoilable(path)
    if isinstance(scheme, Ggml):
        block = GGML_BLOCKS[scheme.type]
        values = _part(artifact, name, "data")
        scales = values.reshape(-1, block.size)[:, block.scale : block.scale + 2]
        scales[:] = np.random.default_rng(3).permutation(scales)
    else:
        values = _part(artifact, name, "scales")
        values[:] = _shuffled(values)
    values.flush()
    _fit_hashes(artifact)


def move_zero_points(path: Path) -> None:
    """Moves one tensor's zero points, or its levels where there are none, by one."""
    artifact, name, scheme = _spoilable(path)
    label = "zero_points" if "zero_points" in artifact.manifest.tensors[name].parts else "data"
    values = _part(artifact, name, label)
    if isinstance(scheme, Ggml):
        block = GGML_BLOCKS[scheme.type]
        levels = values.reshape(-1, block.size)[:, block.levels]
        levels[:] = _one_more(levels, block.bits, signed=block.bits == 8)
    else:
        values[:] = _one_more(values, scheme.bits, signed=artifact.manifest.kind == "coreml")
    values.flush()
    _fit_hashes(artifact)


def enlarge_scales(path: Path) -> None:
    """Makes all scales of one tensor a tenth larger."""
    artifact, name, scheme = _spoilable(path)
    if isinstance(scheme, Ggml):
        block = GGML_BLOCKS[scheme.type]
        values = _part(artifact, name, "data")
        scales = values.reshape(-1, block.size)[:, block.scale : block.scale + 2]
        larger = np.ascontiguousarray(scales).view(np.float16) * np.float16(1.1)
        scales[:] = larger.view(np.uint8)
    else:
        values = _part(artifact, name, "scales")
        values[:] = (values * np.float32(1.1)).astype(values.dtype)
    values.flush()
    _fit_hashes(artifact)


def exchange_rows(path: Path) -> None:
    """Exchanges two rows of one tensor, with their scales and zero points."""
    _permute_rows(path, lambda rows: [rows - 2, *range(1, rows - 2), 0, rows - 1])


def move_rows(path: Path) -> None:
    """Moves all rows of one tensor by one."""
    _permute_rows(path, lambda rows: [rows - 1, *range(rows - 1)])


def _permute_rows(path: Path, order: Callable[[int], list[int]]) -> None:
    artifact, name, _ = _spoilable(path)
    stored = artifact.manifest.tensors[name]
    for label in stored.parts:
        values = _part(artifact, name, label)
        rows = values.reshape(stored.shape[0], -1)
        rows[:] = np.array(rows[order(len(rows))])
        values.flush()
    _fit_hashes(artifact)


SPOILED: dict[str, Spoil] = {
    "the scales of one tensor's blocks shuffled": shuffle_scales,
    "one tensor's zero points off by one": move_zero_points,
    "all scales of one tensor times 1.1": enlarge_scales,
    "two rows of one tensor exchanged": exchange_rows,
    "one tensor's rows moved by one": move_rows,
}
"""What is wrong with an artifact of the right model → what makes it so."""


def _one_more(packed: np.ndarray, bits: int, *, signed: bool) -> np.ndarray:
    """Levels, as bytes hold them, and one more; the largest ones stay."""
    shape, dtype = packed.shape, packed.dtype
    levels = unpack(packed.view(np.uint8).reshape(1, -1), bits).astype(np.int32)
    top = 2 ** (bits - 1) if signed else 0
    levels = np.minimum((levels ^ top) + 1, 2**bits - 1) ^ top
    return pack(levels.astype(np.uint8), bits).reshape(shape).view(dtype)


def _spoilable(path: Path) -> tuple[Artifact, str, Affine | Ggml]:
    """An artifact and a matrix in it that can be spoiled: that of `matrix_of`, or another."""
    artifact = open_artifact(path)
    names = [matrix_of(artifact.manifest.config), *artifact.manifest.plan]
    for name in names:
        scheme = artifact.manifest.plan[name]
        if isinstance(scheme, Affine) or (isinstance(scheme, Ggml) and scheme.type in GGML_BLOCKS):
            return artifact, name, scheme
    raise ValueError(f"{path} has no matrix in integers that this knows how to spoil")


def _part(artifact: Artifact, name: str, label: str) -> np.memmap:
    """A part of a tensor, in the file."""
    part = artifact.manifest.tensors[name].parts[label]
    return np.memmap(artifact.file(part.file), part.dtype, "r+", part.offset, part.shape)


def _fit_hashes(artifact: Artifact) -> None:
    path, manifest = artifact.path, artifact.manifest
    if path.is_file():
        seal(path, hash_file(path, start=data_start(read_header(path))).sha256)
        return
    if isinstance(manifest, CoreMLManifest):
        manifest = _fit_blobs(path, manifest)
    write_manifest(path, dataclasses.replace(manifest, files=record_files(path, manifest.files)))


def _fit_blobs(path: Path, manifest: CoreMLManifest) -> CoreMLManifest:
    """In the manifest, and the first digits of each hash in the package's metadata."""
    blobs = {
        f"{name}.{label}": hash_file(path / part.file, start=part.offset, length=part.nbytes).sha256
        for name, stored in manifest.tensors.items()
        for label, part in stored.parts.items()
    }
    model = path / model_file()
    program = model.read_bytes()
    for name, digest in manifest.coreml.blobs.items():
        program = program.replace(digest[:16].encode(), blobs[name][:16].encode())
    model.write_bytes(program)
    return dataclasses.replace(manifest, coreml=dataclasses.replace(manifest.coreml, blobs=blobs))
