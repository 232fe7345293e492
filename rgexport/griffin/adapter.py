"""Merges a LoRA adapter of the PEFT library into weights while they are read.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. It adds
`scale · B · A` to the weight [out, in] of a linear layer, with A [r, in] and B [out, r], and
`scale · Aᵀ · Bᵀ` to the embedding [V, W], with A [r, V] and B [W, r]. The scale is
`lora_alpha / r`, or with rsLoRA `lora_alpha / √r` (peft, `tuners/lora/layer.py`).
"""

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.safetensors import FLOATS, Entry, read_header
from rgexport.files.typed_json import Mismatch, NotNegative, Positive, from_json, read_json
from rgexport.griffin.huggingface import HEAD, PREFIX
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.tensor import RowTensor, WeightSource, entry_columns, entry_rows, slab_bounds

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPED = "base_model.model."
_BY_PEFT = "merge the adapter with PEFT, and export the result"
_PRODUCT_BYTES = 8 << 20  # upper bound of the rows of a product that are computed at a time
_LORA_MATRIX = re.compile(
    r"(?P<module>.+)\.(?P<embedding>lora_embedding|lora)_(?P<side>[AB])(\.weight|\.default)*"
)
_SAVED_WEIGHT = re.compile(
    r"base_model\.model\.(model\.)?(?P<module>embed_tokens|lm_head)(\.base_layer)?\.weight"
)
_LITERAL = re.compile(r"[\w.]+")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
"""Prefixes of `init_lora_weights` that change the base model's weights."""
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layer_replication", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens"),
)
"""With these options, an adapter is more than two matrices for each weight."""


@dataclass(frozen=True)
class _LoraConfig:
    """Fields of `adapter_config.json`, with PEFT's defaults."""

    lenient: ClassVar = True

    peft_type: Literal["LORA"]
    bias: Literal["none"] = "none"
    r: Positive | None = None
    lora_alpha: NotNegative = 8
    use_rslora: bool = False
    rank_pattern: dict[str, NotNegative] | None = None
    alpha_pattern: dict[str, NotNegative] | None = None


@dataclass(frozen=True)
class _LoraPair:
    a: Entry
    b: Entry
    scale: float
    is_embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        (_, inner), (outer, _) = self.a.shape, self.b.shape
        return (inner, outer) if self.is_embedding else (outer, inner)


def merge_adapter(
    folder: Path, model: str, weights: WeightSource
) -> tuple[dict[str, RowTensor], dict[str, Path]]:
    """Returns the weights that an adapter changes, merged in float32, and the adapter's files.

    Raises RequestError for no LoRA adapter, one for another `model`, or unsupported options.
    """
    config, path = _read_config(folder), folder / WEIGHTS
    entries = read_header(path)
    pairs = _pairs(path, entries, config)
    # PEFT may save the embedding beside its adapter. A head saved too is a copy of it.
    matches = ((_SAVED_WEIGHT.fullmatch(key), entry) for key, entry in entries.items())
    embeddings = (e for match, e in matches if match and f"{match['module']}.weight" == EMBEDDING)
    embedding = next(embeddings, None)
    saved = {} if embedding is None else {EMBEDDING: entry_rows(embedding)}
    shapes = [(name, tensor.shape) for name, tensor in saved.items()]
    for name, shape in (*shapes, *((name, pair.shape) for name, pair in pairs.items())):
        base = weights.get(name)
        if base is None or base.shape != shape:
            problem = "does not have" if base is None else f"has as {list(base.shape)}"
            raise RequestError(
                f"{path} changes {name} of shape {list(shape)}, which {model} {problem}; "
                "expected an adapter that was trained on this model"
            )
    merged = {n: _merged(saved.get(n, weights[n]), pair) for n, pair in pairs.items()}
    return saved | merged, {WEIGHTS: path, CONFIG: folder / CONFIG}


def _read_config(folder: Path) -> _LoraConfig:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise RequestError(
                f"{folder} has no {name}; expected a LoRA adapter as the PEFT library saves it"
            )
    path = folder / CONFIG
    values = read_json(path)
    for name in _UNSUPPORTED:
        if values.get(name):
            stated = reprlib.repr(values[name])
            raise RequestError(f"{path}: {name} is {stated}; expected none: {_BY_PEFT}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING_INITS):
        raise RequestError(
            f"{path}: init_lora_weights is {start!r}; expected an adapter that leaves the base as "
            "it is; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    try:
        config = from_json(_LoraConfig, values)
    except Mismatch as error:
        raise RequestError(f"{path}: {error}") from None
    for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
        if not _LITERAL.fullmatch(pattern.removeprefix("^")):
            raise RequestError(
                f"{path}: {pattern!r} is a regular expression; expected the name of a module; "
                f"{_BY_PEFT}"
            )
    return config


def _pairs(path: Path, entries: Mapping[str, Entry], config: _LoraConfig) -> dict[str, _LoraPair]:
    sides: dict[str, dict[str, Entry]] = {}
    embeddings: set[str] = set()
    for key, entry in entries.items():
        if _SAVED_WEIGHT.fullmatch(key) and entry.dtype in FLOATS and len(entry.shape) == 2:
            continue
        match = _LORA_MATRIX.fullmatch(key)
        module = match["module"].removeprefix(_WRAPPED).removeprefix(PREFIX) if match else key
        name = f"{module}.weight"
        if not match or len(entry.shape) != 2 or entry.dtype not in FLOATS or name == HEAD:
            reason = "the head is tied to the embedding" if name == HEAD else "it is no LoRA matrix"
            raise RequestError(f"{path} has {key}, which cannot be merged ({reason}); {_BY_PEFT}")
        if match["side"] in sides.setdefault(name, {}):
            raise RequestError(f"{path} has a second {match['side']} for {name}; save it again")
        sides[name][match["side"]] = entry
        if match["embedding"] == "lora_embedding":
            embeddings.add(name)
    if not sides:
        raise RequestError(f"{path} has no matrices; expected a LoRA adapter")
    return {name: _pair(path, name, ab, config, name in embeddings) for name, ab in sides.items()}


def _pair(
    path: Path, name: str, sides: Mapping[str, Entry], config: _LoraConfig, is_embedding: bool
) -> _LoraPair:
    if sides.keys() != {"A", "B"} or sides["A"].shape[0] != sides["B"].shape[1]:
        shapes = ", ".join(f"{side} {list(entry.shape)}" for side, entry in sides.items())
        raise RequestError(
            f"{path}: of {name} it has {shapes}; expected A [r, in] and B [out, r]; save it again"
        )
    rank, module = sides["A"].shape[0], name.removesuffix(".weight")
    stated = _by_pattern(config.rank_pattern, module, config.r or rank)
    if stated != rank:
        raise RequestError(f"{path}: the rank of {name} is {rank}; {CONFIG} says {stated:g}")
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    divisor = math.sqrt(rank) if config.use_rslora else rank
    return _LoraPair(sides["A"], sides["B"], alpha / divisor, is_embedding)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Returns the value of the first pattern that a module's name ends with, as peft does."""
    for pattern, value in (patterns or {}).items():
        if f".{PREFIX}{module}".endswith(f".{pattern.removeprefix('^')}"):
            return value
    return default


@lru_cache(maxsize=4)
def _matrix(entry: Entry) -> np.ndarray:
    return entry_rows(entry).whole().astype(np.float32)


def _merged(base: RowTensor, pair: _LoraPair) -> RowTensor:
    by_row = entry_columns(pair.a) if pair.is_embedding else entry_rows(pair.b)

    def read(start: int, stop: int) -> np.ndarray:
        rows = base.read(start, stop).astype(np.float32)
        inner = _matrix(pair.b).T if pair.is_embedding else _matrix(pair.a)
        for first, last in slab_bounds(stop - start, rows.shape[1] * 4, _PRODUCT_BYTES):
            outer = by_row.read(start + first, start + last).astype(np.float32)
            rows[first:last] += (outer * np.float32(pair.scale)) @ inner
        return rows

    return RowTensor(base.shape, np.dtype(np.float32), read)
