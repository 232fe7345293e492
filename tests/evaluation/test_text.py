"""The suites `text` and `noise` against DeepMind's model, and what `evaluate` refuses."""

import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFWriter

from rgexport import progress
from rgexport.chat.sample_text import built_in_text
from rgexport.cli import run
from rgexport.evaluation import run as runner
from rgexport.evaluation.models import open_model
from rgexport.evaluation.pieces import EvaluationRequest, Piece
from rgexport.evaluation.report import as_text, render_page
from rgexport.evaluation.suites import noise, text
from rgexport.reporting.tables import Table
from tests.deepmind import deepmind_logits, deepmind_model
from tests.evaluation.small_model import CONFIG, deepmind_losses, losses, small_model
from tests.models import make_config, random_weights, write_hugging_face

PROSE = "It was a bright cold day in April, and the clocks were striking thirteen. " * 6
TEXT = built_in_text()[:2000]


@pytest.fixture
def model(tmp_path):
    return small_model(tmp_path)[0]


@pytest.fixture
def deepmind():
    return deepmind_model(CONFIG, random_weights(CONFIG))


@pytest.fixture
def prose(tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE)
    return tmp_path / "prose.txt"


def test_losses_are_deepminds(model, deepmind, prose):
    subject, request = open_model(str(model)), EvaluationRequest(texts=(prose,), context=32)
    pieces = [piece for (piece,) in text.chains(subject, request)]
    assert [piece.settings["context"] for piece in pieces] == [None, 32]
    session, ids = subject.session(), np.array([2, *subject.tokenizer.encode_text(PROSE)])
    whole, chunks = (text.measure(subject, session, piece.settings, request) for piece in pieces)
    assert sum(whole["sums"]) == pytest.approx(deepmind_losses(deepmind, ids).sum(), rel=1e-5)
    assert whole["bytes"] == len(PROSE.encode()) and sum(whole["counts"]) == len(ids) - 1
    expected = []
    for start in range(0, len(ids) - 31, 32):
        chunk = ids[start : start + 32].copy()
        chunk[0] = 2
        expected += deepmind_losses(deepmind, chunk)[16:].tolist()
    assert sum(chunks["counts"]) == len(expected)
    assert sum(chunks["sums"]) == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(33, 13), (400, 100), (32, 31)])
def test_strided_losses_are_deepminds(context, stride, model, deepmind, prose):
    """Each token once, by the piece in which the most tokens are before it, as far as pieces go."""
    subject = open_model(str(model))
    request = EvaluationRequest(texts=(prose,), context=context, stride=stride)
    piece = next(p for (p,) in text.chains(subject, request) if p.settings["stride"])
    result = text.measure(subject, subject.session(), piece.settings, request)
    ids, room = subject.tokenizer.encode_text(PROSE), context - 1
    expected = list(deepmind_losses(deepmind, np.array([2, *ids[:room]])))
    for start in itertools.count(stride, stride):
        if not (new := len(ids[: start + room]) - len(expected)):
            break
        losses_of_piece = deepmind_losses(deepmind, np.array([2, *ids[start : start + room]]))
        expected += list(losses_of_piece[-new:])
    assert sum(result["counts"]) == len(ids) and result["bytes"] == len(PROSE.encode())
    assert sum(result["sums"]) == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in noise.NOISES if kind != "none"])
def test_each_noise_spoils_in_one_way_for_a_seed(kind):
    text = TEXT + " Déjà vu."
    one, same = (noise.NOISES[kind](text, np.random.default_rng(seed)) for seed in (1, 1))
    assert one == same != text and 0.5 < len(one) / len(text) < 1.5


def test_losses_and_flips_in_noise_are_deepminds(model, deepmind, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    subject, request = open_model(str(model)), EvaluationRequest(texts=(file,), seed=5)
    session, encode = subject.session(), subject.tokenizer.encode_text
    results = [
        (piece.settings, noise.measure(subject, session, piece.settings, request))
        for (piece,) in noise.chains(subject, request)
    ]
    by_noise = {work["noise"]: result for work, result in results}
    assert by_noise.keys() == noise.NOISES.keys()
    tops, nats = {}, {}
    for name in ("none", "upper case"):
        each = []
        for context, rest in noise.passages(TEXT):
            ids = encode(rest)
            before = [2, *encode(noise.NOISES[name](context, None))]
            logits = deepmind_logits(deepmind, np.array([[*before, *ids[:-1]]]))
            each.append((logits[0, -len(ids) :], np.array(ids)))
        nats[name] = [losses(*pair) for pair in each]
        expected = [values.sum() for values in nats[name]]
        np.testing.assert_allclose(list(map(sum, by_noise[name]["nats"])), expected, rtol=1e-4)
        tops[name] = np.concatenate([logits.argmax(-1) for logits, _ in each])
    summed = {entry["noise"]: entry for entry in noise.summary(results)["noises"]}
    flips = (tops["none"] != tops["upper case"]).mean()
    assert summed["upper case"]["flips"]["value"] == pytest.approx(flips)
    grown = [b - a for a, b in zip(nats["none"], nats["upper case"], strict=True)]
    parts = slice(0, 1), slice(1, 3), slice(3, 7)
    points = summed["upper case"]["by_distance"]
    assert 2 ** len(points) > max(map(len, grown))
    for point, part in zip(points, parts, strict=False):
        expected = np.concatenate([gap[part] for gap in grown]).mean()
        assert point["token"] == part.start + 1
        assert point["more"]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert {entry["value"] for entry in noise.differences(results, results)["noises"]} == {0.0}


def test_domains_are_folders_and_file_names(tmp_path):
    """A number in a name is no ending."""
    hidden = ".git/notes.txt", "a/.two.txt"
    names = "a/one.txt", "b/deep/two.md", "three.txt", "b/picture.png", *hidden, "heat-0.25"
    for name in names:
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    documents = text.documents((tmp_path / "texts", file, tmp_path / "texts" / "b" / "deep"))
    expected = "a/one.txt a", "b/deep/two.md b", "three.txt texts", "heat-0.25 heat-0.25"
    assert [f"{document.name} {document.domain}" for document in documents] == [
        *expected,
        "two.md two",  # a folder without folders
    ]
    (tmp_path / "texts" / "b" / "deep" / "two.txt").write_text("another")
    domains = [document.domain for document in text.documents((tmp_path / "texts/b/deep",))]
    assert domains == ["two.md", "two.txt"]


def test_a_damaged_piece_is_done_again(model, prose, tmp_path):
    subjects = [open_model(str(model))]
    request = EvaluationRequest(folder=tmp_path / "r", texts=(prose,))
    expected = runner.evaluate(subjects, ["text"], request)
    for file in (tmp_path / "r" / "pieces").iterdir():
        file.write_text(file.read_text()[:40])
    assert runner.evaluate(subjects, ["text"], request) == expected


def test_a_suite_is_one_module(model, tmp_path, monkeypatch):
    """It is measured, summarized and shown by what it has itself."""
    suite = SimpleNamespace(
        chains=lambda model, request: [[Piece(model.identity, "size", {}, 1)]],
        measure=lambda model, session, settings, request: {"vocab": session.vocab_size},
        summary=lambda measured: measured[0][1],
        tables=lambda models: [Table("Of", ("n",), [(str(m["suites"]["size"]),) for m in models])],
        charts=lambda models: [],
    )
    monkeypatch.setitem(runner.SUITES, "size", suite)
    request = EvaluationRequest(folder=tmp_path / "r")
    results = runner.evaluate([open_model(str(model))], ["size"], request)
    assert "8192" in as_text(results) and "8192" in render_page(results)


def test_models_are_compared_token_by_token(demo_artifact, tmp_path, capsys, monkeypatch):
    """Those of other shapes and vocabularies stand beside; what cannot be compared is left out."""
    small, target = small_model(tmp_path / "small")[0], tmp_path / "results"
    words = "--suite text --suite memory --limit 100 --trials 8 --farthest 64 --context 32"
    models = "demo", str(demo_artifact), str(small)
    assert run(["evaluate", *models, *words.split(), "-o", str(target)]) == 0
    verdict = capsys.readouterr().out
    monkeypatch.setattr(progress, "verbose", False)  # -v sets it for the process
    assert len(verdict.splitlines()) == 5 and "Memory, copying" not in verdict
    assert run(["evaluate", *models, *words.split(), "-o", str(target), "-v"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(verdict.partition("How sure")[0])
    assert "more nats per token than demo" in shown and str(target / "evaluation.json") in shown
    assert "Memory, copying" in shown and "model certainly loses in memory" in shown
    page = (target / "evaluation.html").read_text()
    assert "<svg" in page and "<script" not in page and "Loss by position: difference" in page
    assert "Evaluation of demo and demo-int4" in page and "Memory, copying" in page
    result = json.loads((target / "evaluation.json").read_text())
    result["environment"]["cpu"] = "right \u202e left"
    assert "\u202e" not in render_page(result)
    original, artifact, _ = result["models"]
    first, second = (model["suites"]["text"]["domains"][0] for model in (original, artifact))
    gap = artifact["differences"]["text"]["domains"][0]["nll"]
    assert gap["value"] == pytest.approx(second["nll"][0] - first["nll"][0])
    assert first["perplexity"] == pytest.approx(math.exp(first["nll"][0]))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("demo --stride 512", "--stride is 512, --context 512; expected a smaller stride"),
        ("demo --suite tekst", "--suite is 'tekst'; expected one of text, memory, noise"),
        ("demo demo", "two models are called demo; rename"),
        ("demo --suite text --text missing.txt", "missing.txt"),
        ("{bare}", "has no tokenizer, which the suite text needs; pass --suite memory"),
        ("{broken} --suite text", "logits are NaN or infinite"),
        ("{small} --suite text -o {thesis}", "thesis is no folder of results; expected"),
        ("{llama}", r"llama.gguf holds .* architecture .*llama.*; expected recurrentgemma, from"),
    ],
)
def test_wrong_requests(words, line, tmp_path, capsys):
    small, _, weights = small_model(tmp_path / "small")
    broken, _, _ = small_model(tmp_path / "broken")
    weights["final_norm.weight"][:] = 3e38
    write_hugging_face(CONFIG, weights, broken)
    config = make_config("rra", width=64, heads=4)
    bare = write_hugging_face(config, random_weights(config), tmp_path / "bare")
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "evaluation.json").write_text("mine")
    llama = GGUFWriter(tmp_path / "llama.gguf", "llama")
    llama.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    llama.write_header_to_file()
    llama.write_kv_data_to_file()
    llama.write_tensors_to_file()
    llama.close()
    paths = {"bare": bare, "broken": broken, "small": small, "thesis": thesis}
    asked = words.format(**paths, llama=tmp_path / "llama.gguf").split()
    assert run(["evaluate", "-o", str(tmp_path / "out"), *asked]) == 2
    assert re.search(line, capsys.readouterr().err.strip().splitlines()[-1])
    assert [file.read_text() for file in thesis.iterdir()] == ["mine"]


def test_a_config_is_part_of_what_a_model_is(model):
    before = open_model(str(model)).identity
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('_size": 40', '_size": 24'))
    assert open_model(str(model)).identity != before
