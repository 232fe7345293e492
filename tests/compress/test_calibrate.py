"""Whole runs: interrupted and continued ones, mixtures, and requests that are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.compress import calibrate as module
from rgexport.compress.calibrate import BUILT_IN, CalibrationOptions, calibrate
from rgexport.compress.passages import Passages
from rgexport.compress.statistics import Collector
from rgexport.compress.work import Work
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import Checkpoint, demo_folder, open_checkpoint
from rgexport.griffin.huggingface import SINGLE
from rgexport.quantize.calibration import open_calibration
from rgexport.quantize.calibration_format import linears
from tests.command_line import rgexport
from tests.compress.collected import checkpoint_of, collected
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face

OPTIONS = CalibrationOptions(tokens=60, gradient_tokens=40, device="cpu")


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces sampling by random tokens; has the counts that were asked for."""
    asked = []

    def sample(checkpoint: Checkpoint, tokenizer: Any, count: int, **_: Any) -> list[np.ndarray]:
        asked.append(count)
        ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, count)
        return [ids[start : start + 20] for start in range(0, count, 20)]

    monkeypatch.setattr(module, "sample", sample)
    return asked


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 4, 7, 9, 11])
def test_a_continued_run_writes_the_same_file(
    after: int, sampled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends after so many arrays, half of the next one written."""
    checkpoint = checkpoint_of("not_by_32", tmp_path / "model")
    whole = calibrate(checkpoint, OPTIONS, tmp_path / "whole").read_bytes()
    target, save, count = tmp_path / "other", Work.save, 0

    def save_or_die(work: Work, name: str, array: np.ndarray) -> None:
        nonlocal count
        count += 1
        if count > after:
            (work.folder / f"{name}.writing").write_bytes(b"half")
            raise Killed
        save(work, name, array)

    monkeypatch.setattr(Work, "save", save_or_die)
    with pytest.raises(Killed):
        calibrate(checkpoint, OPTIONS, target)
    monkeypatch.setattr(Work, "save", save)
    assert not target.exists() and (tmp_path / "other.partial").is_dir()
    before = len(sampled)
    assert calibrate(checkpoint, OPTIONS, target).read_bytes() == whole
    assert len(sampled) == before + (after < 2), "the text is sampled once"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other", "whole"]


def test_a_layer_that_is_done_is_not_run_again(
    sampled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of("regular", tmp_path / "model")

    def die(collector: Collector) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Collector, "head", die)
        calibrate(checkpoint, OPTIONS, tmp_path / "target")
    monkeypatch.setattr(Collector, "_through", die)
    calibrate(checkpoint, OPTIONS, tmp_path / "target")


def unfinished(checkpoint: Checkpoint, target: Path, options: CalibrationOptions) -> None:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):

        def die(collector: Collector) -> None:
            raise Killed

        patched.setattr(Collector, "collect", die)
        calibrate(checkpoint, options, target)


def test_another_requests_work_is_not_continued(sampled: list[int], tmp_path: Path) -> None:
    checkpoint, target = checkpoint_of("regular", tmp_path / "model"), tmp_path / "target"
    unfinished(checkpoint, target, OPTIONS)
    other = CalibrationOptions(tokens=80, gradient_tokens=40, device="cpu")
    with pytest.raises(RequestError, match=r"another request \(--tokens, --sampled differ\)"):
        calibrate(checkpoint, other, target)
    calibrate(checkpoint, other, target, force=True)
    assert open_calibration(target).tokens == 80


def test_other_weights_are_another_request(sampled: list[int], tmp_path: Path) -> None:
    checkpoint, target = checkpoint_of("regular", tmp_path / "model"), tmp_path / "target"
    unfinished(checkpoint, target, OPTIONS)
    config = ODD_CONFIGS["regular"]
    other = open_checkpoint(write_hugging_face(config, random_weights(config, 1), tmp_path / "b"))
    with pytest.raises(RequestError, match=r"another request \(weights differ\)"):
        calibrate(other, OPTIONS, target)


def test_a_folder_of_the_users_is_left_alone(sampled: list[int], tmp_path: Path) -> None:
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "thesis").write_text("my work")
    checkpoint = checkpoint_of("regular", tmp_path / "model")
    with pytest.raises(RequestError, match="is no unfinished calibration; remove it"):
        calibrate(checkpoint, OPTIONS, tmp_path / "target", force=True)
    assert (tmp_path / "target.partial" / "thesis").read_text() == "my work"


def test_damaged_work_is_one_line(sampled: list[int], tmp_path: Path) -> None:
    checkpoint, target = checkpoint_of("regular", tmp_path / "model"), tmp_path / "target"
    unfinished(checkpoint, target, OPTIONS)
    (tmp_path / "target.partial" / "tokens.npy").write_bytes(b"no array")
    with pytest.raises(RequestError, match=r"tokens.npy is damaged; remove .*target.partial"):
        calibrate(checkpoint, OPTIONS, target)


def test_values_that_overflow_are_one_line(sampled: list[int], tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    weights = random_weights(config)
    weights["layers.1.mlp_block.up_proj.weight"] *= np.float32(1e30)
    folder = write_hugging_face(config, weights, tmp_path / "model")
    with pytest.raises(RequestError, match=r"the values at layers\.1\.mlp_block\.mul overflow"):
        calibrate(open_checkpoint(folder), OPTIONS, tmp_path / "target")


def test_a_mixture_has_both_texts(sampled: list[int], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The tide turned at four. " * 100)
    options = CalibrationOptions(text=tmp_path / "notes.txt", tokens=60, sampled=40, device="cpu")
    checkpoint = demo_with_one_layer(tmp_path / "model")
    found = open_calibration(calibrate(checkpoint, options, tmp_path / "target"))
    assert sampled == [40] and sorted(map(len, found.sequences)) == [20, 20, 20]
    assert found.provenance.text == "40 tokens sampled from the model and the text of notes.txt"
    tokenizer = load_tokenizer(demo_folder())
    texts = [tokenizer.decode(ids.tolist()) for ids in found.sequences]
    assert sum(text.startswith("The tide turned at four. The") for text in texts) == 1


def test_the_built_in_text_alone(tmp_path: Path) -> None:
    """Nothing sampled and no text of one's own: some of it is held out, as of any text."""
    options = CalibrationOptions(tokens=1024, sampled=0, held_out=512, device="cpu")
    checkpoint = demo_with_one_layer(tmp_path / "model")
    found = open_calibration(calibrate(checkpoint, options, tmp_path / "target"))
    assert found.provenance.text == "the built-in text" and found.tokens == 1024
    assert [len(ids) for ids in found.held_out] == [512]


def demo_with_one_layer(folder: Path) -> Checkpoint:
    """A tiny model with the demo's tokenizer."""
    from tests.models import make_config

    config = make_config("r", width=32, heads=2, vocab_size=8192)
    write_hugging_face(config, random_weights(config), folder)
    shutil.copy(demo_folder() / "tokenizer.model", folder)
    return open_checkpoint(folder)


def test_one_token_of_text(tmp_path: Path) -> None:
    """Hessians of rank 2 and dead tokens of the head are all that such a text gives."""
    (tmp_path / "a.txt").write_text("a")
    options = CalibrationOptions(text=tmp_path / "a.txt", device="cpu")
    checkpoint = demo_with_one_layer(tmp_path / "model")
    found = open_calibration(calibrate(checkpoint, options, tmp_path / "target"))
    assert found.tokens == 2
    (hessian,) = found.hessian("layers.0.mlp_block.down_proj.weight") or []
    assert np.linalg.matrix_rank(hessian) == 2
    assert np.count_nonzero(found.token_frequency) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "--tokens is 0; expected at least 1"),
        ({"gradient_tokens": 0}, "--gradient-tokens is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"held_out": -1}, "--held-out is -1"),
        ({"tokens": 9, "sampled": 10}, "--sampled 10 is more than --tokens 9"),
        ({"text": Path("a"), "sampled": -1}, "--sampled is -1"),
        ({"text": Path("a"), "tokens": 9, "sampled": 9}, "leaves nothing of --tokens 9"),
    ],
)
def test_contradictions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        CalibrationOptions(**options)


def test_a_narrow_model_takes_more_tokens() -> None:
    for width, tokens, held_out in ((64, 16384, 16384), (1024, 16384, 16384), (2560, 8192, 2048)):
        config = replace(ODD_CONFIGS["regular"], width=width)
        found = CalibrationOptions().for_model(config, readable=False)
        assert found.from_model == tokens
        assert found.with_held_out(tokens) == tokens + held_out
        few = CalibrationOptions(tokens=5).for_model(config, readable=False)
        assert few.from_model == few.with_held_out(5) == 5


def test_a_sixth_is_built_in() -> None:
    """Unless a user says what is sampled, or gives a text."""
    for given, sampled in (
        ({}, 13654),
        ({"tokens": 1024}, 854),
        ({"sampled": 16384}, 16384),
        ({"text": Path("a")}, 0),
    ):
        options = CalibrationOptions(**given).for_model(ODD_CONFIGS["regular"], readable=True)
        assert (options.from_model, options.from_text) == (sampled, (options.tokens or 0) - sampled)


def test_the_built_in_text_is_used_but_not_held_out(sampled: list[int], tmp_path: Path) -> None:
    checkpoint = demo_with_one_layer(tmp_path / "model")
    options = CalibrationOptions(tokens=240, held_out=240, device="cpu")
    found = open_calibration(calibrate(checkpoint, options, tmp_path / "target"))
    assert sampled == [400] and found.tokens == 240
    assert found.provenance.text == "200 tokens sampled from the model and the built-in text"
    assert [len(ids) for ids in found.held_out] == [20] * 10
    built_in = load_tokenizer(demo_folder()).encode_text(BUILT_IN.read_text())[:39]
    texts = [ids[1:].tolist() for ids in found.sequences]
    assert built_in in texts and texts[-1] != built_in
    assert not {*map(bytes, found.sequences)} & {*map(bytes, found.held_out)}


def test_a_tokenizer_of_another_vocabulary_reads_no_text(
    sampled: list[int], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("regular", tmp_path / "model")
    shutil.copy(demo_folder() / "tokenizer.model", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    found = open_calibration(calibrate(checkpoint, OPTIONS, tmp_path / "target"))
    assert found.provenance.text == "60 tokens sampled from the model"


def test_some_sequences_are_held_out(sampled: list[int], tmp_path: Path) -> None:
    """No statistic sees them: the rest alone gives the same."""
    checkpoint = checkpoint_of("regular", tmp_path / "model")
    options = replace(OPTIONS, held_out=40)
    found = open_calibration(calibrate(checkpoint, options, tmp_path / "some"))
    assert sampled == [100] and found.tokens == 60
    assert [len(ids) for ids in found.held_out] == [20, 20]
    texts = {bytes(ids) for ids in (*found.sequences, *found.held_out)}
    assert len(texts) == 5
    text = Passages(np.concatenate(found.sequences), np.array([20, 20, 20], np.int32))
    (tmp_path / "alone").mkdir()
    alone = collected(checkpoint, text, tmp_path / "alone", gradients=40)
    for name in linears(checkpoint.config):
        np.testing.assert_array_equal(found.hessian(name), alone.hessian(name))
        np.testing.assert_array_equal(
            found.output_sensitivity(name), alone.output_sensitivity(name)
        )


@pytest.mark.parametrize(
    ("words", "sequences", "held_out"), [(100, 1, 0), (900, 2, 0), (1900, 3, 1)]
)
def test_a_short_text_is_shared(words: int, sequences: int, held_out: int, tmp_path: Path) -> None:
    """A third of its sequences is held out, rounded down."""
    (tmp_path / "text").write_text("the " * words)
    checkpoint = demo_with_one_layer(tmp_path / "model")
    options = CalibrationOptions(text=tmp_path / "text", device="cpu")
    found = open_calibration(calibrate(checkpoint, options, tmp_path / "target"))
    assert (len(found.sequences), len(found.held_out)) == (sequences, held_out)
    assert found.tokens + sum(map(len, found.held_out)) > words


def test_a_mixture_leaves_something_for_the_text() -> None:
    options = CalibrationOptions(text=Path("a"), sampled=16384)
    with pytest.raises(RequestError, match="leaves nothing of --tokens 16384 for --text"):
        options.for_model(ODD_CONFIGS["regular"], readable=True)


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    checkpoint = checkpoint_of("regular", tmp_path / "model")
    for given, name in (
        (CalibrationOptions(text=tmp_path / "a.txt"), "a.txt"),
        (replace(OPTIONS, sampled=20), "the built-in text"),
    ):
        with pytest.raises(RequestError, match=f"has no tokenizer to read .*{name} with"):
            calibrate(checkpoint, given, tmp_path / "target")


def test_the_command(tmp_path: Path) -> None:
    """From the text to a file that opens, and a second run that is refused."""
    checkpoint_of("attention_only", tmp_path / "tiny")
    arguments = ("calibrate", "-m", "tiny", "--tokens", "30", "--device", "cpu")
    run = rgexport(*arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("tiny.calibration is complete (")
    assert run.stdout.endswith(
        f"rgexport onnx -m {tmp_path / 'tiny'} --int4 --calibration tiny.calibration\n"
    ) or run.stdout.endswith("rgexport onnx -m tiny --int4 --calibration tiny.calibration\n")
    for number in range(1, 6):
        assert f"[{number}/5] " in run.stderr
    found = open_calibration(tmp_path / "tiny.calibration")
    files = json.dumps(found.provenance.files)
    assert found.tokens == 30 and SINGLE in files
    again = rgexport(*arguments, folder=tmp_path)
    assert again.returncode == 2 and "tiny.calibration exists; pass --force" in again.stderr
    assert again.stderr.count("\n") == 1
