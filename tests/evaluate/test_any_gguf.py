"""GGUF files that rgexport did not make, in the suites `text`, `memory` and `noise`."""

import json
import re
from pathlib import Path

import pytest

from rgexport.chat.gguf_text import load_any_vocabulary
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.evaluate.subjects import open_subject
from rgexport.evaluate.suites import memory
from tests.artifacts import export_random_gguf
from tests.foreign_gguf import write_llama
from tests.llama_tools import needs_llama_cpp, run_tool
from tests.models import ODD_CONFIGS

pytestmark = needs_llama_cpp

SAMPLE = Path(memory.__file__).parents[2] / "validate" / "sample.txt"


@pytest.mark.parametrize("window", [{}, {"attention.sliding_window": 40}])
def test_perplexity_is_llama_perplexitys(window, llama_tools, tmp_path):
    """In chunks that are longer than what the model was trained for, beside all other suites."""
    unspaced = {"tokenizer.ggml.add_space_prefix": False}
    file = write_llama(tmp_path / "llama.gguf", **unspaced, **window)
    asked = "--no-escape", "-m", file, "-f", SAMPLE, "-c", "192", "-t", "1"
    printed = run_tool(llama_tools / "llama-perplexity", *asked, ending="Final estimate")
    final = re.search(r"Final estimate: PPL = ([\d.]+)", printed)
    words = f"--text {SAMPLE} --context 192 --trials 2 --farthest 64 --threads 1"
    assert run(["evaluate", str(file), *words.split(), "-o", str(tmp_path / "r")]) == 0
    model = json.loads((tmp_path / "r" / "evaluation.json").read_text())["models"][0]
    ours = next(d for d in model["suites"]["text"]["domains"] if d["context"] == 192)
    assert ours["perplexity"] == pytest.approx(float(final[1]), rel=2e-4)
    assert model["bytes"] == file.stat().st_size


@pytest.mark.parametrize(("values", "window"), [({}, 2048), ({"attention.sliding_window": 33}, 32)])
def test_what_a_file_says_of_itself(values, window, tmp_path):
    path = write_llama(tmp_path / "x.gguf", vocab_size=50, **values)
    subject = open_subject(str(path))
    assert (subject.window, subject.label, subject.tokenizer) == (window, "x.gguf", None)
    identity, moved = subject.identity, path.rename(tmp_path / "y.gguf")
    assert open_subject(str(moved)).identity == identity
    moved.write_bytes(moved.read_bytes()[:-1] + b"\1")
    assert open_subject(str(moved)).identity != identity


@pytest.mark.parametrize(
    ("harm", "suite", "line"),
    [
        (lambda data: data[:300], "memory", "x.gguf is truncated or damaged"),
        (lambda data: data.replace(b"llama", b"llbmb"), "memory", "unknown model arch.*: 'llbmb'"),
        (bytes, "window", "window of x.gguf is fixed: it was not made by rgexport"),
    ],
)
def test_what_cannot_be_evaluated(harm, suite, line, tmp_path, capsys):
    path = write_llama(tmp_path / "x.gguf", vocab_size=50)
    path.write_bytes(harm(path.read_bytes()))
    assert run(["evaluate", str(path), "--suite", suite, "-o", str(tmp_path / "r")]) == 2
    assert re.search(line, capsys.readouterr().err)
    ours = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)[0].path
    ours.write_bytes(ours.read_bytes().replace(b"rgexport.data_sha256", b"rgfxport.data_sha256"))
    with pytest.raises(RequestError, match=r"was not made by rgexport|is damaged"):
        open_subject(str(ours))


@pytest.mark.parametrize("bytewise", [False, True])
def test_vocabularies(bytewise, tmp_path):
    """As of SentencePiece and of GPT-2; words for control are text in a text."""
    vocabulary = load_any_vocabulary(write_llama(tmp_path / "x.gguf", bytewise=bytewise))
    text = "It was the time.\nNo \u00e9\u4e2d <eos> <|endoftext|> here"
    ids = vocabulary.encode_text(text)
    assert vocabulary.decode(ids) == text
    if bytewise:
        assert (vocabulary.bos_id, vocabulary.eos_id) == (None, 259) and 259 not in ids
        assert vocabulary.encode_text(" the") == [258]
    else:
        assert vocabulary.bos_id == 2 and not {*ids} & {0, 1, 2}
        assert b"".join(map(vocabulary.surface, ids)) == text.encode()
