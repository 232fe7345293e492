"""Trains the demo model from nothing: `python demo/train.py -o DIR`.

Fetches the texts, trains a tokenizer and a RecurrentGemma of 11 M parameters on the CPU until the
minutes are over, and writes a Hugging Face folder with the held-out figures beside it. What stages
before the last made stays in folders of their names there. A stage that is done is not done again.
"""

import argparse
import ctypes
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# One thread for each piece of a batch and none within: no barrier ever waits for a busy core.
os.environ["OMP_NUM_THREADS"] = "1"

import evaluate
import export
import fetch
import sentencepiece
import text
import tokenizer
import torch
from card import FIGURES, figures, machine, write_card
from data import STAGES, Documents, encode
from episodes import Episodes
from model import Griffin, Shape
from reference import Reference
from trainer import Trainer


def main() -> None:
    """Everything, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        nargs=len(STAGES),
        metavar=tuple(stage.upper() for stage in STAGES),
        default=[stage.minutes for stage in STAGES.values()],
        help="time to train for in each stage",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, default=Path("out/demo-cache"), help="downloads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(args.seed)

    *before, last = STAGES
    folders = {stage: args.output / stage for stage in before} | {last: args.output}
    material = prepare(args.cache, folders[before[0]])
    model = Griffin(Shape())
    stages: dict[str, dict] = {}
    for number, (name, folder) in enumerate(folders.items()):
        if not is_done(folder):
            learn(model, name, args.minutes[number], (args.seed, number), material, stages, folder)
        stages = json.loads((folder / FIGURES).read_text())["stages"]
        export.read(model, folder)


@dataclass(frozen=True)
class Material:
    """What all stages learn from, and are measured on."""

    corpus: text.Corpus
    tokenizer: Path
    documents: Documents
    held_out: Documents
    episodes: Episodes


def prepare(cache: Path, first: Path) -> Material:
    """Fetches and encodes the texts; the tokenizer is that of the first stage, if it is done."""
    corpus = text.build(fetch.fetch(cache))
    pieces = (first if is_done(first) else cache) / "tokenizer.model"
    if not is_done(first):
        tokenizer.train(tokenizer_lines(corpus), Shape().vocab, pieces)
    tokenizer.check(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    documents, held_out = (encode(processor, texts) for texts in (corpus.train, corpus.held_out))
    prose = [d for source, own in documents.items() if source != "chat" for d in own]
    return Material(corpus, pieces, documents, held_out, Episodes(pieces.parent, prose))


def learn(
    model: Griffin,
    name: str,
    minutes: float,
    seed: Sequence[int],
    material: Material,
    before: dict[str, dict],
    folder: Path,
) -> None:
    """One stage; `before` are the runs of those before it."""
    folder.mkdir(parents=True, exist_ok=True)
    stage, documents, checkpoint = STAGES[name], material.documents, folder / "checkpoint.pt"
    trainer = Trainer(model, stage, documents, material.episodes, checkpoint, seed)
    run = trainer.run(minutes) | {"mixture": stage.mixture, "rate": stage.rate} | machine()
    export.write(model, material.tokenizer, folder)
    corpus = material.corpus
    logits = Reference(folder).logits
    bits = evaluate.bits_per_byte(logits, material.held_out, corpus.held_out)
    print(name, bits)
    result = figures(model, documents, corpus, bits, before | {name: run})
    write_card(folder / "README.md", result)
    export.write_json(folder / FIGURES, result)


def is_done(folder: Path) -> bool:
    """Whether a stage has ended there: its figures come last."""
    return (folder / FIGURES).exists()


def keep_memory() -> None:
    """Has glibc keep freed memory: fresh pages for each large tensor would double a step's time."""
    arena_max, mmap_max, top_pad, trim_threshold = -8, -4, -2, -1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(top_pad, 256 << 20)
        libc.mallopt(trim_threshold, 2**31 - 1)


def tokenizer_lines(corpus: text.Corpus) -> Iterator[str]:
    """Yields lines to learn pieces from: all of the novels, a share of each larger source."""
    share = {"chat": 0.4, "bible": 0.3, "speeches": 0.15, "wordnet": 0.15}
    rng = random.Random(0)
    for source, documents in corpus.train.items():
        for line in (line for document in documents for line in document.split("\n")):
            line = line.replace("<start_of_turn>", "").replace("<end_of_turn>", "")
            if line and rng.random() < share.get(source, 1.0):
                yield line


if __name__ == "__main__":
    main()
