"""Merges a LoRA adapter of the PEFT library into a checkpoint, while its weights are read.

A folder with `adapter_config.json` and `adapter_model.safetensors`. To the weight [out, in] of a
linear layer `scale · B · A` is added, with A [r, in] and B [out, r]; to the embedding [V, W]
`scale · Aᵀ · Bᵀ`, with A [r, V] and B [W, r]. The scale is `lora_alpha / r`, or with rsLoRA
`lora_alpha / √r` (peft, `tuners/lora/layer.py`).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.safetensors import FLOATS, Entry, read_header
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.file_rows import entry_columns, entry_rows
from rgexport.griffin.huggingface import HEAD, PREFIX
from rgexport.griffin.json_fields import Fields, read_fields
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.tensor import RowTensor, slab_bounds

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPED = "base_model.model."
_ADDED_BYTES = 8 << 20
"""Upper bound of what is computed at a time."""
_PART = re.compile(
    r"(?P<module>.+)\.(?P<embedding>lora_embedding|lora)_(?P<side>[AB])(\.weight|\.default)*"
)
_WHOLE = re.compile(
    r"base_model\.model\.(model\.)?(?P<module>embed_tokens|lm_head)(\.base_layer)?\.weight"
)
_LITERAL = re.compile(r"[\w.]+")
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq")
"""Ways of initializing an adapter that change the weights below it."""
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layer_replication", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens"),
)
"""Options that make the adapter more than two matrices for a weight."""


@dataclass(frozen=True)
class _Pair:
    """Both matrices for one weight."""

    a: Entry
    b: Entry
    scale: float
    is_embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        (_, inner), (outer, _) = self.a.shape, self.b.shape
        return (inner, outer) if self.is_embedding else (outer, inner)


def with_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with an adapter merged into its weights, which become float32.

    Raises:
        RequestError: no LoRA adapter, one for another model, or one with what is not supported.
    """
    fields, path = _config(folder), folder / WEIGHTS
    entries = read_header(path)
    pairs, saved = _pairs(path, entries, fields), _whole_weights(entries)
    shapes = [(name, tensor.shape) for name, tensor in saved.items()]
    shapes += [(name, pair.shape) for name, pair in pairs.items()]
    for name, shape in shapes:
        _require_fitting(path, checkpoint, name, shape)
    weights = {**checkpoint.weights, **saved}
    weights |= {name: _merged(weights[name], pair) for name, pair in pairs.items()}
    return dataclasses.replace(
        checkpoint,
        name=f"{checkpoint.name}-{folder.resolve().name}",
        weights=weights,
        head=None if EMBEDDING in pairs or EMBEDDING in saved else checkpoint.head,
        weight_files=checkpoint.weight_files | {WEIGHTS: path, CONFIG: folder / CONFIG},
        adapter=folder,
        asked_for=dataclasses.replace(checkpoint.asked_for, adapter=folder.resolve().name),
    )


def _require_fitting(path: Path, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    base = checkpoint.weights.get(name)
    if base is None or base.shape != shape:
        found = "does not have" if base is None else f"has as {list(base.shape)}"
        raise RequestError(
            f"{path} changes {name} of shape {list(shape)}, which {checkpoint.name} {found}; "
            "expected an adapter that was trained on this model"
        )


def _whole_weights(entries: Mapping[str, Entry]) -> dict[str, RowTensor]:
    """The embedding, where PEFT has saved it beside its adapter.

    A head that is saved too is a copy: the model has none of its own.
    """
    for key, entry in entries.items():
        match = _WHOLE.fullmatch(key)
        if match and f"{match['module']}.weight" == EMBEDDING:
            return {EMBEDDING: entry_rows(entry)}
    return {}


def _config(folder: Path) -> Fields:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise RequestError(
                f"{folder} has no {name}; expected a LoRA adapter as the PEFT library saves it"
            )
    fields = read_fields(folder / CONFIG)
    fields.word("peft_type", None, ("LORA",))
    fields.word("bias", "none", ("none",))
    for name in _UNSUPPORTED:
        if fields.values.get(name):
            raise fields.wrong(name, "none: merge the adapter with PEFT, and export the result")
    start = fields.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise fields.wrong(
            "init_lora_weights",
            "an adapter that leaves the base as it is; save it with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
    return fields


def _pairs(path: Path, entries: Mapping[str, Entry], fields: Fields) -> dict[str, _Pair]:
    """Canonical name of a weight → its two matrices."""
    sides: dict[str, dict[str, Entry]] = {}
    embeddings: set[str] = set()
    for key, entry in entries.items():
        if _WHOLE.fullmatch(key) and entry.dtype in FLOATS and len(entry.shape) == 2:
            continue
        match = _PART.fullmatch(key)
        module = match["module"].removeprefix(_WRAPPED).removeprefix(PREFIX) if match else key
        name = f"{module}.weight"
        if not match or len(entry.shape) != 2 or entry.dtype not in FLOATS or name == HEAD:
            reason = "the head is tied to the embedding" if name == HEAD else "it is no LoRA matrix"
            raise RequestError(
                f"{path} has {key}, which cannot be merged ({reason}); merge the adapter with "
                "PEFT, and export the result"
            )
        if match["side"] in sides.setdefault(name, {}):
            raise RequestError(f"{path} has a second {match['side']} for {name}; save it again")
        sides[name][match["side"]] = entry
        if match["embedding"] == "lora_embedding":
            embeddings.add(name)
    if not sides:
        raise RequestError(f"{path} has no matrices; expected a LoRA adapter")
    return {
        name: _pair(path, name, found, fields, name in embeddings) for name, found in sides.items()
    }


def _pair(
    path: Path, name: str, found: Mapping[str, Entry], fields: Fields, is_embedding: bool
) -> _Pair:
    if found.keys() != {"A", "B"} or found["A"].shape[0] != found["B"].shape[1]:
        shapes = ", ".join(f"{side} {list(entry.shape)}" for side, entry in found.items())
        raise RequestError(
            f"{path}: of {name} it has {shapes}; expected A [r, in] and B [out, r]; save the "
            "adapter again"
        )
    rank, module = found["A"].shape[0], name.removesuffix(".weight")
    stated = _by_pattern(fields, "rank_pattern", module, fields.number("r", rank))
    if stated != rank:
        raise RequestError(f"{path}: the rank of {name} is {rank}; {CONFIG} says {stated:g}")
    alpha = fields.number("lora_alpha", 8, zero=True)
    alpha = _by_pattern(fields, "alpha_pattern", module, alpha)
    divisor = math.sqrt(rank) if fields.boolean("use_rslora", False) else rank
    return _Pair(found["A"], found["B"], alpha / divisor, is_embedding)


def _by_pattern(fields: Fields, name: str, module: str, otherwise: float) -> float:
    """The value of the first pattern that a module's name ends with, as peft looks it up."""
    patterns = fields.object(name)
    for pattern in patterns.values:
        literal = pattern.removeprefix("^")
        if not _LITERAL.fullmatch(literal):
            raise RequestError(
                f"{patterns.where}: {pattern!r} is a regular expression; expected the name of a "
                "module; merge the adapter with PEFT, and export the result"
            )
        if f".{PREFIX}{module}".endswith(f".{literal}"):
            return patterns.number(pattern, None, zero=True)
    return otherwise


@lru_cache(maxsize=4)
def _matrix(entry: Entry) -> np.ndarray:
    """A matrix in float32; those of the weights that are being read stay in memory."""
    return entry_rows(entry).whole().astype(np.float32)


def _merged(base: RowTensor, pair: _Pair) -> RowTensor:
    """The weight with what the adapter adds, in float32.

    Of the matrix whose size is the vocabulary's, or the layer's outputs, only the rows are read
    that are asked for.
    """
    by_row = entry_columns(pair.a) if pair.is_embedding else entry_rows(pair.b)

    def read(start: int, stop: int) -> np.ndarray:
        rows = base.read(start, stop).astype(np.float32)
        inner = _matrix(pair.b).T if pair.is_embedding else _matrix(pair.a)
        for first, last in slab_bounds(stop - start, rows.shape[1] * 4, _ADDED_BYTES):
            outer = by_row.read(start + first, start + last).astype(np.float32)
            rows[first:last] += (outer * np.float32(pair.scale)) @ inner
        return rows

    return RowTensor(base.shape, np.dtype(np.float32), read)
