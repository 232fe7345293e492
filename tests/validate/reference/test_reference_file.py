import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rgexport.errors import RequestError
from rgexport.files.hashing import FileRecord
from rgexport.griffin.safetensors_file import read_metadata
from rgexport.griffin.state import state_specs
from rgexport.griffin.tensor import from_array
from rgexport.validate.reference.capture import sketch_arrays
from rgexport.validate.reference.condensed import CODES, Condensed, condense
from rgexport.validate.reference.reference_file import (
    FORMAT_VERSION,
    METADATA,
    SUMS,
    Header,
    PromptRecord,
    checkpoint_name,
    checkpoint_specs,
    state_name,
    stored_shape,
)
from rgexport.validate.reference.reference_reader import read_reference
from rgexport.validate.reference.reference_writer import is_reference, write_reference
from tests.models import make_config, random_weights

CONFIG = make_config("ra", width=32, heads=2, vocab_size=64, window=8)
LENGTHS, FULL, WATCHED, CHECKPOINTS = (3, 20), (2, 22), (2, 12, 22), (8, 16)


def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(sum(LENGTHS), 64)).astype(np.float32)


def activations() -> np.ndarray:
    shape = len(WATCHED), CONFIG.num_layers, CONFIG.width
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def condensed(position: int, bits: int) -> Condensed:
    return condense(logits()[position], bits, 20)


def content(bits: int) -> tuple[Header, dict[str, np.ndarray]]:
    """A small file; its position 2 and 22 are full."""
    rest = [i for i in range(sum(LENGTHS)) if i not in FULL]
    kept = {i: condensed(i, bits) for i in rest}
    sums = np.zeros((sum(LENGTHS), len(SUMS)))
    for i, c in kept.items():
        t = c.tail
        sums[i] = c.log_sum_exp, 1.5, 0.7, t.mass, t.offset, t.moved, t.floor, t.step
    arrays = {
        "tokens": np.arange(sum(LENGTHS)),
        "full.positions": np.array(FULL),
        "full.logits": logits()[list(FULL)],
        "kept.counts": np.array([len(kept[i].ids) if i in kept else 0 for i in range(23)]),
        "kept.ids": np.concatenate([c.ids for c in kept.values()]).astype(np.int32),
        "kept.logits": np.concatenate([c.logits for c in kept.values()]),
        "sums": sums,
        "greedy.1": np.array([5, 6]),
        "activations": activations(),
        **sketch_arrays(
            CONFIG, {name: from_array(w) for name, w in random_weights(CONFIG).items()}
        ),
    }
    if bits:
        arrays["codes"] = np.stack([c.tail.codes for c in kept.values()])  # type: ignore[misc]
    for index, length in enumerate(LENGTHS):
        for spec in state_specs(CONFIG):
            shape = stored_shape(spec, length)
            arrays[state_name(index, spec)] = np.full(shape, index + 1, np.float32)
    for spec in checkpoint_specs(CONFIG):
        values = [np.full(spec.shape, n, np.float32) for n in CHECKPOINTS]
        arrays[checkpoint_name(1, spec)] = np.stack(values)
    prompts = tuple(
        PromptRecord(f"p{i}", n, None, 1, 2 * i, {"KL": "an interval"}, CHECKPOINTS if i else ())
        for i, n in enumerate(LENGTHS)
    )
    header = Header(
        model="small",
        config=CONFIG,
        files={"model.safetensors": FileRecord("0" * 64, 1)},
        computed={"device": "cpu"},
        environment={"cores": 2},
        tail_bits=bits,
        prompts=prompts,
        watched=WATCHED,
    )
    return header, arrays


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.reference"
    write_reference(path, *content(16))
    return path


@pytest.mark.parametrize("bits", sorted(CODES))
def test_it_reads_back_what_was_written(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "r"
    header, arrays = content(bits)
    write_reference(path, header, arrays)
    found = read_reference(path)
    digest = found.header.data_sha256
    assert found.header == dataclasses.replace(header, data_sha256=digest)
    assert [(i, p.name, s.start, s.stop) for i, p, s in found.spans()] == [
        (0, "p0", 0, 3),
        (1, "p1", 3, 23),
    ]
    for position in range(23):
        assert found.is_full(position) == (position in FULL)
        if position in FULL:
            assert np.array_equal(found.full_logits(position), logits()[position])
            continue
        ours, theirs = condensed(position, bits), found.condensed(position)
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.logits, theirs.logits)
        assert ours.log_sum_exp == theirs.log_sum_exp
        assert dataclasses.replace(ours.tail, codes=None) == dataclasses.replace(
            theirs.tail, codes=None
        )
        if bits:
            assert np.array_equal(ours.tail.codes, theirs.tail.codes)  # type: ignore[arg-type]
    assert found.greedy(0).tolist() == [] and found.greedy(1).tolist() == [5, 6]


def test_a_state_has_zeros_in_front_of_a_short_prompt(file: Path) -> None:
    found = read_reference(file)
    short, long = found.state(0), found.state(1)
    assert short["layers.1.key"].shape == long["layers.1.key"].shape == (1, 8, 16)
    assert short["layers.1.key"][0, :, 0].tolist() == [0] * 5 + [1] * 3
    assert (long["layers.1.key"] == 2).all()
    assert short["position"].tolist() == [3]


def test_there_is_what_a_layer_gave_and_what_it_knew_on_the_way(file: Path) -> None:
    found = read_reference(file)
    assert found.header.watched == WATCHED
    for place, expected in enumerate(activations()):
        assert np.array_equal(found.activations(place), expected)
    assert found.checkpoints(0) == {}
    inside = found.checkpoints(1)
    assert list(inside) == list(CHECKPOINTS)
    for count, state in inside.items():
        assert state.keys() == {"layers.0.rg_lru", "layers.0.conv1d"}
        assert state["layers.0.conv1d"].shape == (1, 3, 32)
        assert all((array == count).all() for array in state.values())


def test_others_can_read_it(file: Path) -> None:
    arrays = load_file(file)
    assert np.array_equal(arrays["full.logits"], logits()[list(FULL)])
    assert json.loads(read_metadata(file)[METADATA])["format_version"] == FORMAT_VERSION


def test_only_a_reference_is_replaced(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_file({"x": np.zeros(1, np.float32)}, other)
    assert is_reference(file) and not is_reference(other)
    with pytest.raises(RequestError, match="--force"):
        write_reference(file, *content(0))
    write_reference(file, *content(0), force=True)
    assert read_reference(file).header.tail_bits == 0
    with pytest.raises(RequestError, match="something else"):
        write_reference(other, *content(0), force=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "small.reference"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RequestError, match="no space left"):
        write_reference(tmp_path / "r", *content(0))
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
def test_damage_is_one_line(file: Path, damage: Callable[[bytearray], bytes], line: str) -> None:
    file.write_bytes(damage(bytearray(file.read_bytes())))
    with pytest.raises(RequestError, match=line) as raised:
        read_reference(file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        ("tokens", np.full(23, 64)),
        ("kept.ids", None),
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
        ("squares", np.full(29, np.nan)),
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
def test_values_that_cannot_be(tmp_path: Path, array: str, values: np.ndarray | None) -> None:
    header, arrays = content(8)
    if array == "kept.ids":
        values = arrays[array] + 60
    if values is None:
        del arrays[array]
    else:
        arrays[array] = values
    write_reference(tmp_path / "r", header, arrays)
    with pytest.raises(RequestError, match=f"is damaged: .*{array.split('.')[0]}") as raised:
        read_reference(tmp_path / "r")
    assert "\n" not in str(raised.value)


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
    ],
)
def test_a_header_that_cannot_be(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    header, arrays = content(0)
    write_reference(tmp_path / "r", dataclasses.replace(header, **change), arrays)
    with pytest.raises(RequestError, match=line):
        read_reference(tmp_path / "r")


@pytest.mark.parametrize("points", [(0, 8), (16, 8), (8, 20), (8, 16, 17), (1 << 62, 1 << 63)])
def test_checkpoints_that_cannot_be(tmp_path: Path, points: tuple[int, ...]) -> None:
    header, arrays = content(0)
    first, second = header.prompts
    prompts = first, dataclasses.replace(second, checkpoints=points)
    write_reference(tmp_path / "r", dataclasses.replace(header, prompts=prompts), arrays)
    with pytest.raises(RequestError, match="is damaged: checkpoints") as raised:
        read_reference(tmp_path / "r")
    assert "\n" not in str(raised.value)


def test_one_position_is_full_at_least(tmp_path: Path) -> None:
    header, arrays = content(0)
    prompts = tuple(dataclasses.replace(prompt, full_positions=0) for prompt in header.prompts)
    write_reference(tmp_path / "r", dataclasses.replace(header, prompts=prompts), arrays)
    with pytest.raises(RequestError, match="is damaged: no position is full"):
        read_reference(tmp_path / "r")


def test_what_is_no_reference(tmp_path: Path) -> None:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other")
    for name, line in (("other", "no reference file"), ("no", "no such file"), (".", "a folder")):
        with pytest.raises(RequestError, match=line):
            read_reference(tmp_path / name)
