"""The suite `length`: one text over all its pieces, its states, and runs that go on elsewhere."""

import json
import re

import numpy as np
import pytest

from rgexport.chat.state_file import read_state
from rgexport.cli import run
from rgexport.evaluation import run as runner
from rgexport.evaluation.models import open_model
from rgexport.evaluation.pieces import EvaluationRequest
from rgexport.evaluation.suites import length
from rgexport.griffin.state import POSITION
from tests.artifacts import require_ggml
from tests.deepmind import deepmind_model
from tests.evaluation.small_model import deepmind_losses, small_model

LENGTH = 700


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Marks at 100, 200, 400 and the end; pieces of 150 tokens, in blocks of 32."""
    for name, value in {"FIRST": 100, "_PIECE": 150, "_BLOCK": 32, "_TURNS": 2}.items():
        monkeypatch.setattr(length, name, value)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, its shape and weights, and artifacts of it."""
    folder = tmp_path_factory.mktemp("length")
    model, config, weights = small_model(folder)
    commands = {"onnx": "onnx --precision fp32", "int4": "onnx --int4", "x.gguf": "gguf --type f32"}
    for name, words in commands.items():
        assert run(f"{words} -m {model} --no-check -o {folder / name}".split()) == 0
    (folder / "long.txt").write_text("One two three, four and five. " * 12)
    return folder, config, weights


@pytest.fixture
def request_of(models, tmp_path):
    def request(folder="results", **settings):
        texts = (models[0] / "long.txt",)
        return EvaluationRequest(folder=tmp_path / folder, texts=texts, length=LENGTH, **settings)

    return request


def without_times(results):
    """Of a run's models, all that does not depend on the machine's speed."""
    text = json.dumps(results)
    for name in ("step_seconds", "prefill_tokens_per_second", "rss_bytes", "ratio"):
        text = re.sub(rf'"{name}": (\[.*?\]|[\d.e-]+|null)', f'"{name}": 0', text)
    return json.loads(text)


def test_losses_and_states_are_those_of_one_pass(models, request_of):
    folder, config, weights = models
    request = request_of()
    subjects = [open_model(str(folder / name)) for name in ("model", "onnx")]
    results = runner.evaluate(subjects, ["length"], request)["models"]
    ids = length._ids(subjects[0], request)[: LENGTH + 1]
    nats = deepmind_losses(deepmind_model(config, weights), ids)
    for model in results:
        points = model["suites"]["length"]["points"]
        assert [point["to"] for point in points] == [100, 200, 400, 700]
        for point, start in zip(points, (0, 100, 200, 400), strict=True):
            assert point["nll"][0] == pytest.approx(nats[start : point["to"]].mean(), rel=1e-5)
    session = subjects[0].session()
    session.prefill(ids[None, :LENGTH])
    expected = session.get_state()
    path = length.state_file(subjects[1], LENGTH, request)
    state = read_state(path, subjects[1].state_shapes).state
    for name in expected.keys() - {POSITION}:
        assert np.abs(state[name] - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max()
    last = results[1]["differences"]["length"]["points"][-1]
    assert 0 < last["states"] < 1e-4 and abs(last["nll"]["value"]) < 1e-5
    norms = {n: float(np.linalg.norm(a)) for n, a in expected.items() if n.endswith(".rg_lru")}
    assert results[0]["suites"]["length"]["points"][-1]["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize(("survivors", "state_is_lost"), [(1, False), (4, True)])
def test_a_run_that_was_killed_goes_on(
    survivors, state_is_lost, models, request_of, monkeypatch, capsys
):
    subjects, suites = [open_model(str(models[0] / "onnx"))], ["length", "text"]
    expected = runner.evaluate(subjects, suites, request_of("whole"))["models"]
    put, keys = runner.Results.put, []

    def put_some(results, piece, result):
        if len(keys) == survivors:
            raise KeyboardInterrupt
        keys.append(piece.key)
        put(results, piece, result)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runner.Results, "put", put_some)
        runner.evaluate(subjects, suites, request_of("killed"))
    assert "Interrupted. The same command goes on" in capsys.readouterr().err
    pieces = request_of("killed").folder / "pieces"
    for file in [*pieces.glob("*.npz")] if state_is_lost else ():
        file.unlink()
    times = {file: file.stat().st_mtime_ns for file in pieces.glob("*.json")}
    results = runner.evaluate(subjects, suites, request_of("killed"))["models"]
    assert without_times(results) == without_times(expected)
    assert len(times) == survivors
    assert state_is_lost or times == {file: file.stat().st_mtime_ns for file in times}
    assert not list(pieces.glob("*.npz"))


def test_each_state_has_figures_of_its_own(models, request_of):
    """Two states at the same place of one text, of different bits, give different losses."""
    subjects = [open_model(str(models[0] / name)) for name in ("onnx", "int4")]
    runner.evaluate(subjects, ["length"], request_of("first"))
    losses = []
    for subject in subjects:
        state = length.state_file(subject, 200, request_of("first"))
        again = request_of("second", state=state)
        (model,) = runner.evaluate(subjects[:1], ["length"], again)["models"]
        losses.append([point["nll"] for point in model["suites"]["length"]["points"]])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("engine", ["model", "x.gguf"])
def test_another_engine_goes_on_from_a_state_file(engine, models, request_of):
    require_ggml()
    first = open_model(str(models[0] / "onnx"))
    whole = runner.evaluate([first], ["length"], request_of("first"))["models"][0]
    state = length.state_file(first, 200, request_of("first"))
    other = [open_model(str(models[0] / engine))]
    rest = runner.evaluate(other, ["length"], request_of("second", state=state))["models"][0]
    expected, result = (model["suites"]["length"] for model in (whole, rest))
    assert result["start"] == 200
    for point, same in zip(result["points"], expected["points"][2:], strict=True):
        assert point["to"] == same["to"]
        assert point["nll"][0] == pytest.approx(same["nll"][0], rel=1e-4)


def test_the_command(models, tmp_path, capsys):
    folder, other = models[0], tmp_path / "other.txt"
    text, onnx = folder / "long.txt", str(folder / "onnx")
    words = ["--suite", "length", "-o", str(tmp_path / "r"), "--length"]
    asked = *words, str(LENGTH), "--text", str(text)
    assert run(["evaluate", str(folder / "model"), "-m", f"{onnx}/model.onnx", *asked]) == 0
    page = (tmp_path / "r" / "evaluation.html").read_text()
    assert page.count("<svg") == 4 and "Largest norm of a recurrent state" in page
    assert "states off" in page and "timed in turns" in page
    request = EvaluationRequest(folder=tmp_path / "r", texts=(text,), length=LENGTH)
    state = length.state_file(open_model(onnx), 200, request)
    other.write_text("Quite another text, which is long enough. " * 9)
    for used, seen, total, line in (
        (state, other, LENGTH, "has seen another text"),
        (folder / "model" / "model.safetensors", text, LENGTH, "expected a state file"),
        (state, text, 150, "has seen 200 tokens; expected fewer than 150: pass"),
    ):
        asked = *words, str(total), "--text", str(seen), "--state", str(used)
        assert run(["evaluate", onnx, *asked]) == 2
        assert line in capsys.readouterr().err
