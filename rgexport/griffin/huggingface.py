"""Reads and writes model folders in Hugging Face's layout: `config.json` and the weights."""

import itertools
import json
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from rgexport.errors import RequestError
from rgexport.files import typed_json
from rgexport.files.safetensors import FLOATS, header, read_header
from rgexport.griffin.config import BlockType, GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.tensor import FoundTensor, RowTensor, WeightSource, entry_rows
from rgexport.progress import task

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
_PLAIN_NAME = re.compile(r"[^./\\][^/\\]*")
PREFIX = "model."
SHARD_BYTES = 3_000_000_000
SLAB_BYTES = 8 << 20


def find_shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Returns the weight files of a folder, and its index's map from tensor to file."""
    if (folder / SINGLE).exists():
        return (folder / SINGLE,), None
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".safetensors"})
        hint = f", only {', '.join(others[:3])}" if others else ""
        hint = " to read: it is an artifact" if (folder / "rgexport.json").is_file() else hint
        raise RequestError(
            f"{folder} has no weights{hint}; expected {SINGLE}, {INDEX} or a DeepMind .pt"
        )
    index = folder / INDEX
    weight_map = typed_json.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        # A path could lead to any file of the user.
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise RequestError(
                f"{index} maps tensor {name} to {file!r}; expected a file name in the folder"
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise RequestError(
            f"{folder} has no {', '.join(missing)}, which {INDEX} names; copy or download it again"
        )
    return tuple(folder / file for file in files), weight_map


def read_tensors(folder: Path) -> tuple[dict[str, FoundTensor], tuple[str, ...], tuple[Path, ...]]:
    """Returns the tensors of a folder by canonical names, index problems, and weight files."""
    files, weight_map = find_shards(folder)
    tensors: dict[str, FoundTensor] = {}
    problems: list[str] = []
    for path in files:
        gaps: list[str] = []
        for name, entry in read_header(path, gaps).items():
            canonical = name.removeprefix(PREFIX)
            if weight_map is not None and weight_map.get(name) != path.name:
                problems.append(
                    f"unexpected: {name} in {path.name}, where {INDEX} does not place it"
                )
            elif canonical in tensors:
                problems.append(f"unexpected: {name}, a second {canonical}")
            else:
                tensors[canonical] = entry_rows(entry) if entry.dtype in FLOATS else entry.dtype
        problems += [f"unexpected: {gap}" for gap in gaps]
    if weight_map is not None:
        stray = sorted(set(folder.glob("model-*-of-*.safetensors")) - set(files))
        problems += [f"unexpected: {path.name}, which {INDEX} does not name" for path in stray]
    return tensors, tuple(problems), files


def write_weights(folder: Path, weights: WeightSource, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes one file, or shards of at most `shard_bytes` (but a tensor at least) and an index."""
    shards = list(_split(weights, shard_bytes))
    total, count = sum(tensor.nbytes for tensor in weights.values()), len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [SINGLE]
    with task("Writing the weights", total) as advance:
        for name, shard in zip(files, shards, strict=True):
            arrays = {PREFIX + n: (tensor.dtype, tensor.shape) for n, tensor in shard.items()}
            with (folder / name).open("wb") as file:
                file.write(header(arrays, {"format": "pt"}))
                for tensor in shard.values():
                    for _, rows in tensor.slabs(SLAB_BYTES):
                        file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
                        advance(rows.nbytes)
    if count > 1:
        pairs = zip(files, shards, strict=True)
        weight_map = {PREFIX + name: file for file, shard in pairs for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _split(weights: WeightSource, limit: int) -> Iterator[WeightSource]:
    shard: dict[str, RowTensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


MAX_LAYERS = 512
"""Bounds the names of tensors that a wrong config can fill the memory with."""

DEFAULT_PATTERN: tuple[BlockType, ...] = ("recurrent", "recurrent", "attention")
_ARCHITECTURES = ("RecurrentGemmaForCausalLM", "RecurrentGemmaModel")
_ROPE_DEFAULTS = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}

Dialect = Literal["_block_types", "block_types"]
"""The field that holds the block pattern: 2B's config.json has the first, 9B's the second."""


@dataclass(frozen=True)
class _Rope:
    lenient: ClassVar = True

    rope_theta: typed_json.Positive | None = None
    partial_rotary_factor: Annotated[float, typed_json.Between(typed_json.MIN_NUMBER, 1)] | None = (
        None
    )


@dataclass(frozen=True)
class _NestedRope(_Rope):
    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"


@dataclass(frozen=True)
class _Fields(_Rope):
    """The fields of `config.json`, with the defaults of transformers' RecurrentGemmaConfig."""

    architectures: tuple[Any, ...] = ()
    model_type: Literal["recurrent_gemma"] | None = None
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: Literal[False] = False
    quantization_config: Any = None
    num_hidden_layers: Annotated[int, typed_json.Between(1, MAX_LAYERS)] = 26
    block_types: tuple[BlockType, ...] | None = None
    _block_types: tuple[BlockType, ...] | None = None
    vocab_size: typed_json.Size = 256_000
    hidden_size: typed_json.Size = 2560
    intermediate_size: typed_json.Size = 3 * 2560
    lru_width: typed_json.Size | None = None
    conv1d_width: Annotated[int, typed_json.Between(2, typed_json.MAX_INTEGER)] = 4
    num_attention_heads: typed_json.Size = 10
    num_key_value_heads: typed_json.Size | None = None
    head_dim: typed_json.Size | None = None
    attention_window_size: typed_json.Size | None = None
    rope_parameters: _NestedRope = _NestedRope()
    rope_scaling: _NestedRope = _NestedRope()
    rms_norm_eps: typed_json.Positive = 1e-6
    logits_soft_cap: typed_json.NotNegative | None = 30.0
    embeddings_scale_by_sqrt_dim: bool = True


def read_config(
    path: Path, window: int | None = None, soft_cap: float | None = None
) -> GriffinConfig:
    """Reads a `config.json`, in any dialect that the hub or transformers writes.

    Raises RequestError where a field is wrong, contradicts another one, `window` or `soft_cap`, or
    asks for something that no RecurrentGemma has.
    """
    values = typed_json.read_json(path)
    try:
        fields = typed_json.from_json(_Fields, values)
        if problems := list(_problems(fields)):
            raise typed_json.Mismatch(typed_json.ALSO.join(problems))
    except typed_json.Mismatch as error:
        raise RequestError(f"{path}: {error}") from None
    stated = fields.attention_window_size
    if window is not None and stated is not None and window > stated:
        raise RequestError(
            f"{path} states attention_window_size {stated}, --window says {window}; "
            "expected at most as many: the model was not trained to look further back"
        )
    width, heads = fields.hidden_size, fields.num_attention_heads
    head_dim, rope_dims = _attention(fields)
    return GriffinConfig(
        vocab_size=fields.vocab_size,
        width=width,
        mlp_width=fields.intermediate_size // 2,
        lru_width=fields.lru_width or width,
        lru_heads=heads,
        num_heads=heads,
        head_dim=head_dim,
        block_types=_block_types(fields),
        window=window or stated or 2048,
        conv_width=fields.conv1d_width,
        rope_dims=rope_dims,
        rope_theta=_rope(fields, "rope_theta"),
        rms_eps=fields.rms_norm_eps,
        soft_cap=_soft_cap(path, fields, "logits_soft_cap" in values, soft_cap),
        embedding_scale=(
            sqrt_embedding_scale(width) if fields.embeddings_scale_by_sqrt_dim else 1.0
        ),
    )


def _problems(fields: _Fields) -> Iterator[str]:
    """Yields what contradicts other fields, or what no RecurrentGemma has."""
    known = any(name in _ARCHITECTURES for name in fields.architectures)
    if fields.architectures and not known:
        yield (
            f"architectures is {reprlib.repr(list(fields.architectures))}; expected "
            "['RecurrentGemmaForCausalLM']"
        )
    elif not known and fields.model_type is None:
        yield "model_type is None; expected 'recurrent_gemma'"
    if fields.quantization_config is not None:
        yield "the weights are quantized (quantization_config); expected the original checkpoint"
    # A missing value means as many as there are heads.
    width, heads = fields.hidden_size, fields.num_attention_heads
    if (fields.num_key_value_heads or heads) != 1:
        yield f"num_key_value_heads is {fields.num_key_value_heads or heads}; expected 1"
    if fields.intermediate_size % 2:
        yield (
            f"intermediate_size is {fields.intermediate_size}; expected an even number, twice "
            "the width of a branch"
        )
    if fields.block_types and fields._block_types and fields.block_types != fields._block_types:
        yield "block_types and _block_types differ"
    if () in (fields.block_types, fields._block_types):
        yield "block_types is empty; expected at least one type"
    for name in _ROPE_DEFAULTS:
        if len(stated := _stated(fields, name)) > 1:
            yield f"{name} is {' and '.join(map(str, sorted(stated)))}; expected one value"
    types, lru_width = _block_types(fields), fields.lru_width or width
    if "recurrent" in types and lru_width % heads:
        yield f"num_attention_heads is {heads}; expected a divisor of lru_width {lru_width}"
    if "attention" not in types:
        return
    if fields.head_dim is None and width % heads:
        yield f"num_attention_heads is {heads}; expected a divisor of hidden_size {width}"
    head_dim, rope_dims = _attention(fields)
    if rope_dims < 2 or rope_dims % 2:
        rotary = _rope(fields, "partial_rotary_factor")
        yield (
            f"RoPE would rotate {rope_dims} of {head_dim} dimensions (partial_rotary_factor "
            f"{rotary:g}); expected an even number of at least 2"
        )


def _attention(fields: _Fields) -> tuple[int, int]:
    """Returns the size of a head, and how many of its dimensions RoPE rotates."""
    head_dim = fields.head_dim or max(1, fields.hidden_size // fields.num_attention_heads)
    rotary = _rope(fields, "partial_rotary_factor")
    return head_dim, max(1, int(rotary * head_dim + 1e-6))  # 3/7 of 14 is 6


def _rope(fields: _Fields, name: str) -> float:
    return float(next(iter(_stated(fields, name)), _ROPE_DEFAULTS[name]))


def _stated(fields: _Fields, name: str) -> set[float]:
    sources = fields, fields.rope_parameters, fields.rope_scaling
    return {getattr(rope, name) for rope in sources} - {None}


def _block_types(fields: _Fields) -> tuple[BlockType, ...]:
    pattern = fields.block_types or fields._block_types or DEFAULT_PATTERN
    return tuple(itertools.islice(itertools.cycle(pattern), fields.num_hidden_layers))


def _soft_cap(path: Path, fields: _Fields, is_stated: bool, requested: float | None) -> float:
    stated = fields.logits_soft_cap
    if requested is not None and is_stated and stated not in (None, requested):
        raise RequestError(
            f"{path} states logits_soft_cap {stated!r}, --soft-cap says {requested:g}; the option "
            "is for DeepMind .pt files, which state none: leave it out"
        )
    if requested is not None and not is_stated:
        return requested
    return stated or 0.0


def to_hugging_face(config: GriffinConfig, dialect: Dialect) -> dict[str, Any]:
    """Returns the fields of `config.json`.

    It has one number of heads, and an embedding scale of 1 or sqrt(width).
    """
    scaled = config.embedding_scale == sqrt_embedding_scale(config.width)
    assert config.lru_heads == config.num_heads and (scaled or config.embedding_scale == 1.0)
    types = config.block_types
    periods = range(1, len(types) + 1)
    period = next((n for n in periods if all(types[i % n] == t for i, t in enumerate(types))), 0)
    return {
        dialect: list(types[:period]),
        "architectures": ["RecurrentGemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_window_size": config.window,
        "bos_token_id": 2,
        "conv1d_width": config.conv_width,
        "embeddings_scale_by_sqrt_dim": scaled,
        "eos_token_id": 1,
        "head_dim": config.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.width,
        "intermediate_size": 2 * config.mlp_width,
        "logits_soft_cap": config.soft_cap,
        "lru_width": config.lru_width,
        "model_type": "recurrent_gemma",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "partial_rotary_factor": config.rope_dims / config.head_dim,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
