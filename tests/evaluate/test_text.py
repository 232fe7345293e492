"""The suite `text` against DeepMind's model and llama-perplexity, and runs that are cut off."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rgexport.cli import run
from rgexport.evaluate import run as runner
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import open_subject
from rgexport.evaluate.suites import text
from tests.deepmind import deepmind_logits, deepmind_model
from tests.evaluate.small_model import CONFIG, small_model
from tests.models import make_config, random_weights, write_hugging_face

PROSE = "It was a bright cold day in April, and the clocks were striking thirteen. " * 6


@pytest.fixture
def model(tmp_path) -> Path:
    return small_model(tmp_path)[0]


def test_losses_are_deepminds(tmp_path):
    folder, config, weights = small_model(tmp_path)
    file = tmp_path / "prose.txt"
    file.write_text(PROSE)
    subject, request = open_subject(str(folder)), Request(texts=(file,), context=32)
    deepmind, session = deepmind_model(config, weights), subject.session()
    pieces = list(text.pieces(subject, request))
    assert [piece.work["context"] for piece in pieces] == [None, 32]
    ids = np.array([2, *subject.tokenizer.encode_text(PROSE)])
    whole = text.measure(subject, session, pieces[0].work, request)
    assert sum(whole["sums"]) == pytest.approx(nats(deepmind, ids).sum(), rel=1e-5)
    assert whole["bytes"] == len(PROSE.encode()) and sum(whole["counts"]) == len(ids) - 1
    chunks = text.measure(subject, session, pieces[1].work, request)
    expected = []
    for start in range(0, len(ids) - 31, 32):
        chunk = ids[start : start + 32].copy()
        chunk[0] = 2
        expected += nats(deepmind, chunk)[16:].tolist()
    assert sum(chunks["counts"]) == len(expected)
    assert sum(chunks["sums"]) == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(33, 13), (400, 100), (32, 31)])
def test_strided_losses_are_deepminds(context, stride, tmp_path):
    """Each token once, by the piece in which the most tokens are before it, as far as pieces go."""
    folder, config, weights = small_model(tmp_path)
    file = tmp_path / "prose.txt"
    file.write_text(PROSE)
    subject = open_subject(str(folder))
    request = Request(texts=(file,), context=context, stride=stride)
    piece = next(p for p in text.pieces(subject, request) if p.work["stride"])
    found = text.measure(subject, subject.session(), piece.work, request)
    ids, deepmind = subject.tokenizer.encode_text(PROSE), deepmind_model(config, weights)
    expected, room = [], context - 1
    for place in range(len(ids)):
        start = 0 if place < room else ((place - room) // stride + 1) * stride
        behind = np.array([2, *ids[start : place + 1]])
        expected.append(nats(deepmind, behind)[-1])
    assert sum(found["counts"]) == len(ids) and found["bytes"] == len(PROSE.encode())
    assert sum(found["sums"]) == pytest.approx(sum(expected), rel=1e-5)


def nats(model, ids: np.ndarray) -> np.ndarray:
    logits = torch.from_numpy(deepmind_logits(model, ids[None])).double()
    found = torch.log_softmax(logits[0, :-1], -1)
    return -found[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])].numpy()


def test_domains_are_folders_and_file_names(tmp_path):
    names = "a/one.txt", "a/two.md", "b/deep/three.txt", "four.txt", "b/picture.png", "heat-0.25"
    for name in names:
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    single = (tmp_path / "texts" / name for name in ("four.txt", "heat-0.25"))
    assert [(d.name, d.domain) for d in text.documents((tmp_path / "texts", *single))] == [
        ("a/one.txt", "a"),
        ("a/two.md", "a"),
        ("b/deep/three.txt", "b"),
        ("four.txt", "texts"),
        ("four.txt", "four"),
        ("heat-0.25", "heat-0.25"),  # a number in a name is no ending
    ]


def test_a_damaged_piece_is_done_again(model, tmp_path):
    subjects, request = [open_subject(str(model))], Request(folder=tmp_path / "results", context=32)
    expected = runner.evaluate(subjects, ["text"], request)
    for file in (tmp_path / "results" / "pieces").iterdir():
        file.write_text(file.read_text()[:40])
    assert runner.evaluate(subjects, ["text"], request) == expected


def test_models_are_compared_token_by_token(demo_artifact, tmp_path, capsys):
    target = tmp_path / "results"
    asked = "--suite", "text", "--limit", "600", "-o", str(target)
    assert run(["evaluate", "demo", str(demo_artifact), *asked]) == 0
    shown = capsys.readouterr().out
    assert "more nats per token than demo" in shown and str(target / "evaluation.json") in shown
    page = (target / "evaluation.html").read_text()
    assert page.count("<svg") == 1 and "<script" not in page and "Loss by position" in page
    original, artifact = json.loads((target / "evaluation.json").read_text())["models"]
    first, second = (model["suites"]["text"]["domains"][0] for model in (original, artifact))
    gap = artifact["differences"]["text"]["domains"][0]["nll"]
    assert gap["value"] == pytest.approx(second["nll"][0] - first["nll"][0])
    assert gap["low"] < gap["value"] < gap["high"]
    assert first["perplexity"] == pytest.approx(math.exp(first["nll"][0]))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["demo", "--stride", "512"], "--stride is 512, --context 512; expected a stride of less"),
        (["demo", "--suite", "tekst"], "--suite is 'tekst'; expected one of text, memory, noise"),
        (["demo", "demo"], "two models are called demo; rename"),
        (["nowhere/at/all"], "nowhere/at/all"),
        (["demo", "--suite", "text", "--text", "missing.txt"], "missing.txt"),
    ],
)
def test_wrong_requests(arguments, line, tmp_path, capsys):
    assert run(["evaluate", *arguments, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(line, error[0])


def test_a_folder_of_somebody_else_is_left_alone(model, tmp_path, capsys):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "evaluation.json").write_text("mine")
    assert run(["evaluate", str(model), "--suite", "text", "-o", str(folder)]) == 2
    assert "thesis is no folder of results; expected" in capsys.readouterr().err
    assert [file.read_text() for file in folder.iterdir()] == ["mine"]


def test_no_tokenizer_is_told_by_name(tmp_path, capsys):
    config = make_config("rra", width=64, heads=4)
    model = write_hugging_face(config, random_weights(config), tmp_path / "model")
    assert run(["evaluate", str(model), "-o", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "has no tokenizer, which the suite text needs; pass --suite memory" in error


def test_a_config_is_part_of_what_a_model_is(model):
    before = open_subject(str(model)).identity
    edited = json.loads((model / "config.json").read_text())
    edited["attention_window_size"] = 24
    (model / "config.json").write_text(json.dumps(edited))
    assert open_subject(str(model)).identity != before


def test_logits_that_are_no_numbers_are_told_of(tmp_path, capsys):
    model, _, weights = small_model(tmp_path)
    weights["final_norm.weight"][:] = 3e38
    write_hugging_face(CONFIG, weights, model)
    assert run(["evaluate", str(model), "--suite", "text", "-o", str(tmp_path / "r")]) == 2
    assert "logits are NaN or infinite" in capsys.readouterr().err


def test_models_of_other_shapes_and_vocabularies_stand_side_by_side(tmp_path, capsys):
    """Each has a window and a tokenizer of its own; what cannot be compared is left out."""
    small, _, _ = small_model(tmp_path / "small")
    words = f"--suite text --suite memory --trials 8 --farthest 64 --context 32 -o {tmp_path / 'r'}"
    assert run(["evaluate", "demo", str(small), "--limit", "100", *words.split()]) == 0
    assert "Memory, copying" in capsys.readouterr().out
