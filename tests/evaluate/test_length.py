"""The suite `length`: one text over all its pieces, its states, and runs that go on elsewhere."""

import json
import re

import numpy as np
import pytest
import torch

from rgexport.chat.state_file import read_state
from rgexport.cli import run
from rgexport.evaluate import run as runner
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import open_subject
from rgexport.evaluate.suites import length, memory
from rgexport.griffin.state import POSITION
from tests.artifacts import require_ggml
from tests.deepmind import deepmind_logits, deepmind_model
from tests.evaluate.small_model import small_model

LENGTH = 700


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Marks at 100, 200, 400 and the end; pieces of 150 tokens, in blocks of 32."""
    for name, value in {"FIRST": 100, "_PIECE": 150, "_BLOCK": 32, "_TURNS": 2}.items():
        monkeypatch.setattr(length, name, value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its shape and weights, and artifacts of it."""
    folder = tmp_path_factory.mktemp("length")
    model, config, weights = small_model(folder)
    for kind, more in (("onnx", ("--precision", "fp32")), ("gguf", ("--type", "f32"))):
        target = folder / {"onnx": "onnx", "gguf": "model.gguf"}[kind]
        assert run([kind, "-m", str(model), *more, "--no-check", "-o", str(target)]) == 0
    text = folder / "long.txt"
    text.write_text("One two three, four and five. " * 12)
    return folder, config, weights


@pytest.fixture
def request_of(made, tmp_path):
    def request(folder="results", **settings):
        texts = (made[0] / "long.txt",)
        return Request(folder=tmp_path / folder, texts=texts, length=LENGTH, **settings)

    return request


def without_times(models):
    """Of a run's models, all that does not depend on the machine's speed."""
    text = json.dumps(models)
    for name in ("step_seconds", "prefill_tokens_per_second", "rss_bytes", "ratio"):
        text = re.sub(rf'"{name}": (\[.*?\]|[\d.e-]+|null)', f'"{name}": 0', text)
    return json.loads(text)


def test_losses_and_states_are_those_of_one_pass(made, request_of):
    folder, config, weights = made
    request = request_of()
    subjects = [open_subject(str(folder / name)) for name in ("model", "onnx")]
    found = runner.evaluate(subjects, ["length"], request)["models"]
    ids = length._ids(subjects[0], request)[: LENGTH + 1]
    logits = torch.from_numpy(deepmind_logits(deepmind_model(config, weights), ids[None])).double()
    nats = -torch.log_softmax(logits[0, :-1], -1)[torch.arange(LENGTH), torch.from_numpy(ids[1:])]
    for model in found:
        points = model["suites"]["length"]["points"]
        assert [point["to"] for point in points] == [100, 200, 400, 700]
        for point, start in zip(points, (0, 100, 200, 400), strict=True):
            expected = float(nats[start : point["to"]].mean())
            assert point["nll"][0] == pytest.approx(expected, rel=1e-5)
    session = subjects[0].session()
    session.prefill(ids[None, :LENGTH])
    expected = session.get_state()
    path = length.state_file(subjects[1], LENGTH, request)
    state = read_state(path, subjects[1].state_shapes).state
    for name, array in expected.items():
        if name != POSITION:
            assert np.abs(state[name] - array).max() <= 1e-4 * np.abs(array).max()
    last = found[1]["differences"]["length"]["points"][-1]
    assert 0 < last["states"] < 1e-4 and abs(last["nll"]["value"]) < 1e-5
    norms = {n: float(np.linalg.norm(a)) for n, a in expected.items() if n.endswith(".rg_lru")}
    assert found[0]["suites"]["length"]["points"][-1]["norms"] == pytest.approx(norms, rel=1e-5)


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize(("survivors", "state_is_lost"), [(1, False), (4, False), (4, True)])
def test_a_run_that_was_killed_goes_on(survivors, state_is_lost, made, request_of, monkeypatch):
    subjects = [open_subject(str(made[0] / "onnx"))]
    suites = ["length", "text"]
    expected = runner.evaluate(subjects, suites, request_of("whole"))["models"]
    total = len(list((request_of("whole").folder / "pieces").glob("*.json")))
    put, done, redone = runner.Results.put, [], []

    def put_some(results, piece, result):
        if len(done) == survivors:
            raise Killed
        done.append(piece.key)
        put(results, piece, result)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(runner.Results, "put", put_some)
        runner.evaluate(subjects, suites, request_of("killed"))
    pieces = request_of("killed").folder / "pieces"
    if state_is_lost:
        states = list(pieces.glob("*.npz"))
        assert states
        for file in states:
            file.unlink()

    def put_again(results, piece, result):
        redone.append(piece.key)
        put(results, piece, result)

    monkeypatch.setattr(runner.Results, "put", put_again)
    found = runner.evaluate(subjects, suites, request_of("killed"))["models"]
    assert without_times(found) == without_times(expected)
    assert state_is_lost or (len(redone) == total - survivors and not {*redone} & {*done})
    assert not list(pieces.glob("*.npz"))


def test_each_state_has_figures_of_its_own(made, request_of):
    """Two states at the same place of one text, of different bits, give different losses."""
    folder = made[0]
    words = f"onnx -m {folder}/model --int4 --no-check -o {folder}/int4"
    assert run(words.split()) == 0
    subjects = [open_subject(str(folder / name)) for name in ("onnx", "int4")]
    runner.evaluate(subjects, ["length"], request_of("first"))
    found = []
    for subject in subjects:
        state = length.state_file(subject, 200, request_of("first"))
        again = request_of("second", state=state)
        (model,) = runner.evaluate(subjects[:1], ["length"], again)["models"]
        found.append([point["nll"] for point in model["suites"]["length"]["points"]])
        other = length.state_file(subject, 400, request_of())
        assert length.state_file(subject, 400, again) != other
    assert found[0] != found[1]


@pytest.mark.parametrize("engine", ["model", "onnx", "model.gguf"])
def test_another_engine_goes_on_from_a_state_file(engine, made, request_of):
    require_ggml()
    first = open_subject(str(made[0] / "onnx"))
    whole = runner.evaluate([first], ["length"], request_of("first"))["models"][0]
    state = length.state_file(first, 200, request_of("first"))
    other = [open_subject(str(made[0] / engine))]
    rest = runner.evaluate(other, ["length"], request_of("second", state=state))["models"][0]
    expected, found = (model["suites"]["length"] for model in (whole, rest))
    assert found["start"] == 200
    for point, same in zip(found["points"], expected["points"][2:], strict=True):
        assert point["to"] == same["to"]
        assert point["nll"][0] == pytest.approx(same["nll"][0], rel=1e-4)


def test_memory_in_pieces_is_memory_in_one(made, request_of, monkeypatch):
    subjects = [open_subject(str(made[0] / "onnx"))]
    found = []
    for span in (1000, 64, 33):
        monkeypatch.setattr(memory, "_SPAN", span)
        request = request_of(str(span), trials=10, farthest=200)
        found.append(runner.evaluate(subjects, ["memory"], request)["models"])
        chains = len(memory.TASKS) * 2
        assert len([*request.folder.glob("pieces/*.json")]) == chains * -(-200 // span)
    assert found[0] == found[1] == found[2]


def test_states_that_do_not_fit(made, request_of, tmp_path, capsys):
    folder = made[0]
    subject = open_subject(str(folder / "onnx"))
    request = request_of("first")
    runner.evaluate([subject], ["length"], request)
    state = length.state_file(subject, 200, request)
    other = tmp_path / "other.txt"
    other.write_text("Quite another text, which is long enough. " * 9)
    asked = "evaluate", str(folder / "onnx"), "--suite", "length", "-o", str(tmp_path / "r")
    text, weights = folder / "long.txt", folder / "model" / "model.safetensors"
    for used, seen, total, line in (
        (state, other, LENGTH, "has seen another text"),
        (weights, text, LENGTH, "no state file"),
        (state, text, 150, "has seen 200 tokens; expected fewer than 150: pass"),
    ):
        more = f"--state {used} --text {seen} --length {total}"
        assert run([*asked, *more.split()]) == 2
        assert line in capsys.readouterr().err


def test_the_page_and_the_tables(made, tmp_path, capsys):
    asked = "--suite", "length", "--length", str(LENGTH), "--text", str(made[0] / "long.txt")
    models = [str(made[0] / name) for name in ("model", "onnx")]
    assert run(["evaluate", *models, *asked, "-o", str(tmp_path / "r")]) == 0
    shown = capsys.readouterr().out
    assert "states off" in shown and "timed in turns" in shown
    page = (tmp_path / "r" / "evaluation.html").read_text()
    assert page.count("<svg") == 3 and "Largest norm of a recurrent state" in page
