"""Small SentencePiece models whose control tokens differ from Gemma's."""

import io
from pathlib import Path
from typing import Any

import sentencepiece

SIZE = 400
TURNS = ["<start_of_turn>", "<end_of_turn>"]
_WORDS = "the user said hello to a model that turns text into tokens; it is 42 of them".split()
_PLAIN = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}
_NAMES = {f"{name}_piece": f"[{name.upper()}]" for name in ("bos", "eos", "unk", "pad")}
_IDS = {"pad_id": 0, "unk_id": 5, "eos_id": 6, "bos_id": 7}

ODD_VOCABULARIES: dict[str, dict[str, Any]] = {
    "default names": {"user_defined_symbols": TURNS},
    "brackets": {"user_defined_symbols": TURNS, **_NAMES, **_IDS},
    "no beginning": {"user_defined_symbols": TURNS, "bos_id": -1},
    "no end": {"user_defined_symbols": TURNS, "eos_id": -1},
    "no turns": {},
}
"""Options of the trainer."""


def write_vocabulary(folder: Path, **options: Any) -> Path:
    """Trains a BPE model with byte fallback; writes tokenizer.model, and returns the folder."""
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": SIZE, "byte_fallback": True} | _PLAIN | options
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=(f"{a} {b} {a}s" for a in _WORDS for b in _WORDS),
        model_writer=model,
        minloglevel=2,
        **settings,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder
