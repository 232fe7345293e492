import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.safetensors_file import read_metadata
from rgexport.validate import states
from rgexport.validate.reference import kept_logits
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_file import (
    FORMAT_VERSION,
    METADATA,
    SUMS,
    Header,
    is_reference,
    write_reference,
)
from rgexport.validate.reference.reference_reader import read_reference
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("ra", width=32, heads=2, vocab_size=64, window=8)
Content = tuple[Header, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Content:
    """Prompts of 3 and 20 tokens: positions 2 and 22 are full, the others have 8-bit codes."""
    folder = tmp_path_factory.mktemp("captured")
    model = write_hugging_face(CONFIG, random_weights(CONFIG), folder / "model")
    (folder / "p").write_text(json.dumps([[0, 1, 2], list(range(3, 23))]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_logits, "LOGITS_BYTES", 5000)
        patch.setattr(kept_logits, "FULL", 2)
        patch.setattr(kept_logits, "WATCHED", 3)
        patch.setattr(states, "FIRST_CHECKPOINT", 8)
        asked: dict[str, Any] = {"prompts": folder / "p", "device": "cpu"}
        found = read_reference(capture(open_checkpoint(model), folder / "r", **asked))
    assert found.full_positions.tolist() == [2, 22] and found.header.tail_bits == 8
    assert found.header.watched == (2, 3, 22)
    short, long = found.header.prompts
    assert (short.checkpoints, long.checkpoints) == ((), (8, 16))
    long = dataclasses.replace(long, greedy_tokens=2)
    header = dataclasses.replace(found.header, prompts=(short, long))
    return header, load_file(folder / "r") | {"greedy.1": np.array([5, 6])}


@pytest.fixture
def content(captured) -> Content:
    header, arrays = captured
    return header, dict(arrays)


@pytest.fixture
def file(tmp_path, content) -> Path:
    path = tmp_path / "small.reference"
    write_reference(path, *content)
    return path


def test_it_is_a_safetensors_file_that_reads_back(file, content):
    header, arrays = content
    found, again = read_reference(file), load_file(file)
    assert found.header == dataclasses.replace(header, data_sha256=found.header.data_sha256)
    assert found.greedy(0).tolist() == [] and found.greedy(1).tolist() == [5, 6]
    assert arrays.keys() == again.keys()
    assert all(np.array_equal(array, again[name]) for name, array in arrays.items())
    assert json.loads(read_metadata(file)[METADATA])["format_version"] == FORMAT_VERSION


def test_only_a_reference_is_replaced(file, content, tmp_path):
    other = tmp_path / "other"
    save_file({"x": np.zeros(1, np.float32)}, other)
    assert is_reference(file) and not is_reference(other)
    with pytest.raises(RequestError, match="--force"):
        write_reference(file, *content)
    header, arrays = content
    write_reference(file, dataclasses.replace(header, model="other"), arrays, force=True)
    assert read_reference(file).header.model == "other"
    with pytest.raises(RequestError, match="something else"):
        write_reference(other, *content, force=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "small.reference"]


def test_a_failed_write_leaves_nothing(tmp_path, content, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RequestError, match="no space left"):
        write_reference(tmp_path / "r", *content)
    assert not list(tmp_path.iterdir())


def cut(data: bytearray) -> bytes:
    return bytes(data[:-1])


def flip(data: bytearray) -> bytes:
    data[-100] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (cut, "is truncated"),
        (flip, "has another hash"),
        (lambda data: b"", "is not a safetensors file"),
        (lambda data: b"words", "is not a safetensors file"),
        (lambda data: bytes(data[:40]), "is truncated"),
    ],
)
def test_damage_is_one_line(file, damage, line):
    file.write_bytes(damage(bytearray(file.read_bytes())))
    with pytest.raises(RequestError, match=rf"{line}[^\n]*$"):
        read_reference(file)


def nan(values: np.ndarray) -> np.ndarray:
    return np.full_like(values, np.nan)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        ("tokens", np.full(23, 64)),
        ("kept.ids", lambda ids: ids + 60),
        ("kept.ids", lambda ids: ids * 0 - 1),
        ("kept.ids", lambda ids: ids * 0 + np.iinfo(np.int32).max),
        ("kept.ids", lambda ids: ids * 0),
        ("full.positions", np.array([22, 2])),
        ("full.positions", np.array([2, 23])),
        ("kept.counts", np.full(23, 1)),
        ("sums", np.full((23, len(SUMS)), np.nan)),
        ("sums", np.zeros((23, 2))),
        ("greedy.1", np.array([-1, 0])),
        ("greedy.1", None),
        ("layers", np.zeros(1)),
        ("activations", None),
        ("activations", np.zeros((3, 2, 31), np.float32)),
        ("activations", np.zeros((2, 2, 32), np.float32)),
        ("activations", np.full((3, 2, 32), np.inf, np.float32)),
        ("squares", nan),
        ("squares", lambda squares: -squares),
        ("states.1.layers.0.rg_lru", np.full(32, np.nan, np.float32)),
        ("states.1.layers.1.key", np.full((8, 16), np.inf, np.float32)),
        ("checkpoints.1.layers.0.rg_lru", np.full((2, 32), np.nan, np.float32)),
        ("full.logits", np.full((2, 64), np.nan, np.float32)),
        ("kept.logits", nan),
        ("squares", np.zeros(3)),
        ("weights.final_norm.weight", None),
        ("weights.final_norm.weight", np.full((32, 1), np.nan, np.float32)),
        ("weights.embed_tokens.weight", np.zeros((64, 4), np.float32)),
        ("weights.lm_head.weight", np.zeros((64, 4), np.float32)),
        ("checkpoints.1.layers.0.rg_lru", None),
        ("checkpoints.1.layers.0.rg_lru", np.zeros((1, 32), np.float32)),
        ("checkpoints.1.layers.0.conv1d", np.zeros((2, 3, 32), np.float64)),
        ("checkpoints.0.layers.0.rg_lru", np.zeros((2, 32), np.float32)),
        ("checkpoints.1.layers.1.key", np.zeros((2, 8, 16), np.float32)),
    ],
)
def test_impossible_values(tmp_path, content, array, values):
    header, arrays = content
    if callable(values):
        values = values(arrays[array])
    if values is None:
        del arrays[array]
    else:
        arrays[array] = values
    write_reference(tmp_path / "r", header, arrays)
    with pytest.raises(RequestError, match=rf"is damaged: .*{array.split('.')[0]}[^\n]*$"):
        read_reference(tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "update rgexport"),
        ({"format_version": 1}, "capture it again"),
        ({"tail_bits": 7}, "is damaged: tail_bits is 7"),
        ({"prompts": ()}, "is damaged: prompts"),
        ({"model": 3}, "is damaged: model is 3"),
        ({"watched": (2, 2, 22)}, "is damaged: watched is"),
        ({"watched": (2, 12, 23)}, "is damaged: watched is"),
        ({"watched": (-1, 12, 22)}, "is damaged: watched is"),
        ({"watched": ()}, "is damaged: activations is unknown"),
        ({"config": dataclasses.replace(CONFIG, window=0)}, "is damaged: config.window"),
        *(
            ({"checkpoints": points}, "is damaged: checkpoints")
            for points in [(0, 8), (16, 8), (8, 20), (8, 16, 17), (1 << 62, 1 << 63)]
        ),
        ({"full_positions": 0}, "is damaged: no position is full"),
    ],
)
def test_an_impossible_header(tmp_path, content, change, line):
    """Changes a field of the header, or else of all prompts."""
    header, arrays = content
    if not change.keys() <= vars(header).keys():
        prompts = tuple(dataclasses.replace(prompt, **change) for prompt in header.prompts)
        change = {"prompts": prompts}
    write_reference(tmp_path / "r", dataclasses.replace(header, **change), arrays)
    with pytest.raises(RequestError, match=rf"{line}[^\n]*$"):
        read_reference(tmp_path / "r")


def test_other_files_are_refused(tmp_path):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other")
    for name, line in (
        ("other", "not a reference file"),
        ("no", "no such file"),
        (".", "a folder"),
    ):
        with pytest.raises(RequestError, match=line):
            read_reference(tmp_path / name)
