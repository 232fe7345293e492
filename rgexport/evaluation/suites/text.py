"""The suite `text`: perplexity and bits per byte of texts, in up to three modes.

*Continuous* reads a whole document in one pass, as in use: the state is carried on. *Chunks* is
the measurement of llama-perplexity: pieces of `context` tokens are read from a fresh state, and
the second half of each counts. *Strided* is the usual measurement for models of limited context:
pieces of `context` tokens overlap, and a token counts in the first piece that reads it.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.chat.sample_text import built_in_text
from rgexport.errors import RequestError
from rgexport.evaluation import display
from rgexport.evaluation.figures import ends, mean, mean_difference
from rgexport.evaluation.losses import block_sums, joined, losses
from rgexport.evaluation.models import EvaluatedModel
from rgexport.evaluation.pieces import Chain, EvaluationRequest, Measured, Piece, Result, Settings
from rgexport.files.paths import read_text, without_ending
from rgexport.reporting.chart import Chart
from rgexport.reporting.tables import Row, Table
from rgexport.runtimes.session import Session
from rgexport.units import amount

NAME, UNIT, INDEPENDENT = "text", "nats per token", True
BLOCK = 64
"""Tokens per stored sum of losses. Losses of neighbours are correlated, so intervals are computed
from blocks."""
LONGEST_TOKEN = 32
"""Most characters of a token; a long text is cut by it before it is encoded."""
_ENDINGS = ".txt", ".md", ".rst", ".py", ".json", ".csv", ".html"
_BUILT_IN = "built-in"
_MODE = "domain", "context", "stride"


@dataclass(frozen=True)
class Document:
    name: str
    domain: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@cache
def documents(paths: tuple[Path, ...]) -> list[Document]:
    """Returns the text files at the paths and in folders, each once; the built-in text for none.

    The domain of a file is its name, without an ending such as `.txt` where no other file has the
    same. In a folder with folders, it is the name of the first one below: `prose` for
    `texts/prose/emma.txt` in `texts`. Hidden files and folders are left out.
    """
    if not paths:
        return [Document(_BUILT_IN, _BUILT_IN, built_in_text())]
    return list(dict.fromkeys(document for path in paths for document in _documents_at(path)))


def _documents_at(path: Path) -> Iterator[Document]:
    if not path.is_dir():
        yield Document(path.name, _without_ending(path), read_text(path))
        return
    files = sorted(file for file in path.rglob("*") if _is_text(file, path))
    if not files:
        raise RequestError(f"{path} has no texts; expected files that end in {', '.join(_ENDINGS)}")
    is_flat = all(file.parent == path for file in files)
    stems = Counter(map(_without_ending, files))
    for file in files:
        names = file.relative_to(path).parts
        domain = names[0] if len(names) > 1 else path.resolve().name
        if is_flat:
            domain = stem if stems[stem := _without_ending(file)] == 1 else file.name
        yield Document("/".join(names), domain, read_text(file))


def _is_text(file: Path, folder: Path) -> bool:
    is_hidden = any(name.startswith(".") for name in file.relative_to(folder).parts)
    return file.suffix in _ENDINGS and file.is_file() and not is_hidden


def _without_ending(file: Path) -> str:
    return without_ending(file.name, _ENDINGS)


def document_of(settings: Settings, request: EvaluationRequest) -> Document:
    """Returns the document of a piece, unless it has changed."""
    for document in documents(request.texts):
        if document.sha256 == settings["sha256"]:
            return document
    raise RequestError(f"the text {settings['document']} has changed, or a worker has another one")


def chains(model: EvaluatedModel, request: EvaluationRequest) -> Iterator[Chain]:
    model.require_tokenizer(NAME)
    # Context and stride: both None in continuous mode, only the stride in chunks.
    modes: list[tuple[int | None, int | None]] = [(None, None), (request.context, None)]
    if request.stride is not None:
        modes.append((request.context, request.stride))
    for document in documents(request.texts):
        count = len(_ids(model, document, request.limit))
        if count < 2:
            raise RequestError(f"{document.name} is too short; expected a text of 2 tokens or more")
        for context, stride in modes:
            if stride is None and context is not None and count < context:
                continue
            settings = {
                "document": document.name,
                "domain": document.domain,
                "sha256": document.sha256,
                "limit": request.limit,
                "context": context,
                "stride": stride,
            }
            passes = context / stride if context and stride else 1
            yield [Piece(model.identity, NAME, settings, int(passes * count))]


def measure(
    model: EvaluatedModel, session: Session, settings: Settings, request: EvaluationRequest
) -> Result:
    ids = _ids(model, document_of(settings, request), settings["limit"])
    context, stride = settings["context"], settings["stride"]
    result: Result = {"ids": hashlib.sha256(ids.tobytes()).hexdigest()}
    if context is None:
        values = losses(session, ids)
    else:
        bos = np.array(model.bos, np.int64)
        overlapping = (
            _chunks(ids, bos, context) if stride is None else _strides(ids, bos, context, stride)
        )
        values = np.concatenate([losses(session, piece)[first:] for piece, first in overlapping])
        if stride is None:
            return result | block_sums(values, BLOCK)
    assert model.tokenizer is not None
    size = sum(len(model.tokenizer.surface(token)) for token in ids[1:].tolist())
    return result | block_sums(values, BLOCK) | {"bytes": size}


def _ids(model: EvaluatedModel, document: Document, limit: int | None) -> np.ndarray:
    """Returns a bos and the document, at most `limit` tokens, int64."""
    text = document.text if limit is None else document.text[: limit * LONGEST_TOKEN]
    return np.array([*model.bos, *model.encode(text)], np.int64)[:limit]


def _chunks(ids: np.ndarray, bos: np.ndarray, context: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields whole chunks and where their second half begins; the first token becomes a bos."""
    for start in range(0, len(ids) - context + 1, context):
        chunk = ids[start : start + context].copy()
        chunk[: len(bos)] = bos
        yield chunk, context // 2


def _strides(
    ids: np.ndarray, bos: np.ndarray, context: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields pieces of a bos and up to `context - 1` tokens, and where new losses begin."""
    text, counted = ids[len(bos) :], 0
    for start in range(0, len(text), stride):
        stop = min(start + context - len(bos), len(text))
        piece = np.concatenate([bos, text[start:stop]])
        yield piece, max(0, len(piece) - 1 - (stop - counted))
        counted = stop
        if stop == len(text):
            return


def _mode(entry: Settings) -> tuple[Any, ...]:
    return tuple(entry[key] for key in _MODE)


def summary(measured: Measured) -> Result:
    """Returns perplexity and bits per byte by domain and mode, and the loss by position."""
    groups = defaultdict(list)
    for settings, result in measured:
        groups[_mode(settings)].append(result)
    continuous = [result for settings, result in measured if settings["context"] is None]
    return {
        "domains": [
            dict(zip(_MODE, mode, strict=True)) | _perplexity(results)
            for mode, results in groups.items()
        ],
        "by_position": _by_position(continuous),
    }


def _perplexity(results: Sequence[Result]) -> Result:
    sums, counts = joined(results)
    nll = mean(sums, counts)
    size = sum(result.get("bytes", 0) for result in results)
    return {
        "tokens": nll["count"],
        "nll": ends(nll),
        "perplexity": float(np.exp(nll["value"])),
        "bits_per_byte": float(sum(sums) / np.log(2) / size) if size else None,
    }


def _by_position(results: Sequence[Result]) -> list[Result]:
    """Returns the mean loss from each power of two on, counted from the start of a document."""
    buckets: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for result in results:
        for index, block in enumerate(zip(result["sums"], result["counts"], strict=True)):
            buckets[BLOCK * (1 << (index.bit_length() - 1)) if index else 0].append(block)
    return [
        {"from": first, "nll": ends(mean(*zip(*blocks, strict=True)))}
        for first, blocks in sorted(buckets.items())
    ]


def differences(first: Measured, second: Measured) -> Result:
    """Returns the second model's loss minus the first's, of documents with equal token ids."""

    def document(settings: Settings) -> tuple[Any, ...]:
        return settings["document"], settings["sha256"], *_mode(settings)

    others = {document(settings): result for settings, result in second}
    groups = defaultdict(list)
    for settings, one in first:
        counterpart = others.get(document(settings), {})
        if one["ids"] == counterpart.get("ids"):
            groups[_mode(settings)].append((one, counterpart))
    entries = []
    for mode, pairs in groups.items():
        (before, counts), (after, _) = map(joined, zip(*pairs, strict=True))
        gap = mean_difference(before, after, counts)
        entries.append(dict(zip(_MODE, mode, strict=True)) | {"nll": gap})
    return {"domains": entries}


def lost(model: Result) -> list[display.Loss]:
    tokens = {_mode(entry): entry["tokens"] for entry in model["suites"][NAME]["domains"]}
    return [
        display.loss_of(gap["domain"], gap["nll"], tokens[_mode(gap)])
        for gap in display.differences_of(model, NAME, "domains")
        if gap["context"] is None
    ]


def tables(models: display.Models) -> Iterator[Table]:
    groups: dict[Row, list[Row]] = defaultdict(list)
    for model in models:
        gaps = {_mode(gap): gap["nll"] for gap in display.differences_of(model, NAME, "domains")}
        for entry in model["suites"][NAME]["domains"]:
            bits = entry["bits_per_byte"]
            groups[entry["domain"], _mode_name(entry)].append(
                (
                    model["label"],
                    f"{entry['tokens']:,}",
                    f"{entry['perplexity']:.3f}",
                    "" if bits is None else f"{bits:.4f}",
                    display.difference_cell(gaps.get(_mode(entry))),
                    amount(model["bytes"]),
                )
            )
    rows = [(*group, *cells) for group, entries in groups.items() for cells in entries]
    header = ("domain", "read", "model", "tokens", "perplexity", "bits/byte", "more nats", "size")
    title = f"Texts; more nats per token than {models[0]['label']}, with their 95 % interval"
    yield Table(title, header, rows, header[3:])


def _mode_name(entry: Result) -> str:
    if entry["context"] is None:
        return "continuous"
    if entry["stride"] is None:
        return f"chunks of {entry['context']}"
    return f"{entry['context']}, stride {entry['stride']}"


def charts(models: display.Models) -> Iterator[Chart]:
    # The first tokens of a document have no power of two.
    points = [
        [(max(point["from"], 32), point["nll"]) for point in m["suites"][NAME]["by_position"]]
        for m in models
    ]
    summary = "Mean loss of tokens from each power of two on, from the start of a document."
    yield from display.loss_curves(
        "Loss by position", summary, "tokens before", models, points, lost
    )
