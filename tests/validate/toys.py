"""A recurrent toy model, as a session and as a reference, and a tokenizer of characters."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from rgexport.artifacts.manifest import IoRecord, Manifest, Source
from rgexport.chat.tokenizer import Tokenizer
from rgexport.griffin.state import POSITION, State
from rgexport.griffin.tensor import WeightSource
from rgexport.quantize.plan import make_plan
from rgexport.quantize.schemes.registry import Float
from rgexport.runtimes.session import SessionInfo
from rgexport.validate.metrics import checkpoints
from rgexport.validate.reference_pass import Pass

VOCAB, WIDTH = 23, 8
MEMORY = "layers.0.rg_lru"
FLOAT32 = Float("float32")
Fault = Callable[["ToySession", np.ndarray], np.ndarray]


class ToyReference:
    """h_t = 0.7 h_{t-1} + E[token]; logits = h · H."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.embedding = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
        self.head = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)

    def hidden(self, tokens: np.ndarray, h: np.ndarray) -> np.ndarray:
        """Tokens [B, T] after the state h [B, W] → [B, T, W]."""
        found = []
        for token in tokens.T:
            h = np.float32(0.7) * h + self.embedding[token]
            found.append(h)
        return np.stack(found, 1)

    def run(self, tokens: np.ndarray, state: State | None = None) -> tuple[np.ndarray, State]:
        """One pass from the beginning, or from a state."""
        state = state or {MEMORY: np.zeros((1, WIDTH), np.float32), POSITION: np.zeros(1, np.int64)}
        hidden = self.hidden(tokens, state[MEMORY])
        return hidden, {MEMORY: hidden[:, -1], POSITION: state[POSITION] + tokens.shape[1]}

    def logits(self, hidden) -> np.ndarray:
        return hidden @ self.head


class ToySession(ToyReference):
    """The toy as a session; `fault(session, logits)` may spoil both."""

    vocab_size = VOCAB
    info = SessionInfo("toy", "1", 1, "float32", 1, 1, prefill_chunk=64)

    def __init__(self, seed: int = 0, fault: Fault | None = None) -> None:
        super().__init__(seed)
        self.fault = fault
        self.chunks: list[int] = []
        self.reset()

    def reset(self, batch: int = 1) -> None:
        self.h, self.position = np.zeros((batch, WIDTH), np.float32), np.zeros(batch, np.int64)

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        self.chunks.append(tokens.shape[1])
        self.h[self.position == 0] = 0
        hidden = self.hidden(tokens, self.h)
        self.h, self.position = hidden[:, -1].copy(), self.position + tokens.shape[1]
        logits = self.logits(hidden[:, -num_logits:])
        return logits if self.fault is None else self.fault(self, logits)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self.prefill(tokens[:, None])[:, 0]

    def prefill_at_once(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        return self.prefill(tokens, num_logits)

    def get_state(self) -> State:
        return {MEMORY: self.h.copy(), POSITION: self.position.copy()}

    def set_state(self, state: State) -> None:
        self.h, self.position = state[MEMORY].copy(), state[POSITION].copy()


class WholeChunksSession(ToySession):
    """A session with one program for a token and one for 64 tokens, which may be wrong.

    `chunk_fault` spoils what that one gives; `chunk_logits` as in `SessionInfo`.
    """

    def __init__(self, *, chunk_logits: bool, chunk_fault: Fault | None = None) -> None:
        super().__init__()
        changes = {"chunk_logits": chunk_logits, "whole_chunks": True}
        self.info = dataclasses.replace(ToySession.info, **changes)
        self.chunk_fault = chunk_fault

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes whole chunks where they give all logits that are wanted, and single tokens."""
        size, count = self.info.prefill_chunk, tokens.shape[1]
        alone = 0 if self.info.chunk_logits else num_logits - 1
        found = []
        start = 0
        while start < count:
            whole = start + size <= count - alone
            stop = start + (size if whole else 1)
            self.fault = self.chunk_fault if whole else None
            logits = super().prefill(tokens[:, start:stop], stop - start)
            found.append(logits if self.info.chunk_logits else logits[:, -1:])
            start = stop
        return np.concatenate(found, 1)[:, -num_logits:]


def counted(weights: WeightSource, reads: list[str]) -> WeightSource:
    """The same weights; each read appends the tensor's name to `reads`."""

    def read(name: str, start: int, stop: int) -> np.ndarray:
        reads.append(name)
        return weights[name].read(start, stop)

    return {n: dataclasses.replace(one, read=partial(read, n)) for n, one in weights.items()}


def manifest_of(config, scheme=FLOAT32, compute="fp32") -> Manifest:
    """The manifest of an artifact without files."""
    known = {"name": "toy", "source": Source("toy", "toy", {}), "precision": "toy", "exact": False}
    empty = {"states": (), "io": IoRecord((), ()), "tensors": {}, "files": {}, "created_with": {}}
    known |= {"config": config, "plan": make_plan(config, scheme, scheme), "compute": compute}
    return Manifest(instruction_tuned=None, **known, **empty)


def toy_pass(tokens: np.ndarray, seed: int = 0) -> Pass:
    reference = ToyReference(seed)
    drift = {n: reference.run(tokens[None, :n])[1] for n in checkpoints(len(tokens))}
    return Pass(reference, *reference.run(tokens[None]), drift, {})


def character_tokenizer(bos_id: int | None = 0) -> Tokenizer:
    """One id per character, from 1 on, modulo 20."""

    def encode(text: str) -> list[int]:
        return [1 + ord(c) % 20 for c in text]

    return Tokenizer(VOCAB, {}, bos_id, None, encode, lambda token: b"")
