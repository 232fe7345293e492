"""What is written by hand or by other tools as plain JSON: `config.json` and plans."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.readers import json_mutator, small
from fuzz.readers.target import Target, oracle, require
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.huggingface_config import read_config, to_hugging_face
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.plan import choose_scheme, load_plan, make_plan
from rgexport.quantize.schemes.registry import Float, Plan

_FIELDS = {
    **{"vocab_size": "vocab_size", "hidden_size": "width", "num_attention_heads": "num_heads"},
    **{"lru_width": "lru_width", "attention_window_size": "window", "conv1d_width": "conv_width"},
    **{"head_dim": "head_dim", "rms_norm_eps": "rms_eps", "num_hidden_layers": "num_layers"},
}
"""Hugging Face's names → ours, for fields that mean the same."""


def _config_seeds(folder: Path) -> Iterable[bytes]:
    for dialect in ("block_types", "_block_types"):
        fields = to_hugging_face(small.CONFIG, dialect)
        yield json.dumps(fields).encode()
        more = {"rope_scaling": None, "attention_bias": False, "logits_soft_cap": None}
        yield json.dumps(fields | more | {"model_type": "recurrent_gemma"}).encode()
    yield json.dumps({"model_type": "recurrent_gemma", "num_key_value_heads": 1}).encode()


def _read_config(data: bytes, folder: Path) -> GriffinConfig:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_bytes(data)
    return read_config(path)


def _agree_on_config(data: bytes, folder: Path, config: GriffinConfig) -> None:
    """What Hugging Face's own class makes of the file, and what every model needs."""
    from transformers import RecurrentGemmaConfig  # takes seconds, and plans do not need it

    fields = json.loads(data)
    try:
        theirs = RecurrentGemmaConfig.from_dict(fields)
    except Exception:  # it is stricter in some ways, such as whole numbers written as 8.0
        theirs = None
    for name, ours in _FIELDS.items() if theirs else ():
        value = getattr(theirs, name)
        if isinstance(value, int | float) and fields.get(name) is not None:
            require(getattr(config, ours) == value, f"another {name} than transformers has", value)
    sizes = [v for v in config.to_dict().values() if isinstance(v, int | float)]
    require(all(math.isfinite(size) and size >= 0 for size in sizes), "a size that is no size")
    require(config.block_types, "no layers")
    require(config.rope_dims <= config.head_dim, "more rotated dimensions than there are")
    heads = config.lru_width % config.lru_heads == 0 or "recurrent" not in config.block_types
    require(heads, "heads that do not divide the RG-LRU")


def _plan_seeds(folder: Path) -> Iterable[bytes]:
    tensors = [("int4", "int8", None), ("int8", "fp16", 32), ("fp32", "int4", 64)]
    for linear, embedding, block in tensors:
        plan = make_plan(small.CONFIG, choose_scheme(linear, block), choose_scheme(embedding))
        entries = {name: scheme.to_dict() for name, scheme in plan.items()}
        yield json.dumps(entries).encode()
    palettes = {name: Float("float32").to_dict() for name in model_tensors(small.CONFIG)}
    palettes["embed_tokens.weight"] = {"kind": "palette", "bits": 4, "group": 8}
    palettes["layers.0.mlp_block.up_proj.weight"] = {"kind": "ggml", "type": "q4_0"}
    yield json.dumps({"plan": palettes}).encode()
    plan = make_plan(small.CONFIG, choose_scheme("int4"), small.ROW_GROUPS)
    yield json.dumps({name: scheme.to_dict() for name, scheme in plan.items()}).encode()


def _mutate_plan(data: bytes, random: Random) -> bytes:
    """Mostly keeps the names, so that the reader gets to their values."""
    try:
        value = json_mutator.parse(data)
    except ValueError:
        return json_mutator.mutate(data, random)
    if not isinstance(value, json_mutator.Pairs) or random.randrange(4) == 0 or not value:
        return json_mutator.mutate(data, random)
    at = random.randrange(len(value))
    key, entry = value[at]
    value[at] = key, json_mutator.change(entry, random)
    return json_mutator.write(value)


def _read_plan(data: bytes, folder: Path) -> Plan:
    folder.mkdir(exist_ok=True)
    path = folder / "plan.json"
    path.write_bytes(data)
    return load_plan(path, small.CONFIG)


def _agree_on_plan(data: bytes, folder: Path, plan: Plan) -> None:
    entries: Any = oracle(lambda: json.loads(data.decode("utf-8")), "no JSON in UTF-8")
    entries = entries["plan"] if isinstance(entries.get("plan"), dict) else entries
    require(plan.keys() == model_tensors(small.CONFIG).keys(), "other tensors than the model has")
    for name, fields in entries.items():
        again = plan[name].to_dict()
        require(_is_part_of(fields, again), "a scheme of other fields than the file has", name)


def _is_part_of(stated: Any, read: Any) -> bool:
    """Whether all that a file states was read, in the same types; defaults may be left out."""
    if isinstance(stated, dict) and isinstance(read, dict):
        return all(key in read and _is_part_of(value, read[key]) for key, value in stated.items())
    if isinstance(stated, list) and isinstance(read, list):
        return len(stated) == len(read) and all(map(_is_part_of, stated, read))
    return type(stated) is type(read) and stated == read


TARGETS = {
    "config": Target(
        "config", _config_seeds, json_mutator.mutate, _read_config, _agree_on_config, 1 << 14
    ),
    "plan": Target("plan", _plan_seeds, _mutate_plan, _read_plan, _agree_on_plan, 1 << 14),
}
