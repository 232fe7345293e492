"""The suite `text`: perplexity and bits per byte of texts, as they are read in use and in chunks.

*Continuous* is the way in which the model is used: one pass over a whole document, whose state is
carried on. *Chunks* is what llama-perplexity measures: pieces of `context` tokens, each from the
beginning, of which the second half counts. *Strided* is what a model of limited context is measured
by: pieces that overlap, of which those tokens count that the piece before has not counted.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.evaluate.figures import Difference, mean, mean_difference
from rgexport.evaluate.losses import losses
from rgexport.evaluate.pieces import Piece, Result
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject
from rgexport.files.paths import read_text, without_ending
from rgexport.runtimes.session import Session
from rgexport.validate.text import built_in_text

NAME = "text"
BLOCK = 64
"""Tokens whose losses are kept as one sum: neighbours are alike, so errors are of blocks."""
_ENDINGS = ".txt", ".md", ".rst", ".py", ".json", ".csv", ".html"
_BUILT_IN = "built-in"
LONGEST_TOKEN = 32
"""Characters of a token, at most, when a long text is cut before it is encoded."""


@dataclass(frozen=True)
class Document:
    """A text file of a domain."""

    name: str
    domain: str
    text: str

    @property
    def sha256(self) -> str:
        """Of its bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@cache
def documents(paths: tuple[Path, ...]) -> list[Document]:
    """The files, and the texts of the folders; without any, the text that comes with rgexport.

    They are read once, and each is there once.

    The domain of a file is its name without an ending such as `.txt`; that of a file in a folder is
    the folder below it, such as `prose` of `texts/prose/emma.txt` for `texts`.

    Raises:
        RequestError: a file that is not there or not UTF-8, or a folder without texts.
    """
    if not paths:
        return [Document(_BUILT_IN, _BUILT_IN, built_in_text())]
    return list(dict.fromkeys(document for path in paths for document in _found(path)))


def _found(path: Path) -> Iterator[Document]:
    if not path.is_dir():
        domain = without_ending(path.name, _ENDINGS)
        yield Document(path.name, domain, read_text(path))
        return
    files = sorted(file for file in path.rglob("*") if file.suffix in _ENDINGS and file.is_file())
    if not files:
        raise RequestError(f"{path} has no texts; expected files that end in {', '.join(_ENDINGS)}")
    for file in files:
        parts = file.relative_to(path).parts
        domain = parts[0] if len(parts) > 1 else path.resolve().name
        yield Document("/".join(parts), domain, read_text(file))


def pieces(subject: Subject, request: Request) -> Iterator[Piece]:
    """A piece for each document and each way to read it."""
    subject.require_tokenizer(NAME)
    for document in documents(request.texts):
        ids = _ids(subject, document, request.limit)
        if len(ids) < 2:
            raise RequestError(f"{document.name} is too short; expected a text of 2 tokens or more")
        for context, stride in _ways(request):
            if stride is None and context is not None and len(ids) < context:
                continue
            work = {
                "document": document.name,
                "domain": document.domain,
                "sha256": document.sha256,
                "limit": request.limit,
                "context": context,
                "stride": stride,
            }
            times = context / stride if context and stride else 1
            yield Piece(subject.identity, NAME, work, int(times * len(ids)))


def _ways(request: Request) -> list[tuple[int | None, int | None]]:
    """Context and stride: none of both for continuous, only a context for chunks."""
    strided = [] if request.stride is None else [(request.context, request.stride)]
    return [(None, None), (request.context, None), *strided]


def measure(
    subject: Subject, session: Session, work: Mapping[str, Any], request: Request
) -> Result:
    """The losses of a document, in sums of blocks: of `context` tokens each, or of all in one."""
    document = the_document(work, request)
    ids = _ids(subject, document, work["limit"])
    found = {"ids": hashlib.sha256(ids.tobytes()).hexdigest()}
    if work["context"] is None:
        each = losses(session, ids)
        return found | _summed(each) | {"bytes": _bytes(subject, ids[1:])}
    if work["stride"] is not None:
        each = _strided_losses(subject, session, ids, work["context"], work["stride"])
        return found | _summed(each) | {"bytes": _bytes(subject, ids[1:])}
    return found | _summed(_chunk_losses(subject, session, ids, work["context"]))


def the_document(work: Mapping[str, Any], request: Request) -> Document:
    """The document of a piece.

    Raises:
        RequestError: it is not there, or not any more.
    """
    for document in documents(request.texts):
        if document.sha256 == work["sha256"]:
            return document
    raise RequestError(f"the text {work['document']} has changed, or a worker has another one")


def _bytes(subject: Subject, ids: np.ndarray) -> int:
    assert subject.tokenizer is not None
    return sum(len(subject.tokenizer.surface(token)) for token in ids.tolist())


def _ids(subject: Subject, document: Document, limit: int | None) -> np.ndarray:
    """A bos and the document, at most `limit` tokens, int64."""
    text = document.text if limit is None else document.text[: limit * LONGEST_TOKEN]
    return np.array([*subject.bos, *subject.encode(text)], np.int64)[:limit]


def _chunk_losses(subject: Subject, session: Session, ids: np.ndarray, context: int) -> np.ndarray:
    """Of the second halves of whole chunks, whose first token becomes a bos."""
    found = []
    for start in range(0, len(ids) - context + 1, context):
        chunk = ids[start : start + context].copy()
        chunk[: len(subject.bos)] = subject.bos
        found.append(losses(session, chunk)[context // 2 :])
    return np.concatenate(found)


def _strided_losses(
    subject: Subject, session: Session, ids: np.ndarray, context: int, stride: int
) -> np.ndarray:
    """Of all tokens but the first; each piece begins with a bos, which is one of its tokens."""
    bos = np.array(subject.bos, np.int64)
    text, found, counted = ids[len(bos) :], [], 0
    room = context - len(bos)
    for start in range(0, len(text), stride):
        stop = min(start + room, len(text))
        each = losses(session, np.concatenate([bos, text[start:stop]]))
        new = stop - counted
        found.append(each[max(0, len(each) - new) :])
        counted = stop
        if stop == len(text):
            break
    return np.concatenate(found)


def _summed(each: np.ndarray) -> Result:
    starts = np.arange(0, len(each), BLOCK)
    counts = np.diff([*starts, len(each)])
    return {"sums": np.add.reduceat(each, starts).tolist(), "counts": counts.tolist()}


def summary(found: Sequence[tuple[Mapping[str, Any], Result]]) -> Result:
    """By domain and way of reading: perplexity, bits per byte, and the curve by position."""
    groups = defaultdict(list)
    for work, result in found:
        groups[work["domain"], work["context"], work["stride"]].append(result)
    return {
        "domains": [
            {"domain": domain, "context": context, "stride": stride} | _of_documents(results)
            for (domain, context, stride), results in groups.items()
        ],
        "by_position": _by_position([r for work, r in found if work["context"] is None]),
    }


def differences(
    first: Sequence[tuple[Mapping[str, Any], Result]],
    second: Sequence[tuple[Mapping[str, Any], Result]],
) -> Result:
    """What a second model's loss is above the first's on the same tokens, by domain, in nats.

    Documents that the two read as other tokens are left out.
    """
    groups = defaultdict(list)
    others = {_place(work): result for work, result in second}
    for work, one in first:
        other = others.get(_place(work), {})
        if one["ids"] == other.get("ids"):
            groups[work["domain"], work["context"], work["stride"]].append((one, other))
    return {
        "domains": [
            {"domain": domain, "context": context, "stride": stride}
            | {"nll": asdict(_difference(pairs))}
            for (domain, context, stride), pairs in groups.items()
        ]
    }


def _place(work: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(work[key] for key in ("document", "domain", "sha256", "context", "stride"))


def _difference(pairs: Sequence[tuple[Result, Result]]) -> Difference:
    before, after = ([x for pair in pairs for x in pair[side]["sums"]] for side in (0, 1))
    return mean_difference(before, after, [x for one, _ in pairs for x in one["counts"]])


def _of_documents(results: Sequence[Result]) -> Result:
    sums = [value for result in results for value in result["sums"]]
    counts = [value for result in results for value in result["counts"]]
    nll = mean(sums, counts)
    size = sum(result.get("bytes", 0) for result in results)
    return {
        "tokens": nll.count,
        "nll": [nll.value, nll.low, nll.high],
        "perplexity": float(np.exp(nll.value)),
        "bits_per_byte": float(sum(sums) / np.log(2) / size) if size else None,
    }


def _by_position(results: Sequence[Result]) -> list[Result]:
    """The mean loss from each power of two on, counted from the start of a document."""
    sums: dict[int, list[float]] = defaultdict(list)
    counts: dict[int, list[int]] = defaultdict(list)
    for result in results:
        for index, (value, count) in enumerate(zip(result["sums"], result["counts"], strict=True)):
            bucket = BLOCK * (1 << (index.bit_length() - 1)) if index else 0
            sums[bucket].append(value)
            counts[bucket].append(count)
    curve = []
    for bucket in sorted(sums):
        found = mean(sums[bucket], counts[bucket])
        curve.append({"from": bucket, "nll": [found.value, found.low, found.high]})
    return curve
