"""Tokenizers: text to token ids and back; text can never produce the ids of markup.

Gemma's turn tokens are user-defined SentencePiece pieces: they match inside any text. So each
literal of a special token in a *text* is cut in two before it is encoded; only a template can
produce its id.
"""

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.files.paths import read_regular
from rgexport.griffin.control_tokens import (
    END_OF_TURN,
    ControlTokens,
    json_tokens,
    sentencepiece_tokens,
)
from rgexport.griffin.tokenizer_files import MAX_BYTES, guarded, read_tokenizer_json

CUT = "\ud800"
"""Marks a cut: a lone surrogate, which no encodable text contains."""
_CACHED_CHARACTERS, _MOST_CACHED = 4096, 1024
"""Length of the longest texts with cached ids, and number of such texts."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _surface(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, with encoding and decoding.

    `special` has the literal of every special piece (control and turn pieces, `<mask>`,
    `<unusedN>`): `encode_text` never returns one of their ids, except `unknown_id`, of text that no
    piece covers. `surface` returns the UTF-8 text of one piece, perhaps a part of a character.
    """

    vocab_size: int
    special: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    raw_encode: Callable[[str], list[int]]
    surface: Callable[[int], bytes]
    unknown_id: int | None = None

    def __post_init__(self) -> None:
        if short := [literal for literal in self.special if len(literal) < 2]:
            wrong = f"special piece {short[0]!r}, which any text may contain"
        elif self.unknown_id is not None and self.unknown_id in {self.bos_id, *self.stop_ids}:
            wrong = f"id {self.unknown_id} for unknown text and for a control token"
        else:
            return
        raise RequestError(
            f"the vocabulary has the {wrong}; copy the tokenizer again from the original checkpoint"
        )

    @property
    def end_of_turn_id(self) -> int | None:
        return self.special.get(END_OF_TURN)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(i for i in (self.eos_id, self.end_of_turn_id) if i is not None)

    def literal(self, token: int | None) -> str:
        """Returns the literal of a special id, "" for other ids."""
        return next((text for text, i in self.special.items() if i == token), "")

    def cut(self, text: str) -> str:
        """Inserts `CUT` into each special literal; replaces lone surrogates by U+FFFD."""
        text = text if text.isascii() else _SURROGATE.sub("\ufffd", text)
        is_plain = self._firsts.isdisjoint(text)  # as nearly every message
        return text if is_plain else self._opening.sub(rf"\1{CUT}", text)

    def encode_markup(self, rendered: str) -> list[int]:
        """Encodes a text; special literals become their ids, unless they are cut."""
        ids: list[int] = []
        for index, part in enumerate(self._literals.split(rendered)):
            if index % 2:
                ids.append(self.special[part])
                continue
            for run in part.split(CUT):
                is_short = len(run) <= _CACHED_CHARACTERS
                ids += (self._encode_short if is_short else self._encode_run)(run)
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Encodes plain text as the engine does, but never to the id of a special piece."""
        return self.encode_markup(self.cut(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; control pieces and ids outside the vocabulary are dropped."""
        return b"".join(map(self.surface, ids)).decode("utf-8", "replace")

    def _encode_run(self, run: str) -> list[int]:
        ids = self.raw_encode(run) if run else []
        if self._forbidden.isdisjoint(ids):
            return ids
        # A normalizer made a literal out of look-alikes. A single character cannot become one.
        return [token for character in run for token in self.raw_encode(character)]

    @functools.cached_property
    def _encode_short(self) -> Callable[[str], list[int]]:
        """Caches `_encode_run`, since each turn encodes the whole conversation again."""
        return functools.lru_cache(_MOST_CACHED)(self._encode_run)

    @functools.cached_property
    def _forbidden(self) -> frozenset[int]:
        return frozenset(self.special.values()) - {self.unknown_id}

    @functools.cached_property
    def _firsts(self) -> frozenset[str]:
        return frozenset(literal[0] for literal in self.special)

    @functools.cached_property
    def _alternatives(self) -> str:
        longest_first = sorted(self.special, key=len, reverse=True)
        return "|".join(map(re.escape, longest_first)) or "(?!)"

    @functools.cached_property
    def _literals(self) -> re.Pattern[str]:
        return re.compile(f"({self._alternatives})")

    @functools.cached_property
    def _opening(self) -> re.Pattern[str]:
        """Matches only the first character of a literal, so that overlapping ones are found."""
        return re.compile(f"(?={self._alternatives})(.)", re.DOTALL)


class StreamDecoder:
    """A decoder of one id at a time; it holds back a character until its bytes are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._surface = tokenizer.surface
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._utf8.decode(self._surface(token))

    def finish(self) -> str:
        """Returns U+FFFD if the last character is incomplete, else ""."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns a folder's tokenizer.model, else tokenizer.json; RequestError without one."""
    for name, read in _READERS.items():
        if (folder / name).is_file():
            with guarded(folder / name):
                return read(folder / name)
    raise RequestError(
        f"{folder} has neither {' nor '.join(_READERS)}, which text needs; put one of "
        "them into the checkpoint's folder and export it again, or pass token ids (--ids)"
    )


def _read_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    engine = sentencepiece.SentencePieceProcessor()
    engine.LoadFromSerializedProto(read_regular(path, MAX_BYTES))
    size = engine.GetPieceSize()

    def surface(token: int) -> bytes:
        if not 0 <= token < size or engine.IsControl(token):
            return b""
        # An unknown one is SentencePiece's unk_surface.
        return " ⁇ ".encode() if engine.IsUnknown(token) else _surface(engine.IdToPiece(token))

    encode = guarded(path)(engine.EncodeAsIds)
    return _tokenizer(size, sentencepiece_tokens(engine), encode, surface)


def _read_json(path: Path) -> Tokenizer:
    file = read_tokenizer_json(path)
    layout = file.fields
    if not layout["model"].get("byte_fallback"):
        raise RequestError(
            f"{path} is a {layout['model'].get('type')} tokenizer without byte fallback; "
            "expected a conversion of Gemma's SentencePiece model; put tokenizer.model beside it"
        )
    engine = file.engine()
    engine.no_truncation()
    engine.no_padding()
    tokens = json_tokens(layout, engine.get_vocab(with_added_tokens=True), path.parent)
    silent = {token.id for token in (tokens.bos, tokens.eos, tokens.pad) if token is not None}

    def surface(token: int) -> bytes:
        piece = engine.id_to_token(token) if token >= 0 else None
        return b"" if piece is None or token in silent else _surface(piece)

    @guarded(path)
    def encode(text: str) -> list[int]:
        # Added tokens match runs of spaces before spaces become "▁"; SentencePiece matches them
        # after. So spaces are replaced first.
        ids: list[int] = engine.encode(text.replace(" ", "▁"), add_special_tokens=False).ids
        return ids

    size = engine.get_vocab_size()
    if any(engine.id_to_token(token) is None for token in range(size)):
        raise RequestError(f"{path} has gaps between its token ids; put tokenizer.model beside it")
    return _tokenizer(size, tokens, encode, surface)


def _tokenizer(
    size: int,
    tokens: ControlTokens,
    encode: Callable[[str], list[int]],
    surface: Callable[[int], bytes],
) -> Tokenizer:
    controls = tokens.bos, tokens.eos, tokens.unk
    bos, eos, unk = (None if control is None else control.id for control in controls)
    return Tokenizer(size, tokens.special, bos, eos, encode, surface, unk)


_READERS: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.model": _read_sentencepiece,
    "tokenizer.json": _read_json,
}
