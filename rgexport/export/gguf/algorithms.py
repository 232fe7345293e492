"""Which algorithms chose the levels of a GGUF file, as its metadata say.

A file that llama-quantize could have made does not say it. Like the data's hash, it holds only
while the tensors have the types that they were written in: another tool that stores them in
others copies it all the same.
"""

import json
from collections.abc import Mapping

from rgexport.errors import RequestError
from rgexport.export.gguf import integrity
from rgexport.files.typed_json import Mismatch, from_json, parse_json
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.gguf_header import GgufHeader
from rgexport.quantize.scheme import Ggml, Plan, scheme_from_dict

KEY = "rgexport.algorithms"
OWN = Ggml("f32").algorithm
"""llama-quantize's own."""


def to_text(schemes: Mapping[str, Ggml]) -> str:
    """Tensor → algorithm as JSON, without llama-quantize's own; empty if there are no others."""
    named = {name: scheme.algorithm for name, scheme in schemes.items()}
    others = {name: word for name, word in named.items() if word != OWN}
    return json.dumps(others) if others else ""


def used(plan: Plan) -> set[str]:
    """What chose the levels of the quantized tensors."""
    schemes = (scheme for scheme in plan.values() if isinstance(scheme, Ggml))
    return {scheme.algorithm for scheme in schemes if TYPES[scheme.type].is_quantized}


def read_schemes(header: GgufHeader) -> dict[str, Ggml]:
    """Tensor → how it is stored, and by which algorithm.

    Raises:
        Mismatch: the metadata's text cannot be read.
    """
    text = header.values.get(KEY)
    words = {} if text is None else from_json(dict[str, str], parse_json(text))
    if not integrity.has_original_types(header):
        words = {}
    return {
        name: _scheme(tensor.type.name, words.get(name, OWN))
        for name, tensor in header.tensors.items()
    }


def _scheme(kind: str, word: str) -> Ggml:
    try:
        scheme = scheme_from_dict({"kind": "ggml", "type": kind, "algorithm": word})
    except RequestError as error:
        raise Mismatch(f"{KEY}: {error}") from None
    assert isinstance(scheme, Ggml)
    return scheme
