"""Trains the demo model from nothing: `python demo/train.py -o DIR`.

Fetches the texts, trains a tokenizer and a RecurrentGemma of 11 M parameters on the CPU until the
minutes are over, and writes a Hugging Face folder with the held-out figures beside it. The model
after the first stage stays in `DIR/texts`; a stage that is done is not done again.
"""

import argparse
import ctypes
import json
import os
import random
from collections.abc import Iterator
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
from data import STAGES, encode
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
        default=(87.0, 85.0),
        help="time to train for, on the texts alone and then with the tasks of memory",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, default=Path("out/demo-cache"), help="downloads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(args.seed)

    corpus = text.build(fetch.fetch(args.cache))
    folders = {"texts": args.output / "texts", "memory": args.output}
    begun = is_done(folders["texts"])
    pieces = (folders["texts"] if begun else args.cache) / "tokenizer.model"
    if not begun:
        tokenizer.train(tokenizer_lines(corpus), Shape().vocab, pieces)
    tokenizer.check(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    documents = encode(processor, corpus.train)
    held_out = encode(processor, corpus.held_out)
    episodes = Episodes(
        pieces.parent, [d for s, own in documents.items() if s != "chat" for d in own]
    )

    model = Griffin(Shape())
    stages: dict[str, dict] = {}
    for (stage, folder), minutes in zip(folders.items(), args.minutes, strict=True):
        if not is_done(folder):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint = folder / "checkpoint.pt"
            trainer = Trainer(model, STAGES[stage], documents, episodes, checkpoint, args.seed)
            stages[stage] = trainer.run(minutes) | {"mixture": STAGES[stage]} | machine()
            export.write(model, pieces, folder)
            bits = evaluate.bits_per_byte(Reference(folder).logits, held_out, corpus.held_out)
            print(stage, bits)
            result = figures(model, documents, corpus, bits, stages)
            write_card(folder / "README.md", result)
            export.write_json(folder / FIGURES, result)
        stages = json.loads((folder / FIGURES).read_text())["stages"]
        export.read(model, folder)


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
    """Lines to learn pieces from: all of the novels, a sample of what there is more of."""
    share = {"chat": 0.4, "bible": 0.3, "speeches": 0.15, "wordnet": 0.15}
    rng = random.Random(0)
    for source, documents in corpus.train.items():
        for line in (line for document in documents for line in document.split("\n")):
            line = line.replace("<start_of_turn>", "").replace("<end_of_turn>", "")
            if line and rng.random() < share.get(source, 1.0):
                yield line


if __name__ == "__main__":
    main()
