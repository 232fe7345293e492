"""Reference files: they read back, and damaged or impossible ones are refused in one line."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import zero_state
from rgexport.validate import metrics
from rgexport.validate.reference.capture import OWN, ROOM, capture, choose_implementation
from rgexport.validate.reference.reference_file import (
    is_reference,
    read_reference,
    write_reference,
)
from tests.command_line import rgexport
from tests.models import ODD_CONFIGS, make_config, random_weights, weight_source, write_hugging_face
from tests.validate.toys import counted

CAPTURE = "rgexport.validate.reference.capture"
CONFIG = make_config("ra", width=32, heads=2, vocab_size=64, window=8)


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Prompts of 3 and 20 tokens, five of whose positions have logits."""
    folder = tmp_path_factory.mktemp("captured")
    model = write_hugging_face(CONFIG, random_weights(CONFIG), folder / "model")
    (folder / "p").write_text(json.dumps([[0, 1, 2], list(range(3, 23))]))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOGITS_BYTES": 0, "LEAST_POSITIONS": 5}.items():
            patch.setattr(f"{CAPTURE}.{name}", value)
        patch.setattr(metrics, "FIRST_CHECKPOINT", 8)
        source = open_checkpoint(model)
        file = capture(source, folder / "r", prompts=folder / "p", device="cpu")
    header = read_reference(file).header
    short, long = header.prompts
    assert (short.positions, long.positions) == ((0, 2), (8, 18, 19))
    assert (short.checkpoints, long.checkpoints) == ((), (8, 16))
    prompts = short, replace(long, greedy_tokens=2)
    arrays = load_file(file) | {"greedy.1": np.array([5, 6])}
    return replace(header, prompts=prompts), arrays


@pytest.fixture
def content(captured):
    header, arrays = captured
    return header, dict(arrays)


@pytest.fixture
def file(tmp_path, content):
    path = tmp_path / "small.reference"
    write_reference(path, *content)
    return path


def test_it_is_a_safetensors_file_that_reads_back(file, content):
    header, arrays = content
    reference, again = read_reference(file), load_file(file)
    assert reference.header == replace(header, data_sha256=reference.header.data_sha256)
    assert reference.greedy(0).tolist() == [] and reference.greedy(1).tolist() == [5, 6]
    assert arrays.keys() == again.keys()
    assert all(np.array_equal(array, again[name]) for name, array in arrays.items())


def test_only_a_reference_is_replaced(file, content, tmp_path):
    other = tmp_path / "other"
    save_file({"x": np.zeros(1, np.float32)}, other)
    assert is_reference(file) and not is_reference(other)
    with pytest.raises(RequestError, match="--force"):
        write_reference(file, *content)
    header, arrays = content
    write_reference(file, replace(header, model="other"), arrays, force=True)
    assert read_reference(file).header.model == "other"
    with pytest.raises(RequestError, match="something else"):
        write_reference(other, *content, force=True)
    lines = {other: "expected a reference", tmp_path: "a folder", tmp_path / "no": "No such file"}
    for path, line in lines.items():
        with pytest.raises(RequestError, match=line):
            read_reference(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "small.reference"]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda data: data[:-1], "is truncated"),
        (lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], "has another hash"),
        (lambda data: b"", "is not a safetensors file"),
        (lambda data: data[:40], "is truncated"),
    ],
)
def test_damage_is_one_line(file, damage, line):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RequestError, match=rf"{line}[^\n]*$"):
        read_reference(file)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        ("tokens", np.full(23, 64)),
        ("logits.1", np.zeros((2, 64), np.uint16)),
        ("scales.0", np.full((2, 2), np.inf, np.float32)),
        ("greedy.1", np.array([-1, 0])),
        ("squares", lambda squares: -squares),
        ("states.1.layers.0.rg_lru", np.full(32, np.nan, np.float32)),
        ("weights.final_norm.weight", None),
        ("checkpoints.1.layers.0.rg_lru", np.zeros((1, 32), np.float32)),
        ("checkpoints.1.layers.1.key", np.zeros((2, 8, 16), np.float32)),
    ],
)
def test_impossible_values(tmp_path, content, array, values):
    header, arrays = content
    arrays[array] = values(arrays[array]) if callable(values) else values
    present = {name: value for name, value in arrays.items() if value is not None}
    write_reference(tmp_path / "r", header, present)
    with pytest.raises(RequestError, match=rf"is damaged: .*{array.split('.')[0]}[^\n]*$"):
        read_reference(tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"format_version": 99}, "update rgexport"),
        ({"format_version": 2}, "format version 2; this rgexport reads 3: make it again"),
        ({"prompts": ()}, "is damaged: prompts"),
        ({"config": replace(CONFIG, window=0)}, "is damaged: in its metadata, config.window"),
        ({"checkpoints": (16, 8)}, "is damaged: checkpoints"),
        ({"checkpoints": (1 << 62, 1 << 63)}, "is damaged: checkpoints"),
        ({"positions": ()}, "is damaged: positions of logits"),
        ({"positions": (0, 20)}, "is damaged: positions of logits"),
    ],
)
def test_an_impossible_header(tmp_path, content, change, line):
    """Changes a field of the header, or else of all prompts."""
    header, arrays = content
    if not change.keys() <= vars(header).keys():
        change = {"prompts": tuple(replace(p, **change) for p in header.prompts)}
    write_reference(tmp_path / "r", replace(header, **change), arrays)
    with pytest.raises(RequestError, match=rf"{line}[^\n]*$"):
        read_reference(tmp_path / "r")


@pytest.fixture(scope="module")
def small(checkpoint) -> Checkpoint:
    return open_checkpoint(checkpoint)


def test_deepminds_implementation_gives_the_same_file(small, tmp_path, monkeypatch):
    pytest.importorskip("recurrentgemma")
    ours = read_reference(capture(small, tmp_path / "ours", device="cpu"))
    theirs = read_reference(capture(small, tmp_path / "theirs", device="cpu", impl="deepmind"))
    assert ours.header.computed["implementation"].startswith("rgexport ")
    assert theirs.header.computed["implementation"].startswith("recurrentgemma ")
    assert ours.header.computed["dtype"] == "float32" and theirs.header.computed["tf32"] == "off"
    assert theirs.header.config == small.config and theirs.header.prompts == ours.header.prompts
    for index, prompt in enumerate(ours.header.prompts):
        logits, others = (file.logits(index, 0, prompt.tokens) for file in (ours, theirs))
        assert np.abs(others - logits).max() <= 5e-5 * max(1, np.abs(logits).max())
    arrays, others = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    for name in (name for name in arrays if name.startswith(("states", "checkpoints"))):
        np.testing.assert_allclose(others[name], arrays[name], rtol=1e-4, atol=1e-4)
    module = "rgexport.validate.reference.deepmind_model"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "recurrentgemma", None)  # what makes an import fail
    with pytest.raises(RequestError, match=r"pip install .*recurrentgemma[^\n]*$"):
        capture(small, tmp_path / "r", device="cpu", impl="deepmind")


@pytest.mark.parametrize("shape", ["regular", "wide_lru", "attention_tail", "irregular"])
def test_deepminds_implementation_goes_on_from_our_states(shape):
    """From the beginning, and from states each at a position of its own."""
    pytest.importorskip("recurrentgemma")
    weights = weight_source(random_weights(ODD_CONFIGS[shape]))
    model = choose_implementation("deepmind", "cpu", False)(ODD_CONFIGS[shape], weights)
    own, rng = NumpyReference(model.config, weights), np.random.default_rng(5)
    window, vocab = own.config.window, own.config.vocab_size
    lengths = (1, 2, window - 1, window, 40)
    before = [own.run(rng.integers(0, vocab, (1, length)))[1] for length in lengths]
    state = {key: np.concatenate([one[key] for one in before]) for key in before[0]}
    calls = ((1, 3 * window + 5), None), ((len(lengths), 3), state)
    for size, start in calls:
        tokens = rng.integers(0, vocab, size)
        (theirs, after), (ours, expected) = model.run(tokens, start), own.run(tokens, start)
        logits = own.logits(ours)
        assert np.abs(model.logits(theirs) - logits).max() <= 2e-5 * np.abs(logits).max()
        assert expected.keys() == after.keys()
        for name, array in expected.items():
            assert after[name].shape == array.shape and after[name].dtype == array.dtype, name
            np.testing.assert_allclose(after[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("change", [{"lru_heads": 2}, {"rope_theta": 5000.0}])
def test_what_deepminds_package_cannot_run_is_refused(change):
    pytest.importorskip("recurrentgemma")
    config = ODD_CONFIGS["regular"]
    weights = weight_source(random_weights(config))
    with pytest.raises(RequestError, match=next(iter(change))):
        choose_implementation("deepmind", "cpu", False)(replace(config, **change), weights)


def test_weights_stay_in_memory_only_where_they_fit(small, monkeypatch, capsys):
    config, weights = small.config, small.weights
    needed = sum(4 * math.prod(weights[name].shape) for name in model_tensors(config))

    def keeps(free: int | None, low_memory: bool = False) -> bool:
        monkeypatch.setattr(f"{CAPTURE}.available_bytes", lambda: free)
        model = choose_implementation(OWN, "cpu", low_memory)(config, weights)
        model.logits(model.run(np.array([[1, 2, 3]]))[0])
        return bool(vars(model)["_layers"]) and bool(vars(model)["_head"])

    enough = int(ROOM * needed) + (2 << 30) + 1
    assert keeps(enough) and not keeps(enough, low_memory=True)
    assert "one layer at a time" not in capsys.readouterr().err
    assert not keeps(enough - 2) and not keeps(None)
    assert "one layer at a time" in capsys.readouterr().err
    keeps(needed - 1)
    with pytest.raises(RequestError, match=r"of memory for the weights alone[^\n]*$"):
        choose_implementation("deepmind", "cpu", low_memory=False)(config, weights)


@pytest.mark.parametrize("keep", [False, True])
def test_all_prompts_read_each_weight_once(small, keep):
    """Once in all where the weights are kept, else once in each pass."""
    reads: list[str] = []
    alone = NumpyReference(small.config, small.weights)
    model = NumpyReference(small.config, counted(small.weights, reads), keep=keep)
    texts = [np.arange(n)[None] for n in (1, 5, 40)]
    for count in (1, 1 if keep else 2):
        together = model.run_each([(text, zero_state(small.config, 1)) for text in texts])
        assert reads.count("layers.0.mlp_block.gate_proj.weight") == count
        for text, (hidden, after) in zip(texts, together, strict=True):
            expected, state = alone.run(text)
            assert np.allclose(hidden, expected, atol=1e-5)
            assert all(np.allclose(state[name], after[-1][name], atol=1e-5) for name in state)


def test_logits_exist_for_one_block_at_a_time(small, tmp_path, monkeypatch):
    (tmp_path / "p").write_text(json.dumps([[1 + i % 250 for i in range(300)], [5], [6, 7]]))
    monkeypatch.setattr(f"{CAPTURE}.BLOCK_BYTES", 20 * 4 * small.config.vocab_size)
    asked: list[int] = []
    compute = NumpyReference.logits

    def counted(self, hidden):
        asked.append(hidden.shape[1])
        return compute(self, hidden)

    monkeypatch.setattr(NumpyReference, "logits", counted)
    file = read_reference(capture(small, tmp_path / "r", device="cpu", prompts=tmp_path / "p"))
    assert len(file.tokens) == sum(asked) == 303 and max(asked) == 20


def test_nothing_is_written_or_replaced_by_a_wrong_request(checkpoint, small, tmp_path):
    asked = ["reference", "-m", str(checkpoint), "-o", "r", "--impl", "deepmind", "--low-memory"]
    wrong = rgexport(*asked, folder=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    with pytest.raises(RequestError, match="device"):
        capture(small, tmp_path / "r", device="no such device")
    assert not list(tmp_path.iterdir())
    (tmp_path / "r").write_text("words")
    with pytest.raises(RequestError, match="something else"):
        capture(small, tmp_path / "r", force=True)
    assert (tmp_path / "r").read_text() == "words"
