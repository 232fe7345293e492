"""Control tokens of a vocabulary: the ends of a text, unknown text, padding, and markup."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rgexport.errors import RequestError
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin.tokenizer_files import MAX_BYTES, TOKENIZER_CONFIG
from rgexport.griffin.tokenizer_json import read_tokenizer_json

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# Gemma has pieces for some HTML tags: those are text.
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|[bius]|sub|sup|code)>"
)

_CONVENTIONAL = {
    "bos_token": ("<bos>", "<s>"),
    "eos_token": ("<eos>", "</s>"),
    "unk_token": ("<unk>",),
    "pad_token": ("<pad>",),
}
"""Names that Gemma and SentencePiece use, for a tokenizer.json whose settings are missing."""


class ControlToken(NamedTuple):
    id: int
    piece: str


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """The control tokens of a vocabulary; None where it lacks one.

    `special` is literal → id of every piece that plain text must not be encoded to.
    """

    bos: ControlToken | None
    eos: ControlToken | None
    unk: ControlToken | None
    pad: ControlToken | None
    special: Mapping[str, int]

    @property
    def end_of_turn(self) -> ControlToken | None:
        """Returns `<end_of_turn>`, which ends a reply as `eos` does."""
        index = self.special.get(END_OF_TURN)
        return None if index is None else ControlToken(index, END_OF_TURN)

    def names(self) -> dict[str, str | None]:
        """Returns the entries of tokenizer_config.json, such as `bos_token`."""
        tokens = {key: getattr(self, key.removesuffix("_token")) for key in _CONVENTIONAL}
        return {key: token and token.piece for key, token in tokens.items()}


def is_markup(piece: str) -> bool:
    """Returns whether a user-defined piece is markup, which text must not be encoded to."""
    return bool(_MARKUP.fullmatch(piece)) and not _HTML.fullmatch(piece)


def sentencepiece_tokens(engine: "SentencePieceProcessor") -> ControlTokens:
    """Reads the control tokens of a loaded tokenizer.model.

    User-defined pieces have the score 0; learned pieces that look like markup do not.
    """

    def token(index: int) -> ControlToken | None:
        return ControlToken(index, engine.IdToPiece(index)) if index >= 0 else None

    special = {
        engine.IdToPiece(i): i
        for i in range(engine.GetPieceSize())
        if engine.IsControl(i)
        or engine.IsUnknown(i)
        or (engine.GetScore(i) == 0 and not engine.IsByte(i) and is_markup(engine.IdToPiece(i)))
    }
    return ControlTokens(
        bos=token(engine.bos_id()),
        eos=token(engine.eos_id()),
        unk=token(engine.unk_id()),
        pad=token(engine.pad_id()),
        special=special,
    )


def json_tokens(
    layout: Mapping[str, Any], pieces: Mapping[str, int], folder: Path
) -> ControlTokens:
    """Reads the control tokens of a tokenizer.json, whose content is `layout`.

    `pieces` is literal → id of the whole vocabulary, added tokens included; `folder` has the file,
    and perhaps the settings that name its tokens.
    """
    added = layout.get("added_tokens", [])
    literals = (t["content"] for t in added if t["special"] or is_markup(t["content"]))
    special = {literal: pieces[literal] for literal in literals}
    names = _named_tokens(folder)
    unknown = layout["model"].get("unk_token")

    def token(key: str) -> ControlToken | None:
        choices = (names[key],) if key in names else _CONVENTIONAL[key]
        return next(
            (ControlToken(special[name], name) for name in choices if name in special), None
        )

    return ControlTokens(
        bos=token("bos_token"),
        eos=token("eos_token"),
        unk=ControlToken(pieces[unknown], unknown) if unknown in pieces else None,
        pad=token("pad_token"),
        special=special,
    )


def read_control_tokens(folder: Path) -> ControlTokens:
    """Reads the control tokens of a folder's tokenizer.model, or of its tokenizer.json."""
    import sentencepiece  # slow to load

    try:
        model = folder / "tokenizer.model"
        if model.is_file():
            engine = sentencepiece.SentencePieceProcessor()
            engine.LoadFromSerializedProto(read_regular(model, MAX_BYTES))
            return sentencepiece_tokens(engine)
        file = read_tokenizer_json(folder / "tokenizer.json")
        pieces = file.engine().get_vocab(with_added_tokens=True)
        return json_tokens(file.fields, pieces, folder)
    except Exception as error:  # of JSON and of both engines
        raise RequestError(f"the tokenizer cannot be read ({error})") from None


def literal(setting: Any) -> Any:
    """Returns the literal that a setting names: settings are a literal or an object with one."""
    return setting["content"] if isinstance(setting, dict) else setting


def _named_tokens(folder: Path) -> dict[str, Any]:
    """Returns the names in the settings beside a tokenizer.json; None means that there is none."""
    names: dict[str, Any] = {}
    for path in (folder / "special_tokens_map.json", folder / TOKENIZER_CONFIG):
        if path.is_file():
            settings = parse_json(read_regular(path))
            names |= {key: literal(settings[key]) for key in _CONVENTIONAL if key in settings}
    return names
