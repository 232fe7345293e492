"""GGUF files that rgexport did not make, in the suites `text`, `memory` and `noise`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rgexport.chat.gguf_text import load_any_vocabulary
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import open_subject
from rgexport.evaluate.suites import memory
from rgexport.runtimes.session import Session
from tests.artifacts import export_random_gguf
from tests.foreign_gguf import write_llama
from tests.llama_tools import needs_llama_cpp, run_tool
from tests.models import ODD_CONFIGS

pytestmark = needs_llama_cpp

SAMPLE = Path(memory.__file__).parents[2] / "validate" / "sample.txt"


class Rereading:
    """A session whose states are what was read: it reads all of it again to go on from one."""

    def __init__(self, session: Session) -> None:
        self._session, self.vocab_size = session, session.vocab_size

    def reset(self, batch: int) -> None:
        self._session.reset(batch)
        self._seen = np.zeros((batch, 0), np.int64)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._seen = np.concatenate([self._seen, tokens], axis=1)
        return self._session.prefill(tokens)

    def get_state(self) -> np.ndarray:
        return self._seen

    def set_state(self, state: np.ndarray) -> None:
        self.reset(len(state))
        self.prefill(state)


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("task", ["induction", "several"])
def test_memory_is_that_of_what_was_read(task, window, tmp_path):
    """Of all rows at once and states that are restored, of one row, and of all read again."""
    values = {"attention.sliding_window": window} if window else {}
    subject = open_subject(str(write_llama(tmp_path / "x.gguf", **values)))
    session = subject.session(threads=1)

    def right(read, rows: range) -> list:
        way = {"from": 0, "to": 600, "distances": [16, 100, 600], "seed": 4}
        work = way | {"task": task, "first": rows.start, "rows": len(rows)}
        return memory.measure(subject, read, work, Request())["right"]

    expected = right(session, range(4))
    assert 0 < np.mean([*expected.values()]) < 1
    assert right(Rereading(session), range(4)) == expected
    single = [right(session, range(row, row + 1)) for row in range(4)]
    assert {d: [one[d][0] for one in single] for d in expected} == expected


@pytest.mark.parametrize("window", [{}, {"attention.sliding_window": 40}])
def test_perplexity_is_llama_perplexitys(window, llama_tools, tmp_path):
    """In chunks that are longer than what the model was trained for."""
    unspaced = {"tokenizer.ggml.add_space_prefix": False}
    file = write_llama(tmp_path / "llama.gguf", **unspaced, **window)
    asked = "--no-escape", "-m", file, "-f", SAMPLE, "-c", "192", "-t", "1"
    printed = run_tool(llama_tools / "llama-perplexity", *asked, ending="Final estimate")
    final = re.search(r"Final estimate: PPL = ([\d.]+)", printed)
    words = f"--suite text --text {SAMPLE} --context 192 -o {tmp_path / 'r'} --threads 1".split()
    assert run(["evaluate", str(file), *words]) == 0
    model = json.loads((tmp_path / "r" / "evaluation.json").read_text())["models"][0]
    ours = next(d for d in model["suites"]["text"]["domains"] if d["context"] == 192)
    assert ours["perplexity"] == pytest.approx(float(final[1]), rel=2e-4)
    assert model["bytes"] == file.stat().st_size


def test_all_suites_by_default(tmp_path, capsys):
    model, text = write_llama(tmp_path / "llama.gguf"), tmp_path / "text.txt"
    text.write_text(SAMPLE.read_text()[:2000])
    words = f"--text {text} --context 64 --trials 2 --farthest 64 --threads 1".split()
    assert run(["evaluate", str(model), *words, "-o", str(tmp_path / "r")]) == 0
    shown = capsys.readouterr().out
    assert "Memory, copying" in shown and "llama.gguf, nats" in shown


@pytest.mark.parametrize(("values", "window"), [({}, 2048), ({"attention.sliding_window": 33}, 32)])
def test_window(values, window, tmp_path):
    subject = open_subject(str(write_llama(tmp_path / "x.gguf", vocab_size=50, **values)))
    assert (subject.window, subject.label, subject.tokenizer) == (window, "x.gguf", None)


def test_identity_is_that_of_the_file(tmp_path):
    path = write_llama(tmp_path / "x.gguf", vocab_size=50)
    before = open_subject(str(path)).identity
    moved = path.rename(tmp_path / "y.gguf")
    assert open_subject(str(moved)).identity == before
    moved.write_bytes(moved.read_bytes()[:-1] + b"\1")
    assert open_subject(str(moved)).identity != before


@pytest.mark.parametrize("key", ["manifest", "data_sha256", "metadata_sha256"])
def test_a_damaged_file_of_ours_is_refused(key, tmp_path):
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    damaged = artifact.path.read_bytes().replace(
        f"rgexport.{key}".encode(), f"rgfxport.{key}".encode()
    )
    artifact.path.write_bytes(damaged)
    with pytest.raises(RequestError, match=r"was not made by rgexport|is damaged"):
        open_subject(str(artifact.path))


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (lambda data: data[:300], "x.gguf is truncated or damaged"),
        (lambda data: data[:-5000], "cannot load .*x.gguf: .*file bounds"),
        (lambda data: data.replace(b"llama", b"llbmb"), "unknown model architecture: 'llbmb'"),
    ],
)
def test_what_cannot_be_opened(harm, line, tmp_path, capsys):
    path = write_llama(tmp_path / "x.gguf", vocab_size=50)
    path.write_bytes(harm(path.read_bytes()))
    words = "--suite", "memory", "-o", str(tmp_path / "r")
    assert run(["evaluate", str(path), *words]) == 2
    assert re.search(line, capsys.readouterr().err)


def test_its_window_is_fixed(tmp_path, capsys):
    path = write_llama(tmp_path / "x.gguf", vocab_size=50)
    assert run(["evaluate", str(path), "--suite", "window", "-o", str(tmp_path / "r")]) == 2
    assert "window of x.gguf is fixed: it was not made by rgexport" in capsys.readouterr().err


def test_sentencepiece_vocabulary(tmp_path):
    found = load_any_vocabulary(write_llama(tmp_path / "x.gguf"))
    text = "It was the time.\nNo \u00e9\u4e2d <eos> here"
    assert found.bos_id == 2
    ids = found.encode_text(text)
    assert found.decode(ids) == text and not {*ids} & {0, 1, 2}
    assert b"".join(map(found.surface, ids)) == text.encode()


def test_bytewise_vocabulary(tmp_path):
    found = load_any_vocabulary(write_llama(tmp_path / "x.gguf", bytewise=True))
    assert found.bos_id is None and found.eos_id == 259
    assert found.encode_text(" the") == [258] and len(found.encode_text("the")) == 2
    text = "In the \u00e9\u4e2d <|endoftext|>"
    ids = found.encode_text(text)
    assert found.decode(ids) == text and 259 not in ids
