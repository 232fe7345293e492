"""Control tokens of a vocabulary, such as the ends of a text, and the chat template with them."""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rgexport.errors import RequestError
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin.tokenizer_files import MAX_BYTES, TOKENIZER_CONFIG, read_tokenizer_json
from rgexport.progress import warn

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
    """Reads a loaded tokenizer.model, where only user-defined pieces have the score 0."""

    def token(index: int) -> ControlToken | None:
        return ControlToken(index, engine.IdToPiece(index)) if index >= 0 else None

    special = {
        engine.IdToPiece(i): i
        for i in range(engine.GetPieceSize())
        if engine.IsControl(i)
        or engine.IsUnknown(i)
        or (engine.GetScore(i) == 0 and not engine.IsByte(i) and is_markup(engine.IdToPiece(i)))
    }
    ids = engine.bos_id(), engine.eos_id(), engine.unk_id(), engine.pad_id()
    bos, eos, unk, pad = map(token, ids)
    return ControlTokens(bos=bos, eos=eos, unk=unk, pad=pad, special=special)


def json_tokens(
    layout: Mapping[str, Any], pieces: Mapping[str, int], folder: Path
) -> ControlTokens:
    """Reads the `layout` of a tokenizer.json with all `pieces`, and the settings beside it."""
    added = layout.get("added_tokens", [])
    contents = (t["content"] for t in added if t["special"] or is_markup(t["content"]))
    special = {content: pieces[content] for content in contents}
    names: dict[str, Any] = {}  # None means that there is none
    for path in (folder / "special_tokens_map.json", folder / TOKENIZER_CONFIG):
        if path.is_file():
            settings = parse_json(read_regular(path))
            names |= {key: literal(settings[key]) for key in _CONVENTIONAL if key in settings}

    def token(key: str) -> ControlToken | None:
        choices = (names[key],) if key in names else _CONVENTIONAL[key]
        name = next((name for name in choices if name in special), None)
        return None if name is None else ControlToken(special[name], name)

    bos, eos, pad = map(token, ("bos_token", "eos_token", "pad_token"))
    unknown = layout["model"].get("unk_token")
    unk = ControlToken(pieces[unknown], unknown) if unknown in pieces else None
    return ControlTokens(bos=bos, eos=eos, unk=unk, pad=pad, special=special)


def read_control_tokens(folder: Path) -> ControlTokens:
    """Reads a folder's tokenizer.model or tokenizer.json; RequestError if it cannot be read."""
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


JINJA_FILE = "chat_template.jinja"
"""Takes precedence over the template in tokenizer_config.json."""
BUILT_IN = "built-in"
"""The origin of a template that no file has."""
# As in the tokenizer_config.json of google/recurrentgemma-2b-it.
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def read_chat_template(folder: Path) -> tuple[str, str] | None:
    """Returns the template in chat_template.jinja or tokenizer_config.json, and the file's name."""
    try:
        jinja, config = folder / JINJA_FILE, folder / TOKENIZER_CONFIG
        if jinja.is_file():
            return read_regular(jinja).decode(), jinja.name
        if not config.is_file():
            return None
        template = parse_json(read_regular(config)).get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            if "default" not in named:
                stated = ", ".join(named)
                raise RequestError(
                    f"{config} has the chat templates {stated}; expected one named default"
                )
            template = named["default"]
        if not isinstance(template, str | None):
            raise TypeError(f"chat_template is a {type(template).__name__}; expected text")
        return (template, config.name) if template else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"the chat template in {folder} cannot be read ({type(error).__name__}: {error}); "
            "copy chat_template.jinja or tokenizer_config.json again"
        ) from None


def chat_template(folder: Path) -> tuple[str, str]:
    """Returns the folder's chat template, or Gemma's where it has none."""
    return read_chat_template(folder) or (GEMMA_TEMPLATE, BUILT_IN)


def chosen_template(folder: Path, special: Container[str], name: str) -> str | None:
    """Returns the template of an artifact's chats, or None; warns if they would be refused."""
    source, origin = chat_template(folder)
    if not (missing := missing_turns(source, special)):
        return source
    lacks = f"its tokenizer has no {' and no '.join(missing)}"
    warn(f"{name} cannot chat: {lacks}, which the chat template ({origin}) needs")
    return None if origin == BUILT_IN else source


def missing_turns(template: str, special: Container[str]) -> list[str]:
    turns = (START_OF_TURN, END_OF_TURN)
    return [turn for turn in turns if turn in template and turn not in special]
