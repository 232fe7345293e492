"""Narrower windows against DeepMind's model with that window, and the suite `window`."""

import dataclasses
import json

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.evaluation.models import open_model
from rgexport.evaluation.suites import window
from rgexport.runtimes.engine import open_session
from tests.artifacts import export_random, export_random_coreml, export_random_gguf, require_ggml
from tests.deepmind import deepmind_logits, deepmind_model
from tests.evaluation.small_model import small_model
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("raa", width=64, heads=4, lru_width=96, window=24)
TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 70))


@pytest.fixture(scope="module")
def deepminds():
    """Of whole sequences: a cache of no tokens, which is not asked for here, would be an error."""
    name = "recurrentgemma.torch.modules._attention_cache_from_prompt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, lambda *arguments, **more: None)
        return {
            narrow: deepmind_logits(
                deepmind_model(dataclasses.replace(CONFIG, window=narrow), random_weights(CONFIG)),
                TOKENS,
            )
            for narrow in [*window.windows(24), 1]
        }


def logits(session):
    """In two parts, with the state given and taken in between."""
    session.reset(2)
    first = session.prefill(TOKENS[:, :33], 33)
    state = session.get_state()
    session.reset(2)
    session.set_state(state)
    rest = session.prefill(TOKENS[:, 33:60], 27)
    steps = [session.step(TOKENS[:, t])[:, None] for t in range(60, 70)]
    session.close()
    return np.concatenate([first, rest, *steps], axis=1)


@pytest.mark.parametrize("engine", ["reference", "cpu", "webgpu", "wasm", "gguf"])
def test_logits_are_deepminds_with_that_window(engine, deepminds, tmp_path):
    if engine == "gguf":
        require_ggml()
        artifact, _ = export_random_gguf(CONFIG, tmp_path, "f32")
    elif engine == "reference":
        model = write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model")
        subject = open_model(str(model))
    else:
        artifact, _ = export_random(CONFIG, tmp_path, profile=engine)
    for narrow, expected in deepminds.items():
        is_reference = engine == "reference"
        session = subject.session(narrow) if is_reference else open_session(artifact, window=narrow)
        limit = 2e-4 if engine == "gguf" else 1e-4
        assert np.abs(logits(session) - expected).max() < limit


def test_an_int4_graph_is_what_an_export_with_that_window_would_be(tmp_path):
    full, narrow = (
        export_random(dataclasses.replace(CONFIG, window=size), tmp_path / str(size), "int4")[0]
        for size in (24, 6)
    )
    sessions = open_session(full, window=6), open_session(narrow)
    assert len({session.info.state_bytes for session in sessions}) == 1
    np.testing.assert_array_equal(*map(logits, sessions))


def test_what_has_no_other_window_is_told_of(tmp_path, capsys):
    artifact, _ = export_random(CONFIG, tmp_path)
    for wrong in (-1, 25):
        with pytest.raises(RequestError, match=f"the window is {wrong}; expected 0 to 24"):
            open_session(artifact, window=wrong)
    package, _ = export_random_coreml(CONFIG, tmp_path)
    with pytest.raises(RequestError, match=r"cannot be changed; expected an ONNX.*--window"):
        open_session(package, window=6)
    config = make_config("rr", width=64, heads=4, vocab_size=8192)
    model = small_model(tmp_path / "bare", config)[0].rename(tmp_path / "rr")
    small = small_model(tmp_path / "small")[0]
    asked = "evaluate", str(small), str(model), "--suite", "window"
    assert run([*asked, "-o", str(tmp_path / "r")]) == 2
    assert "rr has no attention, whose window could be smaller" in capsys.readouterr().err
    assert not [*(tmp_path / "r" / "pieces").glob("*.json")]


def test_the_suite(tmp_path, capsys):
    """The full window is what the suites say by themselves, and each narrower one is compared."""
    model, config, _ = small_model(tmp_path)
    words = "--trials 8 --farthest 64 --context 4096 --limit 150 --threads 1"
    suites = {}
    for name in ("text --suite memory", "window"):
        asked = f"--suite {name} {words} -o {tmp_path / name[:4]}".split()
        assert run(["evaluate", str(model), *asked]) == 0
        results = json.loads((tmp_path / name[:4] / "evaluation.json").read_text())
        suites |= results["models"][0]["suites"]
    assert "Windows: perplexity" in capsys.readouterr().out
    rows = suites.pop("window")["windows"]
    assert [row["window"] for row in rows] == window.windows(config.window)
    assert {name: rows[0][name] for name in suites} == suites
    sizes = [row["state_bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    gaps = [row["text_above_full"]["domains"][0]["nll"]["value"] for row in rows]
    nll = [row["text"]["domains"][0]["nll"][0] for row in rows]
    assert gaps == pytest.approx([each - nll[0] for each in nll]) and len({*nll}) == len(nll)
    assert rows[0]["all_texts_above_full"]["value"] == 0
    assert "Loss by window" in (tmp_path / "wind" / "evaluation.html").read_text()
