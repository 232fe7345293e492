"""The vocabulary and the chat template in a GGUF file's metadata, as llama.cpp reads them."""

import ctypes
import re
from collections.abc import Callable
from typing import Any

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.gguf.format import GgufArtifact
from rgexport.chat.artifact_text import ArtifactText
from rgexport.chat.prompts import ChatTemplate
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.griffin.control_tokens import GEMMA_TEMPLATE
from rgexport.griffin.tokenizer_files import NORMAL, UNKNOWN, USER_DEFINED
from rgexport.runtimes.llama_cpp.library import Handle, bindings, load_model

TYPES_KEY, TEMPLATE_KEY = "tokenizer.ggml.token_type", "tokenizer.chat_template"
_BOS_KEY, _EOS_KEY = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"
"""llama.cpp takes Llama's ids where a file has none; here there is no such token then."""

UNKNOWN_SURFACE = " ⁇ ".encode()


def _matching(
    pieces: dict[str, int], encode: Callable[[str], list[int]]
) -> Callable[[str], list[int]]:
    """Returns `encode`, but `pieces` match anywhere in a text, as user-defined ones do."""
    pattern = re.compile(f"({'|'.join(map(re.escape, pieces)) or '(?!)'})")

    def matched(text: str) -> list[int]:
        runs = [(i % 2, run) for i, run in enumerate(pattern.split(text)) if run]
        return [t for is_piece, r in runs for t in ([pieces[r]] if is_piece else encode(r))]

    return matched


class LlamaCppVocabulary:
    def __init__(self, model: Handle) -> None:
        llama = self._llama = bindings()
        self._model = model
        self._pointer = llama.llama_model_get_vocab(model.pointer)
        self.size: int = llama.llama_vocab_n_tokens(self._pointer)
        self.bos_id = _known(llama.llama_vocab_bos(self._pointer))
        self.eos_id = _known(llama.llama_vocab_eos(self._pointer))
        kind = llama.llama_vocab_type(self._pointer)
        self.understands_text: bool = kind != llama.LLAMA_VOCAB_TYPE_NONE
        self._silent = {self.bos_id, self.eos_id, _known(llama.llama_vocab_pad(self._pointer))}

    def special(self) -> dict[str, int]:
        kinds = self._llama.LLAMA_TOKEN_ATTR_CONTROL | self._llama.LLAMA_TOKEN_ATTR_UNKNOWN
        return {
            self._llama.llama_vocab_get_text(self._pointer, token).decode(): token
            for token in range(self.size)
            if self._llama.llama_vocab_get_attr(self._pointer, token) & kinds
        }

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Encodes a text; literals of control tokens match only with `parse_special`."""
        data = text.encode()
        capacity = len(data) + 1  # a token has at least a byte; llama.cpp may prepend a space
        ids = (ctypes.c_int32 * capacity)()
        count = self._llama.llama_tokenize(
            self._pointer, data, len(data), ids, capacity, False, parse_special
        )
        return ids[:count]

    def surface(self, token: int) -> bytes:
        if not 0 <= token < self.size or token in self._silent:
            return b""
        unknown = self._llama.LLAMA_TOKEN_ATTR_UNKNOWN
        if self._llama.llama_vocab_get_attr(self._pointer, token) & unknown:
            return UNKNOWN_SURFACE
        return self._piece(token)

    def _piece(self, token: int, capacity: int = 64) -> bytes:
        buffer: Any = ctypes.create_string_buffer(capacity)
        convert = self._llama.llama_token_to_piece
        length: int = convert(self._pointer, token, buffer, capacity, 0, True)
        return buffer.raw[:length] if length >= 0 else self._piece(token, -length)


def _known(token: int) -> int | None:
    return token if token >= 0 else None


class GgufText(ArtifactText):
    def tokenizer(self, artifact: Artifact) -> Tokenizer:
        """Loads a GGUF file's vocabulary, without the weights.

        llama.cpp treats any `</s>` as a control token, whatever type the file gives it. Gemma's
        `</s>` is the HTML tag, so here the file's type counts, as in all other formats.
        """
        assert isinstance(artifact, GgufArtifact)
        vocabulary = LlamaCppVocabulary(load_model(artifact.path, vocab_only=True))
        values = artifact.header.values
        types = values.get(TYPES_KEY)
        if types is None or not vocabulary.understands_text:
            raise RequestError(
                f"{artifact.path} has no vocabulary, which text needs; put tokenizer.model into "
                "the checkpoint's folder and export it again, or pass token ids (--ids)"
            )
        special = vocabulary.special()
        overruled = {p: t for p, t in special.items() if types[t] in (NORMAL, USER_DEFINED)}
        return Tokenizer(
            vocab_size=vocabulary.size,
            special={piece: token for piece, token in special.items() if piece not in overruled},
            bos_id=vocabulary.bos_id if _BOS_KEY in values else None,
            eos_id=vocabulary.eos_id if _EOS_KEY in values else None,
            raw_encode=_matching(overruled, vocabulary.encode),
            surface=vocabulary.surface,
            unknown_id=next((token for token, kind in enumerate(types) if kind == UNKNOWN), None),
        )

    def template(self, artifact: Artifact) -> ChatTemplate:
        assert isinstance(artifact, GgufArtifact)
        source = artifact.header.values.get(TEMPLATE_KEY)
        if not source or not isinstance(source, str):
            return ChatTemplate(GEMMA_TEMPLATE, "built-in")
        return ChatTemplate(source, f"{TEMPLATE_KEY} in {artifact.path.name}")


FORMAT = GgufText()
