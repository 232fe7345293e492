"""Trains the demo model from nothing: `python demo/train.py --minutes 85 -o DIR`.

Fetches the texts, trains a tokenizer and a RecurrentGemma of 11 M parameters on the CPU until the
minutes are over, and writes a Hugging Face folder with the held-out figures beside it.
"""

import argparse
import ctypes
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
from card import figures, write_card
from data import encode
from episodes import Episodes
from model import Griffin, Shape
from reference import Reference
from trainer import Trainer


def main() -> None:
    """Everything, in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=85.0, help="time to train for")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, default=Path("out/demo-cache"), help="downloads")
    parser.add_argument("--start", type=Path, help="model folder to go on from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    corpus = text.build(fetch.fetch(args.cache))
    pieces = (args.start or args.cache) / "tokenizer.model"
    if args.start is None:
        tokenizer.train(tokenizer_lines(corpus), Shape().vocab, pieces)
    tokenizer.check(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    documents = encode(processor, corpus.train)

    model = Griffin(Shape())
    if args.start is not None:
        export.read(model, args.start)
    prose = [d for source, own in documents.items() if source != "chat" for d in own]
    episodes = Episodes(pieces.parent, prose)
    checkpoint = args.output / "checkpoint.pt"
    run = Trainer(model, documents, episodes, checkpoint, args.seed).run(args.minutes)
    export.write(model, pieces, args.output)
    held_out = encode(processor, corpus.held_out)
    bits = evaluate.bits_per_byte(Reference(args.output).logits, held_out, corpus.held_out)
    result = figures(model, documents, corpus, bits, run)
    export.write_json(args.output / "figures.json", result)
    write_card(args.output / "README.md", result)
    print(bits)


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
