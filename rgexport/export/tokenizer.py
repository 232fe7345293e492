"""Completes an artifact's tokenizer for programs that read no SentencePiece model."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from rgexport.artifacts.control_ids import ControlIds
from rgexport.errors import RequestError, reason
from rgexport.files.paths import read_regular
from rgexport.files.typed_json import parse_json
from rgexport.griffin import control_tokens, tokenizer_files
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.progress import warn
from rgexport.quantize.built_in_text import BUILT_IN

_NEW_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast"}


def complete_tokenizer(folder: Path, name: str) -> ControlIds:
    """Completes `tokenizer.json` and `tokenizer_config.json`, or warns; `name` is the model's."""
    if not tokenizer_files.has_tokenizer(folder):
        return ControlIds()
    model, target = folder / "tokenizer.model", folder / "tokenizer.json"
    try:
        tokens = control_tokens.read_control_tokens(folder)
        if not target.is_file():
            write_tokenizer_json(model, target)
            _warn_of_normalization(model)
    except RequestError as error:
        warn(f"only rgexport will take text with this artifact, other programs token ids: {error}")
        return ControlIds()
    template = control_tokens.chosen_template(folder, tokens.special, name)
    _complete_config(folder / tokenizer_files.TOKENIZER_CONFIG, tokens, template)
    ends = [token.id for token in (tokens.eos, tokens.end_of_turn) if token is not None]
    return ControlIds(
        bos_token_id=tokens.bos and tokens.bos.id,
        eos_token_id=tuple(dict.fromkeys(ends)),
        pad_token_id=tokens.pad and tokens.pad.id,
    )


def tokens_by_frequency(checkpoint: Checkpoint) -> np.ndarray:
    """Returns all token ids, int64 [vocab], first those that the built-in text has most often.

    Tokens that it has equally often, or all without a readable tokenizer, are in their order.
    """
    text, size = BUILT_IN.read_text("utf-8"), checkpoint.config.vocab_size
    files = {path.name: path for path in checkpoint.tokenizer_files}
    ids: list[int] = []
    if model := files.get("tokenizer.model"):
        with contextlib.suppress(RequestError), tokenizer_files.guarded(model):
            ids = sentencepiece.SentencePieceProcessor(model_file=str(model)).EncodeAsIds(text)
    elif file := files.get("tokenizer.json"):
        with contextlib.suppress(RequestError), tokenizer_files.guarded(file):
            ids = (
                tokenizer_files.read_tokenizer_json(file)
                .engine()
                .encode(text, add_special_tokens=False)
                .ids
            )
    counts = np.bincount([i for i in ids if i < size], minlength=size)
    return np.argsort(-counts, kind="stable")


@lru_cache(maxsize=1)  # every plan needs it, and the conversion takes seconds
def bytes_to_add(files: tuple[Path, ...]) -> int:
    paths = {path.name: path for path in files}
    if "tokenizer.json" in paths or "tokenizer.model" not in paths:
        return 0
    with TemporaryDirectory() as folder:
        target = Path(folder) / "tokenizer.json"
        try:
            write_tokenizer_json(paths["tokenizer.model"], target)
        except RequestError:  # the export does without
            return 0
        return target.stat().st_size


def _warn_of_normalization(model: Path) -> None:
    pieces = tokenizer_files.read_pieces(model)
    prefix = "a space in front" if pieces.normalizer_spec.add_dummy_prefix else None
    if rule := tokenizer_files.normalization(pieces) or prefix:
        warn(
            f"{model.name} changes text before it splits it ({rule}), which onnxruntime-genai "
            "does not: it will split some texts differently"
        )


def _complete_config(
    path: Path, tokens: control_tokens.ControlTokens, template: str | None
) -> None:
    try:
        config = parse_json(read_regular(path)) if path.is_file() else dict(_NEW_CONFIG)
        completed = config | {
            key: piece
            for key, piece in tokens.names().items()
            if control_tokens.literal(config.get(key)) not in tokens.special
        }
        decisive = (path.parent / control_tokens.JINJA_FILE).is_file()
        if template and (decisive or not config.get("chat_template")):
            completed["chat_template"] = template
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read ({error}); copy it again") from None
    if completed != config or not path.is_file():
        path.write_text(json.dumps(completed, indent=1) + "\n", "utf-8")


def write_tokenizer_json(source: Path, target: Path) -> None:
    """Converts a `tokenizer.model` to a `tokenizer.json` that puts BOS before a text.

    SentencePiece merges the pair with the highest score, so pairs are in that order; user-defined
    pieces are added tokens.
    """
    try:
        model = tokenizer_files.read_pieces(source)
        if not tokenizer_files.is_gemmas_kind(model):
            raise ValueError("it is no BPE model with byte fallback, as Gemma's is")
        engine = sentencepiece.SentencePieceProcessor(model_file=str(source))
        frame = _frame(model, control_tokens.sentencepiece_tokens(engine))
        pieces = [piece.piece for piece in model.pieces]
        merged = (tokenizer_files.NORMAL, tokenizer_files.USER_DEFINED)
        scores = {i: p.score for i, p in enumerate(model.pieces) if p.type in merged}
    except Exception as error:  # of protobuf and tokenizers
        raise RequestError(
            f"{source} cannot be converted to tokenizer.json ({reason(error)}); copy it again from "
            "the original checkpoint, or put its tokenizer.json beside it"
        ) from None
    del model, engine
    vocabulary = (f"{json.dumps(piece)}:{i}" for i, piece in enumerate(pieces))
    with target.open("w", encoding="utf-8") as file:
        file.writelines(_fill(frame, vocabulary, _merges(pieces, scores)))


def _frame(model: Any, tokens: control_tokens.ControlTokens) -> dict[str, Any]:
    added = {
        i: p
        for i, p in enumerate(model.pieces)
        if p.type not in (tokenizer_files.NORMAL, tokenizer_files.BYTE, tokenizer_files.UNUSED)
    }
    engine = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in added.items()},
            merges=[],
            unk_token=tokens.unk and tokens.unk.piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    special = [
        p.type in (tokenizer_files.UNKNOWN, tokenizer_files.CONTROL)
        or control_tokens.is_markup(p.piece)
        for p in added.values()
    ]
    # Text matches after spaces became "▁", and markup before.
    engine.add_tokens(
        [
            tokenizers.AddedToken(piece.piece, special=markup, normalized=not markup)
            for piece, markup in zip(added.values(), special, strict=True)
        ]
    )
    engine.normalizer = _normalizer(model.normalizer_spec)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    engine.decoder = decoders.Sequence(steps)
    if tokens.bos is not None:
        bos = tokens.bos.piece
        engine.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, tokens.bos.id)],
        )
    return dict(json.loads(engine.to_str()))


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    spaces = normalizers.Replace(" ", "▁")
    return normalizers.Sequence([*steps, spaces]) if steps else spaces


def _merges(pieces: Sequence[str], scores: Mapping[int, float]) -> Iterator[str]:
    """Yields every pair of pieces that makes a piece, by falling score."""
    known = {pieces[i] for i in scores}
    pairs = (
        (-score, i, cut)
        for i, score in scores.items()
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in known and pieces[i][cut:] in known
    )
    rows = np.fromiter(pairs, [("order", "f4"), ("id", "i4"), ("cut", "i4")])
    for _, i, cut in np.sort(rows):
        yield json.dumps([pieces[i][:cut], pieces[i][cut:]])


def _fill(frame: dict[str, Any], vocabulary: Iterator[str], merges: Iterator[str]) -> Iterator[str]:
    lists = {"vocab": ("{", vocabulary, "}"), "merges": ("[", merges, "]")}
    model = frame.pop("model")
    yield json.dumps(frame)[:-1] + ', "model": {'
    rest = {name: value for name, value in model.items() if name not in lists}
    yield json.dumps(rest)[1:-1]
    for name, (start, items, end) in lists.items():
        yield f', "{name}": {start}'
        for i, item in enumerate(items):
            yield f",\n{item}" if i else item
        yield end
    yield "}}\n"
