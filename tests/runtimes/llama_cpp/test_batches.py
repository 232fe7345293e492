"""The port under llama.cpp's own interface: uses that our sessions do not make of it."""

import ctypes

import numpy as np
import pytest

from rgexport.runtimes.llama_cpp.library import Handle, bindings, load_model
from tests.artifacts import export_random_gguf
from tests.deepmind import deepmind_logits, deepmind_model
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS
from tests.sessions import distance

pytestmark = needs_llama_cpp

TOLERANCE = 1e-4


class Context:
    """A context that takes tokens of any sequences in any order, all logits wanted."""

    def __init__(self, path, **parameters):
        self.llama = bindings()
        self.model = load_model(path)
        values = self.llama.llama_context_default_params()
        asked = {"n_ctx": 2048, "n_seq_max": 2, "n_ubatch": 16, "n_threads": 1} | parameters
        asked |= {"n_threads_batch": 1, "flash_attn_type": 0, "type_k": 0, "type_v": 0}
        for name, value in asked.items():
            setattr(values, name, value)
        pointer = self.llama.llama_init_from_model(self.model.pointer, values)
        self.context = Handle(pointer, self.llama.llama_free, keep=self.model)
        self.pointer = pointer
        self.memory = self.llama.llama_get_memory(pointer)
        vocabulary = self.llama.llama_model_get_vocab(self.model.pointer)
        self.vocab_size = self.llama.llama_vocab_n_tokens(vocabulary)

    def decode(self, tokens):
        """Logits [n, vocab] after tokens, each of a sequence, a position and an id."""
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        for i, (sequence, position, token) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, 1
        batch.n_tokens = len(tokens)
        assert self.llama.llama_decode(self.pointer, batch) == 0
        self.llama.llama_batch_free(batch)
        logits = self.llama.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(logits, (len(tokens), self.vocab_size)).copy()

    def read(self, ids, sequence=0, start=0):
        """Takes ids [n] of one sequence from position `start` on."""
        return self.decode([(sequence, start + i, int(t)) for i, t in enumerate(ids)])


def prepared(name, folder, length):
    """The file, tokens [2, length], and DeepMind's logits of any tokens."""
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_gguf(config, folder)
    tokens = np.random.default_rng(11).integers(0, config.vocab_size, (2, length))
    model = deepmind_model(config, weights)
    return artifact.path, tokens, lambda ids: deepmind_logits(model, ids)


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
@pytest.mark.parametrize("name", ["irregular", "hawk"])
def test_sequences_of_unequal_pace(name, unified, tmp_path):
    path, tokens, deepmind = prepared(name, tmp_path, 80)
    context = Context(path, kv_unified=unified)
    chosen, at = np.random.default_rng(1), [0, 0]
    logits = [[], []]
    while at != [80, 80]:
        batch = []
        for sequence in (1, 0):
            stop = min(80, at[sequence] + int(chosen.integers(0, 9)))
            steps = range(at[sequence], stop)
            batch += [(sequence, i, int(tokens[sequence, i])) for i in steps]
            at[sequence] = stop
        rows = context.decode(batch) if batch else ()
        for (sequence, _, _), row in zip(batch, rows, strict=True):
            logits[sequence].append(row)
    assert distance(np.array(logits), deepmind(tokens)) <= TOLERANCE


@pytest.mark.parametrize("name", ["irregular", "hawk"])
def test_a_sequence_is_forked_and_begun_anew(name, tmp_path):
    path, tokens, deepmind = prepared(name, tmp_path, 60)
    forked = np.stack([tokens[0], np.concatenate([tokens[0, :40], tokens[1, 40:]])])
    expected = deepmind(forked)
    context = Context(path, kv_unified=True)
    context.read(tokens[1, :30], sequence=1)
    context.read(forked[0, :40])
    context.llama.llama_memory_seq_rm(context.memory, 1, -1, -1)
    context.llama.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
    for sequence in (1, 0):
        rest = context.read(forked[sequence, 40:], sequence, 40)
        assert distance(rest, expected[sequence, 40:]) <= TOLERANCE
    context.llama.llama_memory_seq_rm(context.memory, 0, -1, -1)
    assert distance(context.read(tokens[0]), expected[0]) <= TOLERANCE


@pytest.mark.parametrize("back", [1, 3])
@pytest.mark.parametrize("name", ["irregular", "hawk"])
def test_last_tokens_are_taken_back(name, back, tmp_path):
    """As speculative decoding does with what was rejected; the slots hold three tokens."""
    path, tokens, deepmind = prepared(name, tmp_path, 70)
    other = np.stack([tokens[0], np.concatenate([tokens[0, : 50 - back], tokens[1, : 20 + back]])])
    expected = deepmind(other)
    context = Context(path, n_rs_seq=3)
    context.read(tokens[0, :44])
    context.read(tokens[0, 44:50], start=44)
    assert context.llama.llama_memory_seq_rm(context.memory, 0, 50 - back, -1)
    rest = context.read(other[1, 50 - back :], start=50 - back)
    assert distance(rest, expected[1, 50 - back :]) <= TOLERANCE


@pytest.mark.parametrize("name", ["irregular", "hawk", "attention_only"])
def test_a_file_of_the_whole_state(name, tmp_path):
    """`llama_state_save_file` and `llama_state_load_file`, into a context of its own."""
    path, tokens, deepmind = prepared(name, tmp_path, 70)
    expected = deepmind(tokens)
    context, other = Context(path), Context(path)
    for sequence in (0, 1):
        context.read(tokens[sequence, :45], sequence)
    file = str(tmp_path / "state.bin").encode()
    seen = (ctypes.c_int32 * 45)(*tokens[0, :45].tolist())
    assert context.llama.llama_state_save_file(context.pointer, file, seen, 45)
    read, count = (ctypes.c_int32 * 45)(), ctypes.c_size_t()
    assert other.llama.llama_state_load_file(other.pointer, file, read, 45, ctypes.byref(count))
    assert list(read) == list(seen)
    for sequence in (0, 1):
        for each in (context, other):
            rest = each.read(tokens[sequence, 45:], sequence, 45)
            assert distance(rest, expected[sequence, 45:]) <= TOLERANCE
