"""Reads and writes the `config.json` of a model folder in Hugging Face's layout."""

import itertools
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from rgexport.errors import RequestError
from rgexport.files import typed_json
from rgexport.griffin.config import BlockType, GriffinConfig, sqrt_embedding_scale

MAX_LAYERS = 512
"""Bounds the names of tensors that a wrong config can fill the memory with."""

DEFAULT_PATTERN: tuple[BlockType, ...] = ("recurrent", "recurrent", "attention")
_ARCHITECTURES = ("RecurrentGemmaForCausalLM", "RecurrentGemmaModel")
_ROPE_DEFAULTS = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}

Dialect = Literal["_block_types", "block_types"]
"""The field that holds the block pattern: 2B's config.json has the first, 9B's the second."""

_Share = Annotated[float, typed_json.Between(typed_json.MIN_NUMBER, 1)]


@dataclass(frozen=True)
class _Rope:
    """The parameters of RoPE, which a config may state in any of three places."""

    lenient: ClassVar = True

    rope_theta: typed_json.Positive | None = None
    partial_rotary_factor: _Share | None = None


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

    Raises:
        RequestError: a field is wrong, contradicts another one, `window` or `soft_cap`, or asks for
            something that no RecurrentGemma has.
    """
    values = typed_json.read_json(path)
    fields = _read_fields(path, values)
    width = fields.hidden_size
    heads = fields.num_attention_heads
    window = _window(path, fields, window)

    embedding_scale = 1.0
    if fields.embeddings_scale_by_sqrt_dim:
        embedding_scale = sqrt_embedding_scale(width)

    return GriffinConfig(
        vocab_size=fields.vocab_size,
        width=width,
        mlp_width=fields.intermediate_size // 2,
        lru_width=fields.lru_width or width,
        lru_heads=heads,
        num_heads=heads,
        head_dim=_head_dim(fields),
        block_types=_block_types(fields),
        window=window,
        conv_width=fields.conv1d_width,
        rope_dims=_rope_dims(fields),
        rope_theta=_rope_parameter(fields, "rope_theta"),
        rms_eps=fields.rms_norm_eps,
        soft_cap=_soft_cap(path, fields, "logits_soft_cap" in values, soft_cap),
        embedding_scale=embedding_scale,
    )


def _read_fields(path: Path, values: dict[str, Any]) -> _Fields:
    try:
        fields = typed_json.from_json(_Fields, values)
        problems = list(_problems(fields))
        if problems:
            raise typed_json.Mismatch(typed_json.ALSO.join(problems))
    except typed_json.Mismatch as error:
        raise RequestError(f"{path}: {error}") from None
    return fields


def _problems(fields: _Fields) -> Iterator[str]:
    """Yields fields that contradict other fields, or that no RecurrentGemma has."""
    yield from _wrong_model(fields)
    yield from _wrong_widths(fields)
    yield from _wrong_block_types(fields)
    for name in _ROPE_DEFAULTS:
        stated = _stated_rope_parameters(fields, name)
        if len(stated) > 1:
            yield f"{name} is {' and '.join(map(str, sorted(stated)))}; expected one value"
    yield from _wrong_heads(fields)


def _wrong_model(fields: _Fields) -> Iterator[str]:
    is_known = any(name in _ARCHITECTURES for name in fields.architectures)
    if fields.architectures and not is_known:
        yield (
            f"architectures is {reprlib.repr(list(fields.architectures))}; expected "
            "['RecurrentGemmaForCausalLM']"
        )
    elif not is_known and fields.model_type is None:
        yield "model_type is None; expected 'recurrent_gemma'"

    if fields.quantization_config is not None:
        yield "the weights are quantized (quantization_config); expected the original checkpoint"


def _wrong_widths(fields: _Fields) -> Iterator[str]:
    # A missing value means as many as there are heads.
    key_value_heads = fields.num_key_value_heads or fields.num_attention_heads
    if key_value_heads != 1:
        yield f"num_key_value_heads is {key_value_heads}; expected 1"

    if fields.intermediate_size % 2:
        yield (
            f"intermediate_size is {fields.intermediate_size}; expected an even number, twice "
            "the width of a branch"
        )


def _wrong_block_types(fields: _Fields) -> Iterator[str]:
    if fields.block_types and fields._block_types and fields.block_types != fields._block_types:
        yield "block_types and _block_types differ"
    if () in (fields.block_types, fields._block_types):
        yield "block_types is empty; expected at least one type"


def _wrong_heads(fields: _Fields) -> Iterator[str]:
    types = _block_types(fields)
    width = fields.hidden_size
    heads = fields.num_attention_heads
    lru_width = fields.lru_width or width

    if "recurrent" in types and lru_width % heads:
        yield f"num_attention_heads is {heads}; expected a divisor of lru_width {lru_width}"
    if "attention" not in types:
        return

    if fields.head_dim is None and width % heads:
        yield f"num_attention_heads is {heads}; expected a divisor of hidden_size {width}"
    rope_dims = _rope_dims(fields)
    if rope_dims < 2 or rope_dims % 2:
        rotary = _rope_parameter(fields, "partial_rotary_factor")
        yield (
            f"RoPE would rotate {rope_dims} of {_head_dim(fields)} dimensions "
            f"(partial_rotary_factor {rotary:g}); expected an even number of at least 2"
        )


def _head_dim(fields: _Fields) -> int:
    return fields.head_dim or max(1, fields.hidden_size // fields.num_attention_heads)


def _rope_dims(fields: _Fields) -> int:
    """Returns the number of dimensions of a head that RoPE rotates."""
    rotary = _rope_parameter(fields, "partial_rotary_factor")
    # The small addend makes up for rounding: 3/7 of 14 is 6.
    return max(1, int(rotary * _head_dim(fields) + 1e-6))


def _rope_parameter(fields: _Fields, name: str) -> float:
    for value in _stated_rope_parameters(fields, name):
        return float(value)
    return _ROPE_DEFAULTS[name]


def _stated_rope_parameters(fields: _Fields, name: str) -> set[float]:
    """Returns the values that the config states for a parameter of RoPE; one at most is right."""
    places: tuple[_Rope, ...] = (fields, fields.rope_parameters, fields.rope_scaling)
    return {getattr(rope, name) for rope in places} - {None}


def _block_types(fields: _Fields) -> tuple[BlockType, ...]:
    pattern = fields.block_types or fields._block_types or DEFAULT_PATTERN
    return tuple(itertools.islice(itertools.cycle(pattern), fields.num_hidden_layers))


def _window(path: Path, fields: _Fields, requested: int | None) -> int:
    stated = fields.attention_window_size
    if requested is not None and stated is not None and requested > stated:
        raise RequestError(
            f"{path} states attention_window_size {stated}, --window says {requested}; "
            "expected at most as many: the model was not trained to look further back"
        )
    return requested or stated or 2048


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
    is_scaled = config.embedding_scale == sqrt_embedding_scale(config.width)
    assert config.lru_heads == config.num_heads
    assert is_scaled or config.embedding_scale == 1.0

    return {
        dialect: list(_shortest_pattern(config.block_types)),
        "architectures": ["RecurrentGemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_window_size": config.window,
        "bos_token_id": 2,
        "conv1d_width": config.conv_width,
        "embeddings_scale_by_sqrt_dim": is_scaled,
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


def _shortest_pattern(types: tuple[BlockType, ...]) -> tuple[BlockType, ...]:
    """Returns the shortest pattern that gives these types when it is repeated."""
    for period in range(1, len(types)):
        if all(types[i % period] == kind for i, kind in enumerate(types)):
            return types[:period]
    return types
