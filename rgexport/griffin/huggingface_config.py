"""Reads and writes the `config.json` of Hugging Face's layout."""

import itertools
from pathlib import Path
from typing import Any, Literal

from rgexport.errors import RequestError
from rgexport.griffin.config import BlockType, GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.json_fields import Fields, read_json

MAX_LAYERS = 512
"""Far more than any model has: a wrong config must not fill the memory with names of tensors."""

BLOCK_TYPES: tuple[BlockType, ...] = ("recurrent", "attention")
DEFAULT_PATTERN: tuple[BlockType, ...] = ("recurrent", "recurrent", "attention")
_ARCHITECTURES = ("RecurrentGemmaForCausalLM", "RecurrentGemmaModel")

Dialect = Literal["_block_types", "block_types"]
"""The field that holds the block pattern: 2B's config.json has the first, 9B's the second."""


def read_config(
    path: Path, window: int | None = None, soft_cap: float | None = None
) -> GriffinConfig:
    """Reads a `config.json`, in any dialect that the hub or transformers writes.

    Defaults are those of transformers' RecurrentGemmaConfig. `soft_cap` is used where the file does
    not state it. `window` may be smaller than what the file states.

    Raises:
        RequestError: a field is wrong, contradicts another, or asks for something that no
            RecurrentGemma has; or the file states a smaller window or another `soft_cap`.
    """
    fields = read_json(path)
    _check_kind(fields)
    width = fields.integer("hidden_size", 2560)
    heads = fields.integer("num_attention_heads", 10)
    lru_width = fields.integer("lru_width", width)
    types = _block_types(fields)
    if "recurrent" in types and lru_width % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of the RG-LRU's width {lru_width}")
    branches = fields.integer("intermediate_size", 3 * 2560, minimum=2)
    if branches % 2:
        raise fields.wrong("intermediate_size", "an even number, twice the width of a branch")
    head_dim, rope_dims, theta = _attention(fields, width, heads, "attention" in types)
    scaled = fields.boolean("embeddings_scale_by_sqrt_dim", True)
    _check_soft_cap(fields, soft_cap)
    return GriffinConfig(
        vocab_size=fields.integer("vocab_size", 256_000),
        width=width,
        mlp_width=branches // 2,
        lru_width=lru_width,
        lru_heads=heads,
        num_heads=heads,
        head_dim=head_dim,
        block_types=types,
        window=_window(fields, window),
        conv_width=fields.integer("conv1d_width", 4, minimum=2),
        rope_dims=rope_dims,
        rope_theta=theta,
        rms_eps=fields.number("rms_norm_eps", 1e-6),
        soft_cap=_soft_cap(fields, soft_cap),
        embedding_scale=sqrt_embedding_scale(width) if scaled else 1.0,
    )


def _attention(fields: Fields, width: int, heads: int, used: bool) -> tuple[int, int, float]:
    """Returns head dimension, rotated dimensions and base of RoPE; checked only if used."""
    theta, rotary = _rope(fields)
    head_dim = fields.integer("head_dim", max(1, width // heads))
    rope_dims = max(1, int(rotary * head_dim + 1e-6))  # 3/7 of 14 is 6
    if used and "head_dim" not in fields and width % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size {width}")
    if used and (rope_dims < 2 or rope_dims % 2):
        raise RequestError(
            f"{fields.where}: RoPE would rotate {rope_dims} of {head_dim} dimensions "
            f"(partial_rotary_factor {rotary:g}); expected an even number of at least 2"
        )
    return head_dim, rope_dims, theta


def _check_kind(fields: Fields) -> None:
    """Refuses other models, and variants that RecurrentGemma's own code cannot run either."""
    architectures = fields.values.get("architectures") or []
    known = isinstance(architectures, list) and any(a in _ARCHITECTURES for a in architectures)
    if architectures and not known:
        raise fields.wrong("architectures", "['RecurrentGemmaForCausalLM']")
    if not known or "model_type" in fields:
        fields.choice("model_type", None, ("recurrent_gemma",))
    fields.choice("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    if fields.boolean("attention_bias", False):
        raise fields.wrong("attention_bias", "false")
    if "quantization_config" in fields:
        raise RequestError(
            f"{fields.where}: the weights are quantized already (quantization_config); "
            "expected the original checkpoint"
        )
    # A missing value means as many as there are heads.
    if fields.integer("num_key_value_heads", fields.integer("num_attention_heads", 10)) != 1:
        raise fields.wrong("num_key_value_heads", "1")


def _block_types(fields: Fields) -> tuple[BlockType, ...]:
    """Returns the type of each layer: the pattern, repeated over the layers."""
    layers = fields.integer("num_hidden_layers", 26, maximum=MAX_LAYERS)
    stated = [name for name in ("block_types", "_block_types") if name in fields]
    patterns = {fields.choices(name, BLOCK_TYPES) for name in stated}
    if len(patterns) > 1:
        raise RequestError(f"{fields.where}: block_types and _block_types differ")
    pattern = next(iter(patterns), DEFAULT_PATTERN)
    return tuple(itertools.islice(itertools.cycle(pattern), layers))


def _rope(fields: Fields) -> tuple[float, float]:
    values: dict[str, float] = {}
    nested = [fields.object(name) for name in ("rope_parameters", "rope_scaling")]
    for rope in nested:
        for name in ("rope_type", "type"):
            rope.choice(name, "default", ("default",))
    for rope in (fields, *nested):
        for name in ("rope_theta", "partial_rotary_factor"):
            if name not in rope:
                continue
            value = rope.number(name, None)
            if values.setdefault(name, value) != value:
                raise rope.wrong(name, f"{values[name]:g}, as stated elsewhere in the file")
    theta, rotary = values.get("rope_theta", 10_000.0), values.get("partial_rotary_factor", 0.5)
    if rotary > 1:
        raise RequestError(
            f"{fields.where}: partial_rotary_factor is {rotary:g}; expected at most 1"
        )
    return theta, rotary


def _soft_cap(fields: Fields, requested: float | None) -> float:
    """Returns the cap of the logits; null in the file means none."""
    if "logits_soft_cap" in fields.values and fields.values["logits_soft_cap"] is None:
        return 0.0
    return fields.number("logits_soft_cap", 30.0 if requested is None else requested, zero=True)


def _window(fields: Fields, requested: int | None) -> int:
    stated = fields.integer("attention_window_size", requested or 2048)
    if requested is not None and requested > stated:
        raise RequestError(
            f"{fields.where} states attention_window_size {stated}, --window says {requested}; "
            "expected at most as many: the model was not trained to look further back"
        )
    return stated if requested is None else requested


def _check_soft_cap(fields: Fields, requested: float | None) -> None:
    name = "logits_soft_cap"
    stated = fields.values.get(name)
    if requested is not None and name in fields and stated != requested:
        raise RequestError(
            f"{fields.where} states {name} {stated!r}, --soft-cap says {requested:g}; the option "
            "is for DeepMind .pt files, which state none: leave it out"
        )


def to_hugging_face(config: GriffinConfig, dialect: Dialect) -> dict[str, Any]:
    """Returns the fields of `config.json`.

    Raises:
        RequestError: the format cannot say it: another number of RG-LRU blocks than of heads,
            or an embedding scale other than 1 and sqrt(width).
    """
    if config.lru_heads != config.num_heads:
        raise RequestError(
            f"config.json has one number of heads; found {config.num_heads} for attention and "
            f"{config.lru_heads} for the RG-LRU"
        )
    scaled = config.embedding_scale == sqrt_embedding_scale(config.width)
    if not scaled and config.embedding_scale != 1.0:
        raise RequestError(f"config.json cannot state the embedding scale {config.embedding_scale}")
    return {
        dialect: list(block_pattern(config.block_types)),
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


def block_pattern(types: tuple[BlockType, ...]) -> tuple[BlockType, ...]:
    """Returns the shortest pattern that gives `types` when it is repeated."""
    for period in range(1, len(types)):
        if all(kind == types[i % period] for i, kind in enumerate(types)):
            return types[:period]
    return types
