"""The items by which an artifact's identity is judged: short texts by their names.

Those of a checkpoint's tokenizer, template and settings are of the folder that an export makes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rgexport._version import __version__
from rgexport.artifacts.artifact import Artifact, files_of
from rgexport.artifacts.control_ids import ControlIds
from rgexport.artifacts.format import folder_format
from rgexport.artifacts.gguf.vocabulary import Vocabulary, read_vocabulary
from rgexport.artifacts.manifest import CARD
from rgexport.chat.sample_text import built_in_text
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.export.tokenizer import complete_tokenizer
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.control_tokens import ControlTokens, chat_template, read_control_tokens
from rgexport.griffin.tokenizer_files import (
    MAX_BYTES,
    NORMAL,
    TOKENIZER_FILES,
    find_tokenizer_files,
    has_tokenizer,
)
from rgexport.kernels.onnx.library import LIBRARY
from rgexport.progress import without_warnings
from rgexport.validate.checks import Check

IdentityOutcome = Literal["same", "asked for", "differs", "not compared"]
_RANK: dict[IdentityOutcome, int] = {"differs": 3, "asked for": 2, "same": 1, "not compared": 0}
"""An item that is compared twice has the outcome of the higher rank."""

_MOST_NAMED = 6


@dataclass(frozen=True)
class IdentityItem:
    """One property that identifies a model, of an artifact and of what it is compared with.

    Values are in words, null where there is none or nothing is known. The outcome is `asked for` if
    the manifest says that the export was asked for the difference.
    """

    name: str
    artifact: str | None
    expected: str | None
    outcome: IdentityOutcome
    reason: str

    @property
    def sentence(self) -> str:
        """Such as `window: 64, asked for at the export (the original has 128)`."""
        ours, theirs = ("none" if one is None else one for one in (self.artifact, self.expected))
        note = ", asked for at the export" if self.outcome == "asked for" else ""
        return f"{self.name}: {ours}{note} ({self.reason} {theirs})"


def compared(
    name: str, artifact: str | None, expected: str | None, reason: str, asked_for: bool = False
) -> IdentityItem:
    outcome: IdentityOutcome = "asked for" if asked_for else "differs"
    outcome = "same" if artifact == expected else outcome
    return IdentityItem(name, artifact, expected, outcome, reason)


def not_compared(name: str, artifact: str | None, reason: str) -> IdentityItem:
    return IdentityItem(name, artifact, None, "not compared", reason)


def merge_items(items: Iterable[IdentityItem]) -> tuple[IdentityItem, ...]:
    """Keeps one item of each name: the first of the highest rank."""
    chosen: dict[str, IdentityItem] = {}
    for item in items:
        before = chosen.get(item.name)
        if before is None or _RANK[item.outcome] > _RANK[before.outcome]:
            chosen[item.name] = item
    return tuple(chosen.values())


def identity_checks(items: Sequence[IdentityItem]) -> Iterator[Check]:
    wrong = [item for item in items if item.outcome == "differs"]
    for item in wrong:
        name = f"identity.{item.name}"
        yield Check(name=name, value=1, limit=0, reason=item.sentence, kind="identity")
    if not wrong:
        yield Check(name="identity", value=0, limit=0, reason=summary(items))


def summary(items: Sequence[IdentityItem]) -> str:
    """Names the items that were asked for, differ, or could not be compared, in one line."""
    sentences = [item.sentence for item in items if item.outcome == "asked for"]
    if same := sum(item.outcome == "same" for item in items):
        sentences.append(f"{same} items as expected (configuration, tokenizer, settings, files)")
    for outcome in ("differs", "not compared"):
        names = [item.name for item in items if item.outcome == outcome]
        sentences += [f"{outcome}: {first_names(names)}"] if names else []
    return "; ".join(sentences)


def first_names(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + rest


Items = Mapping[str, str | None]
"""Name → value in words; None where there is none."""

_HARD_TEXTS = parse_json((files("rgexport.validate") / "hard_texts.json").read_bytes())
"""Texts on which tokenizers that are nearly the same differ."""
_CONTROL = "bos", "eos", "end_of_turn", "unknown", "padding"
NO_MEANING = dict.fromkeys(("vocabulary", "tokenization", "chat_template", *_CONTROL))
"""The items of `meaning` where there is no tokenizer."""
_MOST_SHOWN = 200  # characters of a JSON file that is shown whole; others are shown as a hash


@dataclass(frozen=True, kw_only=True)
class TextIdentity:
    """The text side of a checkpoint; rgexport `version` converted or completed the files `made`."""

    layout: str
    version: str
    made: tuple[str, ...]
    items: dict[str, str | None]


def text_identity(checkpoint: Checkpoint) -> TextIdentity:
    before = {path.name: file_text(path) for path in checkpoint.tokenizer_files}
    with completed_copy(checkpoint.tokenizer_files, checkpoint.name) as (folder, _):
        tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
        items = folder_items(folder, checkpoint.config.vocab_size, tokenizer)
    converted = tuple(name for name in TOKENIZER_FILES if items[name] != before.get(name))
    return TextIdentity(layout=checkpoint.layout, version=__version__, made=converted, items=items)


@contextmanager
def completed_copy(files: Iterable[Path], name: str) -> Iterator[tuple[Path, ControlIds]]:
    """Copies a tokenizer's files and completes them as an export does; yields folder and ids."""
    with TemporaryDirectory() as temporary, without_warnings():
        folder, paths = Path(temporary), list(files)
        for path in paths:
            (folder / path.name).write_bytes(read_regular(path, MAX_BYTES))
        try:
            ids = complete_tokenizer(folder, name)
        except RequestError as error:  # names a file of the copy
            raise RequestError(str(error).replace(temporary, str(paths[0].parent))) from None
        yield folder, ids


def written_files(artifact: Artifact) -> Iterator[IdentityItem]:
    """Compares the files beside a model with those that this version writes for its manifest.

    Copies of the checkpoint's files are left out. Files that rgexport does not write are one item.
    """
    manifest, folder = artifact.manifest, artifact.path
    form, names = folder_format(manifest.kind), files_of(folder)
    assert form is not None, "artifacts of other formats are no folders"
    with completed_copy(find_tokenizer_files(folder), manifest.name) as (copy, ids):
        form.write_program_files(copy, manifest, ids, names)
        written = {name: _file_pair(folder / name, copy / name) for name in sorted(files_of(copy))}
    version = manifest.created_with.get("rgexport", "of an unknown version")
    for name, pair in written.items():
        item = compared(name, *pair, "rgexport writes")
        if item.outcome == "differs" and version != __version__:
            item = not_compared(name, item.artifact, f"written by rgexport {version[:40]}")
        if item.outcome != "same" or name not in TOKENIZER_FILES:
            yield item
    stored = (part for tensor in manifest.tensors.values() for part in tensor.parts.values())
    model = {part.file.partition("/")[0] for part in stored} | {*form.entries}
    known = {CARD, *TOKENIZER_FILES, *written}
    if LIBRARY.name in names and file_text(folder / LIBRARY.name) == file_text(LIBRARY):
        known.add(LIBRARY.name)
    if foreign := sorted(n for n in names - known if n.partition("/")[0] not in model):
        yield not_compared("foreign files", first_names(foreign), "rgexport does not write them")


def folder_items(
    folder: Path, vocab_size: int, tokenizer: Tokenizer | None
) -> dict[str, str | None]:
    """The items of a folder: each of the tokenizer's files, and their `meaning`."""
    items = {name: file_text(folder / name) for name in TOKENIZER_FILES}
    if tokenizer is None:
        return items | NO_MEANING
    vocabulary = None
    with without_warnings(), suppress(RequestError):  # of a kind that only SentencePiece reads
        vocabulary = read_vocabulary(find_tokenizer_files(folder), vocab_size)
    control, (template, _) = read_control_tokens(folder), chat_template(folder)
    return items | meaning(tokenizer, vocabulary, control, template)


def meaning(
    tokenizer: Tokenizer, vocabulary: Vocabulary | None, control: ControlTokens, template: str
) -> dict[str, str | None]:
    """The items that formats share, of a vocabulary and of the ids of some texts."""
    tokens = (
        control.bos,
        control.eos or control.end_of_turn,  # as in GGUF files
        control.end_of_turn,
        control.unk,
        control.pad,
    )
    control_ids = [None if token is None else str(token.id) for token in tokens]
    pieces = None
    if (known := vocabulary) is not None:
        columns = known.tokens, known.types.tolist(), _merge_ranks(known), known.add_space_prefix
        pieces = _counted(len(known.tokens), "pieces", json.dumps(columns))
    texts = built_in_text(), *_HARD_TEXTS
    ids = [tokenizer.encode_markup(texts[0]), *map(tokenizer.encode_text, texts)]
    return {
        "vocabulary": pieces,
        "tokenization": _counted(sum(map(len, ids)), "tokens", json.dumps(ids)),
        "chat_template": _counted(len(template), "characters", template),
        **dict(zip(_CONTROL, control_ids, strict=True)),
    }


def _merge_ranks(vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """The ids of the pieces that merges result in, and the rank of each one's score.

    Nothing else of the scores counts, and the merges of a tokenizer.json have ranks alone. Runs of
    spaces have the score 0 in either case, as the first merge may have: they rank by themselves.
    """
    tokens, scores = vocabulary.tokens, vocabulary.scores.tolist()
    normal = [i for i, kind in enumerate(vocabulary.types.tolist()) if kind == NORMAL]
    known = {tokens[i] for i in normal}

    def is_merged(piece: str) -> bool:
        return any(piece[:n] in known and piece[n:] in known for n in range(1, len(piece)))

    merged = [i for i in normal if len(tokens[i]) > 256 or is_merged(tokens[i])]
    keys = [(not tokens[i].strip("▁"), -scores[i]) for i in merged]
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    return [(i, ranks[key]) for i, key in zip(merged, keys, strict=True)]


def _counted(count: int, what: str, content: str) -> str:
    return f"{count:,} {what}, {_hash(content.encode('utf-8', 'surrogatepass'))}"


def file_text(path: Path) -> str | None:
    """The text of a short JSON file in canonical form, a hash of others, None if it is missing."""
    try:
        content = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix == ".json":
        with suppress(ValueError, RecursionError):
            text = json.dumps(parse_json(content), sort_keys=True)
            return text if len(text) <= _MOST_SHOWN else _hash(text.encode())
    return _hash(content)


def _file_pair(path: Path, expected: Path) -> tuple[str | None, str | None]:
    pair = file_text(path), file_text(expected)
    if pair[0] == pair[1] or path.suffix != ".json" or None in pair:
        return pair
    with suppress(ValueError, RecursionError, OSError):
        ours, theirs = (_fields(parse_json(read_regular(file))) for file in (path, expected))
        names = [name for name in (ours | theirs) if ours.get(name) != theirs.get(name)]
        both = [", ".join(f"{n} {side.get(n)}" for n in names) for side in (ours, theirs)]
        if max(map(len, both)) <= _MOST_SHOWN:
            return both[0], both[1]
    return pair


def _fields(value: Any, name: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {name: json.dumps(value)}
    fields: dict[str, str] = {}
    for key, item in value.items():
        fields |= _fields(item, f"{name}.{key}".lstrip("."))
    return fields


def _hash(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:32]}"
