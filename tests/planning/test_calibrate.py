"""Calibrations: their texts, interrupted and continued runs, refused requests, and exports."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from rgexport.artifacts.opening import open_artifact
from rgexport.chat.sampling import Sampler
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import demo_folder, open_checkpoint
from rgexport.griffin.huggingface import SINGLE
from rgexport.griffin.layout import QUANTIZABLE, role_of
from rgexport.griffin.reference import Reference
from rgexport.planning import calibrate as module
from rgexport.planning import passages
from rgexport.planning.calibrate import CalibrationOptions, calibrate
from rgexport.planning.calibration_folder import CalibrationFolder
from rgexport.planning.layer_pass import Collector
from rgexport.planning.passages import LENGTH, Passages, read_text
from rgexport.quantize.algorithms.calibration_file import Calibration, linears, open_calibration
from rgexport.quantize.built_in_text import BUILT_IN
from tests.command_line import rgexport
from tests.evaluation.small_model import small_model
from tests.models import ODD_CONFIGS, make_config, random_weights, weight_source, write_hugging_face
from tests.planning.collected import checkpoint_of, collected

OPTIONS = CalibrationOptions(tokens=60, gradient_tokens=40, device="cpu")


@pytest.fixture
def sampled(monkeypatch):
    """Replaces sampling by random tokens; has the counts that were asked for."""
    asked = []

    def sample(checkpoint, tokenizer, count, **_):
        asked.append(count)
        ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, count)
        return [ids[start : start + 20] for start in range(0, count, 20)]

    monkeypatch.setattr(module, "sample", sample)
    return asked


@pytest.fixture
def checkpoint(tmp_path):
    return checkpoint_of("regular", tmp_path / "model")


@pytest.fixture
def demo_like(tmp_path):
    """A tiny model with the demo's tokenizer."""
    model, *_ = small_model(tmp_path, make_config("r", width=32, heads=2, vocab_size=8192))
    return open_checkpoint(model)


@pytest.mark.parametrize("after", [1, 4, 11])
def test_a_continued_run_writes_the_same_file(after, sampled, tmp_path, monkeypatch):
    checkpoint = checkpoint_of("not_by_32", tmp_path / "model")
    whole = calibrate(checkpoint, OPTIONS, tmp_path / "whole").read_bytes()
    target, save, count = tmp_path / "other", CalibrationFolder.save, 0

    def save_or_die(work, name, array):
        nonlocal count
        count += 1
        if count > after:
            (work.path / f"{name}.writing").write_bytes(b"half")
            raise KeyboardInterrupt
        save(work, name, array)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CalibrationFolder, "save", save_or_die)
        calibrate(checkpoint, OPTIONS, target)
    assert not target.exists() and (tmp_path / "other.partial").is_dir()
    before = len(sampled)
    assert calibrate(checkpoint, OPTIONS, target).read_bytes() == whole
    assert len(sampled) == before + (after < 2), "the text is sampled once"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other", "whole"]


def start(checkpoint, target, ends_at="collect"):
    """Leaves a run unfinished."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Collector, ends_at, Mock(side_effect=KeyboardInterrupt))
        calibrate(checkpoint, OPTIONS, target)


def test_a_layer_that_is_done_is_not_run_again(checkpoint, sampled, tmp_path, monkeypatch):
    start(checkpoint, tmp_path / "target", "head")
    monkeypatch.setattr(Collector, "_through", Mock(side_effect=KeyboardInterrupt))
    calibrate(checkpoint, OPTIONS, tmp_path / "target")


def test_only_the_same_requests_work_is_continued(checkpoint, sampled, tmp_path):
    target, other = tmp_path / "target", replace(OPTIONS, tokens=80)
    start(checkpoint, target)
    with pytest.raises(RequestError, match=r"another request \(--tokens, --sampled differ\)"):
        calibrate(checkpoint, other, target)
    with pytest.raises(RequestError, match=r"another request \(weights differ\)"):
        calibrate(checkpoint_of("regular", tmp_path / "b", seed=1), OPTIONS, target)
    (tmp_path / "target.partial" / "tokens.npy").write_bytes(b"no array")
    with pytest.raises(RequestError, match=r"tokens.npy is damaged; remove .*target.partial"):
        calibrate(checkpoint, OPTIONS, target)
    calibrate(checkpoint, other, target, force=True)
    assert open_calibration(target).tokens == 80


def test_a_folder_of_the_users_is_left_alone(checkpoint, sampled, tmp_path):
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "thesis").write_text("my work")
    with pytest.raises(RequestError, match="is no unfinished calibration; remove it"):
        calibrate(checkpoint, OPTIONS, tmp_path / "target", force=True)
    assert (tmp_path / "target.partial" / "thesis").read_text() == "my work"


def test_values_that_overflow_are_one_line(sampled, tmp_path):
    config = ODD_CONFIGS["regular"]
    weights = random_weights(config)
    weights["layers.1.mlp_block.up_proj.weight"] *= np.float32(1e30)
    folder = write_hugging_face(config, weights, tmp_path / "model")
    with pytest.raises(RequestError, match=r"the values at layers\.1\.mlp_block\.mul overflow"):
        calibrate(open_checkpoint(folder), OPTIONS, tmp_path / "target")


def test_a_mixture_has_both_texts(demo_like, sampled, tmp_path):
    (tmp_path / "notes.txt").write_text("The tide turned at four. " * 100)
    options = CalibrationOptions(text=tmp_path / "notes.txt", tokens=60, sampled=40, device="cpu")
    known = open_calibration(calibrate(demo_like, options, tmp_path / "target"))
    assert sampled == [40] and sorted(map(len, known.sequences)) == [20, 20, 20]
    assert known.provenance.text == "40 tokens sampled from the model and the text of notes.txt"
    texts = [load_tokenizer(demo_folder()).decode(ids.tolist()) for ids in known.sequences]
    assert sum(text.startswith("The tide turned at four. The") for text in texts) == 1


def test_the_built_in_text_is_used_but_not_held_out(demo_like, sampled, tmp_path):
    options = CalibrationOptions(tokens=240, held_out=240, device="cpu")
    known = open_calibration(calibrate(demo_like, options, tmp_path / "target"))
    assert sampled == [400] and known.tokens == 240
    assert known.provenance.text == "200 tokens sampled from the model and the built-in text"
    assert [len(ids) for ids in known.held_out] == [20] * 10
    built_in = load_tokenizer(demo_folder()).encode_text(BUILT_IN.read_text())[:39]
    texts = [ids[1:].tolist() for ids in known.sequences]
    assert built_in in texts and texts[-1] != built_in
    assert not {*map(bytes, known.sequences)} & {*map(bytes, known.held_out)}


def test_of_a_short_text_a_third_of_the_sequences_is_held_out(demo_like, tmp_path):
    (tmp_path / "text").write_text("the " * 1900)
    options = CalibrationOptions(text=tmp_path / "text", device="cpu")
    known = open_calibration(calibrate(demo_like, options, tmp_path / "target"))
    assert (len(known.sequences), len(known.held_out)) == (3, 1)
    assert known.tokens + sum(map(len, known.held_out)) > 1900


def test_no_statistic_sees_what_is_held_out(checkpoint, sampled, tmp_path):
    options = replace(OPTIONS, held_out=40)
    known = open_calibration(calibrate(checkpoint, options, tmp_path / "some"))
    assert sampled == [100] and (known.tokens, known.provenance.gradient_tokens) == (60, 40)
    assert [len(ids) for ids in known.held_out] == [20, 20]
    assert len({bytes(ids) for ids in (*known.sequences, *known.held_out)}) == 5
    text = Passages(np.concatenate(known.sequences), np.array([20, 20, 20], np.int32))
    (tmp_path / "alone").mkdir()
    alone = collected(checkpoint, text, tmp_path / "alone", gradients=40)
    for name in linears(checkpoint.config):
        for read in (Calibration.hessian, Calibration.output_sensitivity):
            np.testing.assert_array_equal(read(known, name), read(alone, name))


@pytest.mark.parametrize(
    ("width", "asked", "sampled", "from_text", "held_out"),
    [
        (1024, {}, 13654, 2730, 16384),
        (2560, {}, 6827, 1365, 2048),
        (1024, {"sampled": 16384}, 16384, 0, 16384),
        (1024, {"text": Path("a")}, 0, 16384, 16384),
    ],
)
def test_defaults(width, asked, sampled, from_text, held_out):
    """A sixth is the built-in text, and a narrow model takes more."""
    config = replace(ODD_CONFIGS["regular"], width=width)
    options = CalibrationOptions(**asked).for_model(config, readable=True)
    tokens = options.from_model, options.from_text, options.held_out
    assert tokens == (sampled, from_text, held_out)


def test_the_command(tmp_path):
    checkpoint_of("attention_only", tmp_path / "tiny")
    arguments = ("calibrate", "-m", "tiny", "--tokens", "30", "--device", "cpu")
    first = rgexport(*arguments, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("tiny.calibration is complete (")
    assert first.stdout.endswith(" --int4 --calibration tiny.calibration\n")
    assert all(f"[{number}/5] " in first.stderr for number in range(1, 6))
    known = open_calibration(tmp_path / "tiny.calibration")
    assert known.tokens == 30 and SINGLE in " ".join(known.provenance.files)
    again = rgexport(*arguments, folder=tmp_path)
    assert again.returncode == 2 and "tiny.calibration exists; pass --force" in again.stderr
    assert again.stderr.count("\n") == 1
    checkpoint_of("regular", tmp_path / "other")
    words = ("onnx", "-m", "other", "--int4", "--calibration", "tiny.calibration", "-o", "out")
    foreign = rgexport(*words, folder=tmp_path)
    assert foreign.returncode == 2 and "was made from other weights" in foreign.stderr
    assert not (tmp_path / "out").exists()


CONFIG = make_config("rra", width=96, heads=4, lru_width=64, mlp_width=160)


@pytest.mark.full
@pytest.mark.parametrize("words", ["onnx --int4", "coreml --precision pal4", "gguf --type q4_0"])
def test_better_quality_has_less_loss(words, tmp_path):
    weights, errors = random_weights(CONFIG), []
    write_hugging_face(CONFIG, weights, tmp_path / "odd")
    for quality in ("fast", "default", "best", "best"):
        asked = (*words.split(), *(["--pure"] if "gguf" in words else []), "--no-check")
        target = tmp_path / f"{len(errors)}{'.gguf' if 'gguf' in words else ''}"
        done = rgexport(*asked, "-m", "odd", "--quality", quality, "-o", target, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        stored = open_artifact(target).weights
        errors.append(
            {n: stored[n].whole() - weights[n] for n in stored if role_of(n) in QUANTIZABLE}
        )
    assert "Taking the calibration odd.calibration" in done.stderr
    known = open_calibration(tmp_path / "odd.calibration")
    fast, default, best, again = (
        sum(np.einsum("nk,kl,nl->", w, known.hessian(n)[0], w) for n, w in error.items())
        for error in errors
    )
    assert default <= fast * 1.001
    assert again == best < 0.95 * default


@pytest.mark.parametrize("limit", [1, 3, LENGTH + 1, LENGTH + 2, 1300])
def test_a_text_is_cut_into_sequences_that_begin_with_a_bos(tmp_path, limit):
    tokenizer = load_tokenizer(demo_folder())
    words = "The tide turned in the harbour office at four. " * 300
    (tmp_path / "text").write_text(words)
    pieces = read_text(tmp_path / "text", tokenizer, limit)
    assert all(s[0] == tokenizer.bos_id and len(s) <= LENGTH for s in pieces)
    ids = np.concatenate([s[1:] for s in pieces]).tolist()
    assert ids == tokenizer.encode_text(words)[: len(ids)]
    assert limit - 1 <= sum(map(len, pieces)) <= limit


def test_a_file_without_text_is_refused(tmp_path):
    for content, message in ((b"", "has no text in it"), (b"\xff\xfe", "as UTF-8 text")):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(RequestError, match=message):
            read_text(tmp_path / "text", load_tokenizer(demo_folder()), 100)


def test_samples_begin_with_a_bos_and_an_ordinary_token():
    tokenizer = load_tokenizer(demo_folder())
    starts = passages._random_starts(tokenizer, 8192, 3000, np.random.default_rng(0))
    assert starts.shape == (3000, 2) and set(starts[:, 0]) == {tokenizer.bos_id}
    assert not set(starts[:, 1]) & set(tokenizer.special.values())
    assert len(set(starts[:, 1])) > 2000 and starts.max() < 8192


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_each_token_is_drawn_from_the_models_distribution(precision, tmp_path, monkeypatch):
    """Drawn at a temperature near 0, each token is the reference's first choice."""
    monkeypatch.setattr(
        passages, "Sampler", lambda options: Sampler(replace(options, temperature=1e-6))
    )
    monkeypatch.setattr(passages, "_BATCH", 2)
    monkeypatch.setattr(passages, "LENGTH", 24)
    if precision == "int4":
        monkeypatch.setattr(passages, "_LARGEST_IN_FLOAT32", 0)
    checkpoint = checkpoint_of("wide_lru", tmp_path / "model")
    assert checkpoint.config.window < 24
    texts = passages.sample(checkpoint, None, 70, seed=0, folder=tmp_path / "sampled")
    assert [len(ids) for ids in texts] == [24, 24, 22] and not (tmp_path / "sampled").exists()
    reference = Reference(checkpoint.config, weight_source(random_weights(checkpoint.config)))
    for ids in texts:
        logits = reference.logits(reference.run(ids[None, :-1])[0])[0]
        chosen = (logits.argmax(1) == ids[1:]).mean()
        assert chosen == 1 if precision == "fp32" else chosen > 0.5
