"""Tokenizers in Gemma's layout, made here, and a toy engine behind the Session interface."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers

from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import SessionInfo
from rgexport.runtimes.template import GEMMA_TEMPLATE, ChatTemplate
from rgexport.runtimes.tokenizer import Tokenizer, load_tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "model"
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
MARKERS = ("<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99)))
TURNS = ("<start_of_turn>", "<end_of_turn>")  # 106 and 107
TEXTUAL = (*("\n" * n for n in range(1, 8)), *("▁" * n for n in range(2, 8)), "<table>", "</b>")


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SentencePiece model whose special ids are Gemma's."""
    model = io.BytesIO()
    words = "the user said hello to a model that turns text into tokens; it is 42 of them".split()
    control: dict[str, Any] = {f"{piece[1:-1]}_id": i for i, piece in enumerate(CONTROL)}
    control |= {f"{piece[1:-1]}_piece": piece for piece in CONTROL}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=(f"{a} {b} {a}s" for a in words for b in words),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        user_defined_symbols=[*MARKERS, *TURNS, *TEXTUAL],
        **control,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def json_folder(sentencepiece_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as a tokenizer.json, converted as Hugging Face does."""
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )
    vocab = {model.IdToPiece(i): i for i in range(model.GetPieceSize())}
    merges = [
        (-model.GetScore(i), piece[:cut], piece[cut:])
        for piece, i in vocab.items()
        for cut in range(1, len(piece))
        if i >= model.PieceToId("<0xFF>") and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    bpe = tokenizers.models.BPE(
        vocab, [(a, b) for _, a, b in sorted(merges)], byte_fallback=True, unk_token="<unk>"
    )
    engine = tokenizers.Tokenizer(bpe)
    engine.normalizer = normalizers.Replace(" ", "▁")
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    engine.add_special_tokens([*CONTROL, *TURNS])
    engine.add_tokens([tokenizers.AddedToken(p, normalized=False) for p in (*MARKERS, *TEXTUAL)])
    folder = tmp_path_factory.mktemp("json")
    engine.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session", params=["sentencepiece", "json", "demo"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each kind of tokenizer folder in turn."""
    if request.param != "demo":
        found: Path = request.getfixturevalue(f"{request.param}_folder")
        return found
    if not (DEMO / "tokenizer.model").is_file():
        pytest.skip("the demo model is not there")
    return DEMO


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def gemma(sentencepiece_folder: Path) -> Tokenizer:
    """The SentencePiece tokenizer, where the kind makes no difference."""
    return load_tokenizer(sentencepiece_folder)


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    """Gemma's chat template."""
    return ChatTemplate(GEMMA_TEMPLATE, "built-in")


class ToySession:
    """A recurrence h = tanh(M·h + E[token]) whose state tells any two sequences apart.

    It continues with the tokens of `script` as long as there are some, then as it likes; it
    raises `failure` instead of its `failing_step`-th step.
    """

    def __init__(self, vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        self._embedding = rng.standard_normal((vocab_size, 8))
        self._mix = rng.standard_normal((8, 8)) / 3
        self.vocab_size = vocab_size
        self.info = SessionInfo("toy", "1", 1, "float32", 0, 0, 64)
        self.script: list[int] = []
        self.fed = 0
        self.failure: BaseException | None = None
        self.failing_step = 0
        self.reset()

    @property
    def position(self) -> np.ndarray:
        return self._position.copy()

    def reset(self, batch: int = 1) -> None:
        self._hidden = np.zeros((batch, 8))
        self._position = np.zeros(batch, np.int64)

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        assert num_logits == 1
        for column in tokens.T:
            self._take(column)
        return self._logits()[:, None]

    def step(self, tokens: np.ndarray) -> np.ndarray:
        self.failing_step -= 1
        self._hidden += 1e-3 if self.failure else 0  # a step that fails leaves a mess
        if self.failure and self.failing_step == 0:
            raise self.failure
        self._take(tokens)
        return self._logits()

    def get_state(self) -> State:
        return {"layers.0.rg_lru": self._hidden.copy(), POSITION: self._position.copy()}

    def set_state(self, state: State) -> None:
        self._hidden = state["layers.0.rg_lru"].copy()
        self._position = state[POSITION].copy()

    def _take(self, tokens: np.ndarray) -> None:
        self._hidden = np.tanh(self._hidden @ self._mix + self._embedding[tokens])
        self._position = self._position + 1
        self.fed += 1

    def _logits(self) -> np.ndarray:
        if self.script:
            return np.eye(self.vocab_size, dtype=np.float32)[[self.script.pop(0)]]
        return (self._hidden @ self._embedding.T).astype(np.float32)


@pytest.fixture(scope="session")
def make_session() -> Callable[[int], ToySession]:
    """Makes a toy session of a vocabulary size."""
    return ToySession
