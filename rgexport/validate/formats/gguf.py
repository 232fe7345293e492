"""Limits of GGUF files in llama.cpp, and the metadata that makes its graph and its tokenizer.

Types and offsets of tensors are no part of the structure: the plan is read from the types, and the
reader of the header refuses tensors that do not follow each other.
"""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.gguf.format import GgufArtifact
from rgexport.artifacts.gguf.naming import ARCHITECTURE, architecture, file_tensors
from rgexport.artifacts.gguf.vocabulary import Vocabulary
from rgexport.artifacts.manifest import Manifest
from rgexport.chat.artifact_text import open_template
from rgexport.chat.tokenizer import Tokenizer
from rgexport.griffin.control_tokens import END_OF_TURN, ControlToken, ControlTokens
from rgexport.validate.checks import FLOAT16, FLOAT32, INT8, Tolerance
from rgexport.validate.formats.expected import Expected, Recipe
from rgexport.validate.identity import IdentityItem, compared
from rgexport.validate.structure.elements import Element, shortened
from rgexport.validate.text_items import NO_MEANING, Items, meaning

_WHY_BFLOAT16 = "activations are rounded to 8 bits at every linear"
_BFLOAT16 = Tolerance(logits=0.16, rms=5e-2, states=0.16, reason=_WHY_BFLOAT16)
_TOLERANCES: dict[str, Tolerance] = {"f32": FLOAT32, "f16": FLOAT16, "bf16": _BFLOAT16}
"""Type of a GGUF file's tensor → tolerance, INT8 for all others; the largest of a file counts.

llama.cpp converts activations to what a type is multiplied with: float16 and bfloat16 to
themselves, every quantized type to int8, in blocks of 32 (an error of 0.5 %) or 256 (0.7 %). The
rounding of keys and values to float16 is negligible beside that. bfloat16: √(4 · 38) · 2⁻⁹ / √3 =
1.4 % for the deepest model. Measured on the demo and on small random models of odd shapes, of the
largest logit: float32 2e-5, float16 0.3 %, bfloat16 2.2 %, q8_0 to q2_k 1 % to 6.4 %.
"""

_INPUTS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Type of a tensor → what its inputs are rounded to before the product; int8 for all others."""

HALF_SUMS = 2.0**-10
"""Times √window: the relative error of attention because llama.cpp adds up values in float16.

Each addition is off by 2⁻¹² / √3 of the sum so far, which may be larger than the result: 2.3e-3 and
some for 256 keys, where 4e-3 was measured, and 6.5e-3 for 2048, where it was 2e-2.
"""
_PREFIX = "tokenizer.ggml."
_COLUMNS = tuple(f"{_PREFIX}{name}" for name in ("tokens", "scores", "token_type"))
"""The lists of a vocabulary."""


class GgufExpected(Expected):
    def tolerance(self, manifest: Manifest) -> Tolerance:
        types = {scheme.label for scheme in manifest.plan.values()}
        return max((_TOLERANCES.get(one, INT8) for one in types), key=lambda limit: limit.logits)

    def rounds_inputs_to(self, manifest: Manifest, tensor: str) -> str:
        return _INPUTS.get(manifest.plan[tensor].label, "int8")

    def attends_in_half(self, manifest: Manifest) -> bool:
        """Keys and values are float16 where any weight is not float32."""
        return any(scheme.label != "f32" for scheme in manifest.plan.values())

    def half_sums(self, manifest: Manifest) -> float:
        return float(HALF_SUMS * manifest.config.window**0.5)

    def text_items(self, artifact: Artifact, tokenizer: Tokenizer | None) -> Items:
        assert isinstance(artifact, GgufArtifact)
        vocabulary = _vocabulary(artifact.header.values)
        if tokenizer is None or vocabulary is None:
            return NO_MEANING
        return meaning(tokenizer, vocabulary, vocabulary.control, open_template(artifact).source)

    def written_items(self, artifact: Artifact) -> Iterator[IdentityItem]:
        """Compares the tokenizer's keys, except for the vocabulary's lists."""
        from rgexport.export.gguf.exporter import tokenizer_values

        assert isinstance(artifact, GgufArtifact)
        values = artifact.header.values
        expected = tokenizer_values(_vocabulary(values), values.get("tokenizer.chat_template"))
        ours = {k: _plain(value) for k, value in values.items() if k.startswith("tokenizer.")}
        keys = [key for key in (*expected, *(ours.keys() - expected.keys())) if key not in _COLUMNS]
        wrong = [key for key in keys if ours.get(key) != expected.get(key)]
        for key in wrong[:20]:
            pair = reprlib.repr(ours.get(key)), reprlib.repr(expected.get(key))
            yield IdentityItem(key[:80], *pair, "differs", "its own manifest means")
        if not wrong:
            count = f"{len(keys)} keys"
            yield compared("metadata", count, count, "as its own manifest means")

    def recipe(self, manifest: Manifest) -> Recipe:
        return Recipe(manifest.kind, manifest.config, manifest.plan, {})

    def read(self, artifact: Artifact) -> Iterator[Element]:
        assert isinstance(artifact, GgufArtifact)
        header, prefix = artifact.header, f"{ARCHITECTURE}."
        keys = {key: value for key, value in header.values.items() if key.startswith(prefix)}
        return _elements(keys, {name: tensor.shape for name, tensor in header.tensors.items()})

    def lower(self, recipe: Recipe) -> Iterator[Element]:
        tensors = {tensor.name: tensor.shape for tensor in file_tensors(recipe.config)}
        return _elements(architecture(recipe.config), tensors)


def _vocabulary(values: dict[str, Any]) -> Vocabulary | None:
    tokens, scores, types = (values.get(name) for name in _COLUMNS)
    if tokens is None or types is None:
        return None

    def token(name: str) -> ControlToken | None:
        index = values.get(f"{_PREFIX}{name}_token_id")
        return ControlToken(index, "") if isinstance(index, int) else None

    end_of_turn = token("eot")
    control = ControlTokens(
        bos=token("bos"),
        eos=token("eos"),
        unk=token("unknown"),
        pad=token("padding"),
        special={} if end_of_turn is None else {END_OF_TURN: end_of_turn.id},
    )
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        scores = np.full(len(tokens), np.nan)
    space = values.get(f"{_PREFIX}add_space_prefix") is True
    return Vocabulary(
        tokens=tokens, scores=scores, types=types, control=control, add_space_prefix=space
    )


def _elements(keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[Element]:
    for key, value in sorted(keys.items()):
        plain = _plain(value)
        content = plain if isinstance(plain, float) else shortened(repr(plain))
        yield Element(f"the key {key}", (f"{key}:", content))
    for name, shape in tensors.items():
        yield Element(f"the tensor {name}", (f"{name}:", repr(shape)))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


FORMAT = GgufExpected()
