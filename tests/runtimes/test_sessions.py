"""Sessions of every engine, against DeepMind's implementation and each other."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.export.onnx.profiles import PROFILES
from rgexport.griffin.state import POSITION
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.llama_cpp import session as llama_cpp_session
from rgexport.runtimes.onnx import session as onnx_session
from tests import artifacts
from tests.deepmind import deepmind_logits, deepmind_model, deepmind_step
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS, make_config
from tests.row_groups import split_plan
from tests.sessions import check_refusals, distance, ragged, random_tokens

EXPORTS = {
    "onnx": artifacts.export_random,
    "coreml": artifacts.export_random_coreml,
    "gguf": artifacts.export_random_gguf,
}
"""Kind of artifact → what exports a random model; Core ML's interpreter runs everywhere."""


def engine(kind, *values):
    """Returns a parameter set of pytest that begins with a kind of artifact."""
    marks = [needs_llama_cpp] if kind == "gguf" else []
    words = (value for value in (kind, *values) if isinstance(value, str))
    return pytest.param(kind, *values, marks=marks, id="-".join(words))


ENGINES = [engine(kind) for kind in EXPORTS]

FP32 = {"onnx": 1e-4, "coreml": 2e-5, "gguf": 1e-4}
"""Largest |Δlogit| allowed, as a share of the largest |logit|."""
CONTINUED = {"onnx": 1e-6, "coreml": 2e-5, "gguf": 1e-5}
"""The same between a text that is read at once and one that another session continues."""
FP16 = {"onnx": 2e-2, "coreml": 3e-2}  # the same in float16
TWO_DIGITS = 6e-4
"""The same with two digits of int8 for activations: a unit is 1 / 64,516 of a row's largest."""
FAR = {"onnx": 1e-4, "coreml": 2e-5, "gguf": 1e-2}
"""llama.cpp multiplies up the angles of a key's pairs in float32, for all of ggml's models."""
ROWS = {"onnx": 1e-4, "coreml": 2e-2, "gguf": 1e-4}  # the same of rows that come and go
HALF = {"precision": "fp16"}
WEBGPU = {"profile": "webgpu"}  # slots of rings and masks come from float32 positions there
BY_CHUNK = {"prefill_length": 7, "all_logits": True}
EXACT = {"compute": "fp32", "prefill_length": 5, "all_logits": True}
LONGER_THAN_WINDOW = {"prefill_length": 40, "all_logits": True, "recurrent_state": "hilo"}
EVERY = [
    *(engine(kind, name, {}) for kind in ("onnx", "gguf") for name in ODD_CONFIGS),
    *(engine("coreml", name, BY_CHUNK) for name in ("wide_lru", "not_by_32", "hawk", "irregular")),
    *(engine("coreml", name, LONGER_THAN_WINDOW) for name in ("one_head", "attention_tail")),
    *(engine("onnx", name, HALF) for name in ("narrow_lru", "attention_tail")),
    *(engine("coreml", name, HALF | BY_CHUNK) for name in ("narrow_lru", "attention_tail")),
    *(
        engine("onnx", name, {"profile": profile, "precision": precision})
        for profile in ("wasm", "webgpu")
        for precision in ("fp32", "int4", "int8")
        for name in ("not_by_32", "attention_tail")
    ),
    engine("coreml", "narrow_lru", EXACT | {"precision": "int8", "symmetric": False}),
    engine("coreml", "narrow_lru", EXACT | {"precision": "int4", "embedding_precision": "pal4"}),
]
TRAVELERS = [
    *(engine(kind, {}) for kind in EXPORTS),
    engine("coreml", {"prefill_length": 8, "recurrent_state": "hilo"}),
]


def opened(kind, config, folder, **options):
    """On one thread: small models take longer on several, most of all on a busy machine."""
    artifact, weights = EXPORTS[kind](config, folder, **options)
    return open_session(artifact, threads=1), weights


@pytest.mark.parametrize(("kind", "name", "options"), EVERY)
def test_equals_deepmind(kind, name, options, tmp_path):
    """In one go, in chunks that end anywhere, and step by step; a batch, and one.

    DeepMind's model has the weights that an artifact stores where those are integers.
    """
    config, precision = ODD_CONFIGS[name], options.get("precision", "fp32")
    artifact, weights = EXPORTS[kind](config, tmp_path, **options)
    session = open_session(artifact, threads=1)
    if precision.startswith("int"):
        weights = {name: tensor.whole() for name, tensor in artifact.weights.items()}
    tokens = random_tokens(config, 3, 3 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    limit = (FP16 if precision == "fp16" else FP32)[kind]
    if precision == "int8" and artifact.manifest.rounds_activations:
        limit = TWO_DIGITS
    for batch, sizes in ((1, [tokens.shape[1]]), (3, [7, 1, config.window + 1])):
        session.reset(batch)
        assert distance(ragged(session, tokens[:batch], sizes), expected[:batch]) <= limit
        assert session.position.tolist() == [tokens.shape[1]] * batch
    batch = 1 if kind == "coreml" else 3
    session.reset(batch)
    steps = np.stack([session.step(column) for column in tokens[:batch].T], 1)
    assert distance(steps, expected[:batch]) <= limit


@pytest.mark.parametrize("start", [0, 9, 53])
@pytest.mark.parametrize("name", ["irregular", "hawk", "attention_only"])
@pytest.mark.parametrize("other", ENGINES)
@pytest.mark.parametrize(("kind", "options"), TRAVELERS)
def test_a_state_travels(kind, options, other, name, start, tmp_path):
    """What one session has read, another continues; in the same engine, to the last bit."""
    config = ODD_CONFIGS[name]
    here, weights = opened(kind, config, tmp_path, **options)
    there, _ = opened(other, config, tmp_path, **(options if kind == other else {}))
    tokens, limit = random_tokens(config, 3, 70), max(FP32[kind], FP32[other])
    expected = deepmind_logits(deepmind_model(config, weights), tokens)[:, start:]
    here.reset(3)
    whole = here.prefill(tokens, 70)[:, start:]
    here.reset(3)
    if start:
        here.prefill(tokens[:, :start])
    state = here.get_state()
    there.set_state(state)
    assert there.position.tolist() == [start] * 3
    continued = there.prefill(tokens[:, start:], 70 - start)
    assert distance(continued, expected) <= limit
    if kind == other:
        assert distance(continued, whole) <= CONTINUED[kind]
        there.set_state(state)
        again = there.get_state()
        assert all(np.array_equal(again[name], array) for name, array in state.items())
        np.testing.assert_array_equal(here.prefill(tokens[:, start:], 70 - start), continued)
    there.set_state({name: array[1:2] for name, array in state.items()})
    assert distance(there.step(tokens[1:2, start]), expected[1:2, 0]) <= limit
    np.testing.assert_array_equal(state[POSITION], [start] * 3)


@pytest.mark.parametrize("head_dim", [8, 256])
@pytest.mark.parametrize(
    ("kind", "options"), [*(engine(kind, {}) for kind in EXPORTS), engine("onnx", WEBGPU)]
)
def test_far_positions(kind, options, head_dim, tmp_path):
    """256 is the head of the released models, with 64 frequencies to be rounded right."""
    config = make_config("raar", width=2 * head_dim, heads=2, window=24)
    session, weights = opened(kind, config, tmp_path, **options)
    session.reset(2)
    tokens = random_tokens(config, 2, config.window + 30)
    # A ring buffer would be entered at another slot: DeepMind's starts at the oldest key.
    session.prefill(tokens[:, :-1])
    state = session.get_state() | {POSITION: np.array([(1 << 20) + 17, 100_005])}
    session.set_state(state)
    logits = session.step(tokens[:, -1])
    model = deepmind_model(config, weights)
    expected = deepmind_step(model, state, tokens[:, -1], state[POSITION])
    assert distance(logits, expected) <= FAR[kind]


@pytest.mark.parametrize("kind", ENGINES)
def test_num_logits_across_chunks(kind, tmp_path, monkeypatch):
    config = ODD_CONFIGS["regular"]
    monkeypatch.setattr(onnx_session, "PREFILL_CHUNK", 16)
    monkeypatch.setattr(llama_cpp_session, "LOGITS_BYTES", 6 * 4 * config.vocab_size)
    options = {"prefill_length": 8} if kind == "coreml" else {}
    session, _ = opened(kind, config, tmp_path, **options)
    tokens = random_tokens(config, 2, 40)
    session.reset(2)
    every = session.prefill(tokens, 40)
    for wanted in (0, 1, 3, 4, 8, 9, 24, 25, 99):
        session.reset(2)
        logits = session.prefill(tokens, wanted)
        assert logits.shape == (2, min(max(wanted, 1), 40), config.vocab_size)
        assert distance(logits, every[:, -logits.shape[1] :]) <= 1e-5


@pytest.mark.parametrize("kind", ENGINES)
def test_wrong_requests(kind, tmp_path):
    session, _ = opened(kind, ODD_CONFIGS["regular"], tmp_path)
    check_refusals(session)


@needs_llama_cpp
def test_llama_cpp_goes_on_after_native_kernels(demo_artifact, tmp_path):
    """On AMX it configures a thread's tiles once, and an instruction was illegal after ours."""
    artifacts.export_demo(tmp_path / "demo.gguf", "gguf", "--type", "q4_0", "--no-check")
    llama, onnx = (
        open_session(open_artifact(path)) for path in (tmp_path / "demo.gguf", demo_artifact)
    )
    tokens = np.arange(2, 66)[None]
    first = {}
    for turn in range(2):
        for session in (llama, onnx):
            session.reset()
            logits = session.prefill(tokens)
            assert np.array_equal(logits, first.setdefault(session, logits)), turn


class Talk:
    """A conversation: its tokens, what DeepMind's model says after each, and how many it took."""

    def __init__(self, config, model, chosen):
        self.tokens = chosen.integers(0, config.vocab_size, 60)
        self.logits = deepmind_logits(model, self.tokens[None])[0]
        self.taken = 0

    def next(self, count):
        return self.tokens[self.taken :][:count]


@pytest.mark.parametrize("name", ["irregular", "hawk"])
@pytest.mark.parametrize("kind", ENGINES)
def test_rows_come_and_go(kind, name, tmp_path):
    config = ODD_CONFIGS[name]
    session, weights = opened(kind, config, tmp_path)
    model, chosen = deepmind_model(config, weights), np.random.default_rng(5)
    session.reset(4)
    rows = [Talk(config, model, chosen) for _ in range(4)]
    for _ in range(25):
        first = int(chosen.integers(4))
        used = range(first, int(chosen.integers(first, 4)) + 1)
        match chosen.integers(4):
            case 0:
                ends = used[0], used[-1]
                one, other = (session.get_rows(range(row, row + 1)) for row in ends)
                session.set_rows(range(ends[0], ends[0] + 1), other)
                session.set_rows(range(ends[1], ends[1] + 1), one)
                rows[ends[0]], rows[ends[1]] = rows[ends[1]], rows[ends[0]]
            case 1:
                empty = {n: np.zeros((len(used), *s)) for n, s in session.state_shapes.items()}
                session.set_rows(used, empty | {POSITION: np.zeros(len(used), np.int64)})
                rows[used.start : used.stop] = [Talk(config, model, chosen) for _ in used]
            case _:
                advance(session, rows, used, int(chosen.choice([1, 1, 3])), ROWS[kind])
    assert [int(p) for p in session.position] == [talk.taken for talk in rows]


def advance(session, rows, used, count, limit):
    count = min(count, *(len(rows[i].tokens) - rows[i].taken for i in used))
    logits = session.take(used, np.array([rows[i].next(count) for i in used]), 2)[:, -1]
    for row, of_row in zip(used, logits, strict=True):
        rows[row].taken += count
        assert distance(of_row, rows[row].logits[rows[row].taken - 1]) <= limit


MAPPED = {
    "onnx": "model.onnx.data",
    "coreml": "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    "gguf": "",
}
"""Kind of artifact → the file in it that sessions map."""


def written_to(path):
    """Changes bytes in place, as a download that goes on does it."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\0" * 8)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # clocks of files may be slow


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def replaced(path):
    beside = path.with_suffix(".new")
    shutil.copy2(path, beside)
    beside.replace(path)


@pytest.mark.parametrize("change", [written_to, cut, replaced, Path.unlink])
@pytest.mark.parametrize("kind", ENGINES)
def test_noticed_at_a_reset_and_when_a_session_opens(kind, change, tmp_path):
    config = ODD_CONFIGS["hawk"]
    artifact, _ = EXPORTS[kind](config, tmp_path)
    session = open_session(artifact)
    session.prefill(random_tokens(config, 1, 20))
    if artifact.path.is_dir():
        (artifact.path / "README.md").write_text("another card")  # it was read at the start
    session.reset()
    path = artifact.path / MAPPED[kind]
    change(path)
    with pytest.raises(RequestError, match=f"^{path} changed while it was open; open .* again$"):
        session.reset()
    session.close()
    if change == cut:
        with pytest.raises(RequestError, match=f"{path} changed while it was open"):
            open_session(artifact)


PLANNED = {
    "coreml": (artifacts.export_random_coreml, {"prefill_length": 8, "all_logits": True}),
    **{
        f"{profile}-{exact}": (artifacts.export_random, {"profile": profile, "exact": exact})
        for profile in PROFILES
        for exact in (True, False)
    },
}


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", PLANNED)
def test_row_groups(kind, compute, in_order, tmp_path):
    config, (export, options) = ODD_CONFIGS["not_by_32"], PLANNED[kind]
    plan = split_plan(config, in_order=in_order, symmetric=kind.startswith("webgpu"))
    artifact, _ = export(config, tmp_path, None, plan=plan, compute=compute, **options)
    weights = {name: tensor.whole() for name, tensor in artifact.weights.items()}
    tokens = random_tokens(config, 2, 2 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = open_session(artifact, threads=1)
    limit = 1e-4 if compute == "fp32" else 2e-2
    if artifact.manifest.rounds_activations or (compute == "fp16" and kind != "coreml"):
        limit = 0.2
    for batch, sizes in [(2, [8, 1, config.window + 1, 3]), (1, [1])]:
        session.reset(batch)
        assert distance(ragged(session, tokens[:batch], sizes), expected[:batch]) <= limit
