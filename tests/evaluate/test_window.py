"""Narrower windows against DeepMind's model with that window, and the suite `window`."""

import dataclasses
import json

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.evaluate.subjects import open_subject
from rgexport.evaluate.suites import window
from rgexport.runtimes.engine import open_narrow_session, open_session
from tests.artifacts import export_random, export_random_coreml, export_random_gguf, require_ggml
from tests.deepmind import deepmind_logits, deepmind_model
from tests.evaluate.small_model import small_model
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("raraa", width=64, heads=4, lru_width=96, window=24)
WINDOWS = [*window.windows(24), 1]
TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 70))


@pytest.fixture
def deepminds(monkeypatch):
    """Of whole sequences: a cache of no tokens, which is not asked for here, would be an error."""

    def logits(weights, narrow):
        config = dataclasses.replace(CONFIG, window=narrow)
        return deepmind_logits(deepmind_model(config, weights), TOKENS)

    monkeypatch.setattr(
        "recurrentgemma.torch.modules._attention_cache_from_prompt", lambda *a, **more: None
    )
    return logits


def logits(session):
    """In two parts, with the state given and taken in between."""
    session.reset(2)
    first = session.prefill(TOKENS[:, :33], 33)
    state = session.get_state()
    session.reset(2)
    session.set_state(state)
    rest = session.prefill(TOKENS[:, 33:60], 27)
    steps = [session.step(TOKENS[:, t])[:, None] for t in range(60, 70)]
    return np.concatenate([first, rest, *steps], axis=1)


@pytest.mark.parametrize("narrow", WINDOWS)
@pytest.mark.parametrize("engine", ["reference", "cpu", "webgpu", "wasm", "gguf"])
def test_logits_are_deepminds_with_that_window(narrow, engine, deepminds, tmp_path):
    if engine == "reference":
        weights = random_weights(CONFIG)
        model = write_hugging_face(CONFIG, weights, tmp_path / "model")
        session = open_subject(str(model)).session(narrow)
    elif engine == "gguf":
        require_ggml()
        artifact, weights = export_random_gguf(CONFIG, tmp_path, "f32")
        session = open_narrow_session(artifact, narrow)
    else:
        artifact, weights = export_random(CONFIG, tmp_path, profile=engine)
        session = open_narrow_session(artifact, narrow)
    limit = 2e-4 if engine == "gguf" else 1e-4
    assert np.abs(logits(session) - deepminds(weights, narrow)).max() < limit
    session.close()


def test_an_int4_graph_is_what_an_export_with_that_window_would_be(tmp_path):
    artifacts = []
    for name, export_window in (("full", 24), ("narrow", 6)):
        config = dataclasses.replace(CONFIG, window=export_window)
        artifacts.append(export_random(config, tmp_path / name, "int4")[0])
    sessions = open_narrow_session(artifacts[0], 6), open_session(artifacts[1])
    np.testing.assert_array_equal(*map(logits, sessions))
    assert len({session.info.state_bytes for session in sessions}) == 1
    for session in sessions:
        session.close()


@pytest.mark.parametrize("wrong", [-1, 25])
def test_a_window_that_is_none(wrong, tmp_path):
    artifact, _ = export_random(CONFIG, tmp_path)
    with pytest.raises(RequestError, match=f"the window is {wrong}; expected 0 to 24"):
        open_narrow_session(artifact, wrong)


def test_a_core_ml_package_keeps_its_window(tmp_path):
    artifact, _ = export_random_coreml(CONFIG, tmp_path)
    with pytest.raises(RequestError, match=r"cannot be changed; expected an ONNX.*--window"):
        open_narrow_session(artifact, 6)


def test_the_suite(tmp_path, capsys):
    """The full window is what the suites say by themselves, and each narrower one is compared."""
    model, config, _ = small_model(tmp_path)
    words = "--trials 8 --farthest 64 --context 4096 --limit 300 --threads 1"
    for suites, folder in (("text memory", "apart"), ("window", "together")):
        asked = [word for suite in suites.split() for word in ("--suite", suite)]
        target = tmp_path / folder
        assert run(["evaluate", str(model), *asked, *words.split(), "-o", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "Windows: perplexity" in shown
    apart, together = (
        json.loads((tmp_path / folder / "evaluation.json").read_text())["models"][0]["suites"]
        for folder in ("apart", "together")
    )
    rows = together["window"]["windows"]
    assert [row["window"] for row in rows] == window.windows(config.window)
    assert {name: rows[0][name] for name in apart} == apart
    assert [row["state_bytes"] for row in rows] == sorted(
        (row["state_bytes"] for row in rows), reverse=True
    )
    gaps = [row["text_above_full"]["domains"][0]["nll"]["value"] for row in rows]
    nll = [row["text"]["domains"][0]["nll"][0] for row in rows]
    assert gaps == pytest.approx([each - nll[0] for each in nll]) and len({*nll}) == len(nll)
    assert rows[0]["all_texts_above_full"]["value"] == 0
    (single,) = rows[1]["text"]["domains"]
    assert rows[1]["all_texts"] == single | {"domain": "all"}
    page = (tmp_path / "together" / "evaluation.html").read_text()
    assert page.count("<svg") == 7 and "Loss by window" in page


def test_a_model_without_attention_is_told_of(tmp_path, capsys):
    """Before anything is measured."""
    small = small_model(tmp_path / "small")[0]
    model, *_ = small_model(
        tmp_path / "bare", make_config("rr", width=64, heads=4, vocab_size=8192)
    )
    asked = "evaluate", str(small), str(model.rename(tmp_path / "bare" / "rr"))
    assert run([*asked, "--suite", "window", "-o", str(tmp_path / "r")]) == 2
    assert "rr has no attention, whose window could be smaller" in capsys.readouterr().err
    assert not [*(tmp_path / "r" / "pieces").glob("*.json")]
