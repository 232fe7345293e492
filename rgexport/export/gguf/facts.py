"""What `rgexport inspect` tells of a GGUF file beside its manifest."""

import math
from collections import Counter
from typing import Any

from rgexport.export.gguf import integrity
from rgexport.export.gguf.vocabulary import BYTE, CONTROL, USER_DEFINED
from rgexport.export.manifest import Manifest
from rgexport.quantize.gguf_header import GgufHeader

_KINDS = {"control": CONTROL, "user_defined": USER_DEFINED, "bytes": BYTE}
_IDS = ("bos", "eos", "unknown", "padding", "eot")


def describe(header: GgufHeader, manifest: Manifest) -> dict[str, Any]:
    """As plain JSON; names of fields stay as they are."""
    values = header.values
    weights = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    stored = sum(tensor.nbytes for tensor in header.tensors.values())
    return {
        "bits_per_weight": 8 * stored / weights,
        "gguf": {
            "architecture": values["general.architecture"],
            "version": header.version,
            "type": manifest.precision,
            "tensors": len(header.tensors),
            "size_label": _of(str, values, "general.size_label"),
            "license": _of(str, values, "general.license"),
            "source": _of(str, values, "general.source.url"),
            "importance_matrix": _of(str, values, "quantize.imatrix.file"),
            "data_hash": integrity.has_its_types(header),
            "runs_in": "the llama.cpp of `rgexport llama-cpp build`",
        },
        "tokenizer": _tokenizer(values) if manifest.has_tokenizer else None,
    }


def _tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    types = Counter(values["tokenizer.ggml.token_type"].tolist())
    return {
        "pieces": len(values["tokenizer.ggml.tokens"]),
        **{name: types[kind] for name, kind in _KINDS.items()},
        **{f"{name}_id": _of(int, values, f"tokenizer.ggml.{name}_token_id") for name in _IDS},
        "adds_bos": _of(bool, values, "tokenizer.ggml.add_bos_token"),
        "chat_template": "tokenizer.chat_template" in values,
    }


def _of(kind: type, values: dict[str, Any], key: str) -> Any:
    """A value of the metadata; None where it is missing, or of another type."""
    return value if isinstance(value := values.get(key), kind) else None
