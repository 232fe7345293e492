"""Completes an artifact's tokenizer for programs that read no SentencePiece model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
import tokenizers

from rgexport.errors import RequestError
from rgexport.export.onnx.tokenizer_json import write_tokenizer_json
from rgexport.griffin.chat_template import GEMMA_TEMPLATE, read_chat_template
from rgexport.griffin.markup import END_OF_TURN
from rgexport.griffin.tokenizer_files import control_token_names, has_tokenizer
from rgexport.progress import warn

_TURN = "turn"


@dataclass(frozen=True, kw_only=True)
class ControlIds:
    """Ids of control tokens, as configurations name them; by default Gemma's.

    Attributes:
        bos_token_id: the beginning of a text.
        eos_token_id: what ends a reply: the end of a text, and the end of a turn if there is one.
        pad_token_id: padding.
    """

    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int = 0


def complete_tokenizer(folder: Path, *, tuned: bool | None) -> ControlIds:
    """Writes `tokenizer.json` and `tokenizer_config.json` where the checkpoint has none.

    A tokenizer that cannot be converted is told, and is not an error: rgexport itself may read it.

    Args:
        folder: an artifact in the making, with the checkpoint's tokenizer if it has one.
        tuned: whether the model was tuned for chats.
    """
    if not has_tokenizer(folder):
        return ControlIds()
    try:
        ids = _token_ids(folder)
        _write_missing(folder, chats=bool(tuned) and _TURN in ids)
    except RequestError as error:
        warn(f"only rgexport will take text with this artifact, other programs token ids: {error}")
        return ControlIds()
    ends = tuple(ids[name] for name in ("eos_token", _TURN) if name in ids)
    gemma = ControlIds()
    return ControlIds(
        bos_token_id=ids.get("bos_token", gemma.bos_token_id),
        eos_token_id=ends or gemma.eos_token_id,
        pad_token_id=ids.get("pad_token", gemma.pad_token_id),
    )


def bytes_to_add(files: Iterable[Path]) -> int:
    """How large the `tokenizer.json` is that an export adds to a checkpoint's tokenizer files."""
    found = {path.name: path for path in files}
    if "tokenizer.json" in found or "tokenizer.model" not in found:
        return 0
    return _converted_bytes(found["tokenizer.model"])


@lru_cache(maxsize=1)
def _converted_bytes(model: Path) -> int:
    """Plans ask again and again, and the conversion takes seconds."""
    with TemporaryDirectory() as folder:
        made = Path(folder) / "tokenizer.json"
        try:
            write_tokenizer_json(model, made)
        except RequestError:  # the export does without
            return 0
        return made.stat().st_size


def _write_missing(folder: Path, *, chats: bool) -> None:
    converted, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not converted.is_file():
        write_tokenizer_json(folder / "tokenizer.model", converted)
    if not config.is_file():
        made = {"tokenizer_class": "GemmaTokenizer", **control_token_names(folder)}
        if chats and read_chat_template(folder) is None:
            made["chat_template"] = GEMMA_TEMPLATE
        config.write_text(json.dumps(made, indent=1) + "\n", "utf-8")


def _token_ids(folder: Path) -> dict[str, int]:
    """The ids of those control tokens that the vocabulary has, and of a turn's end.

    Raises:
        RequestError: the tokenizer cannot be read.
    """
    try:
        names = {**control_token_names(folder), _TURN: END_OF_TURN}
        if (folder / "tokenizer.model").is_file():
            return _ids_by_sentencepiece(folder / "tokenizer.model", names)
        engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        found = {key: engine.token_to_id(piece) for key, piece in names.items()}
        return {key: i for key, i in found.items() if i is not None}
    except Exception as error:  # of JSON and of both engines
        raise RequestError(f"the tokenizer cannot be read ({error})") from None


def _ids_by_sentencepiece(path: Path, names: Mapping[str, str]) -> dict[str, int]:
    """As `_token_ids`; an unknown piece has the id of another one."""
    engine = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = {key: engine.PieceToId(piece) for key, piece in names.items()}
    return {key: i for key, i in found.items() if engine.IdToPiece(i) == names[key]}
