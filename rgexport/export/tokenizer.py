"""Completes an artifact's tokenizer for programs that read no SentencePiece model.

Control tokens and the chat template become what `rgexport chat` uses, so that all programs read the
same ids.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rgexport.errors import RequestError
from rgexport.export.tokenizer_json import write_tokenizer_json
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin.chat_template import JINJA_FILE, chosen_template
from rgexport.griffin.control_tokens import ControlTokens, literal, read_control_tokens
from rgexport.griffin.tokenizer_files import (
    TOKENIZER_CONFIG,
    has_tokenizer,
    normalization,
    read_pieces,
)
from rgexport.progress import warn

_NEW_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""The class that takes tokenizer.json as it is; Gemma's adds tokens that a vocabulary may lack."""


@dataclass(frozen=True, kw_only=True)
class ControlIds:
    """Ids of control tokens, as configurations name them; by default Gemma's.

    Attributes:
        bos_token_id: the beginning of a text.
        eos_token_id: what ends a reply: the end of a text, and the end of a turn if there is one.
        pad_token_id: padding.
    """

    bos_token_id: int | None = 2
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int | None = 0

    def fields(self) -> dict[str, Any]:
        """Returns the fields of a configuration; a token that the vocabulary lacks has none."""
        return {key: ids for key, ids in vars(self).items() if ids not in (None, ())}


def complete_tokenizer(folder: Path, name: str) -> ControlIds:
    """Writes `tokenizer.json`, and what `tokenizer_config.json` lacks.

    A tokenizer that cannot be converted causes a warning and no error: rgexport itself may read it.

    Args:
        folder: an artifact in the making, with the checkpoint's tokenizer if it has one.
        name: the model's, for warnings.
    """
    if not has_tokenizer(folder):
        return ControlIds()
    try:
        tokens = read_control_tokens(folder)
        _convert(folder)
    except RequestError as error:
        warn(f"only rgexport will take text with this artifact, other programs token ids: {error}")
        return ControlIds()
    template = chosen_template(folder, tokens.special, name)
    _complete_config(folder / TOKENIZER_CONFIG, tokens, template)
    ends = [token.id for token in (tokens.eos, tokens.end_of_turn) if token is not None]
    return ControlIds(
        bos_token_id=tokens.bos and tokens.bos.id,
        eos_token_id=tuple(dict.fromkeys(ends)),
        pad_token_id=tokens.pad and tokens.pad.id,
    )


def bytes_to_add(files: Iterable[Path]) -> int:
    """Returns the size of the `tokenizer.json` that an export adds to a checkpoint's files."""
    paths = {path.name: path for path in files}
    if "tokenizer.json" in paths or "tokenizer.model" not in paths:
        return 0
    return _converted_bytes(paths["tokenizer.model"])


@lru_cache(maxsize=1)
def _converted_bytes(model: Path) -> int:
    """Plans ask again and again, and the conversion takes seconds."""
    with TemporaryDirectory() as folder:
        target = Path(folder) / "tokenizer.json"
        try:
            write_tokenizer_json(model, target)
        except RequestError:  # the export does without
            return 0
        return target.stat().st_size


def _convert(folder: Path) -> None:
    model, target = folder / "tokenizer.model", folder / "tokenizer.json"
    if target.is_file():
        return
    write_tokenizer_json(model, target)
    if rule := _change_of_text(model):
        warn(
            f"{model.name} changes text before it splits it ({rule}), which onnxruntime-genai "
            "does not: it will split some texts differently"
        )


def _change_of_text(model: Path) -> str | None:
    pieces = read_pieces(model)
    prefix = "a space in front" if pieces.normalizer_spec.add_dummy_prefix else None
    return normalization(pieces) or prefix


def _complete_config(path: Path, tokens: ControlTokens, template: str | None) -> None:
    """Writes the names of control tokens and the chat template where they are missing or wrong."""
    try:
        config = parse_json(read_regular(path)) if path.is_file() else dict(_NEW_CONFIG)
        completed = config | {
            key: piece
            for key, piece in tokens.names().items()
            if literal(config.get(key)) not in tokens.special
        }
        decisive = (path.parent / JINJA_FILE).is_file()
        if template and (decisive or not config.get("chat_template")):
            completed["chat_template"] = template
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read ({error}); copy it again") from None
    if completed != config or not path.is_file():
        path.write_text(json.dumps(completed, indent=1) + "\n", "utf-8")
