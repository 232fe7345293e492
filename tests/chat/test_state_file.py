"""State files: what is read is what was written, and nothing else is taken for it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.state_file import (
    METADATA,
    SavedState,
    is_state_file,
    key_of,
    read_state,
    read_state_header,
    require_same_model,
    write_state,
)
from rgexport.errors import RequestError
from rgexport.files.typed_json import to_json
from rgexport.griffin.state import POSITION, state_specs
from tests.chat.conftest import IDENTITY
from tests.models import ODD_CONFIGS

SHAPES = {spec.name: spec.shape for spec in state_specs(ODD_CONFIGS["regular"])}
MESSAGES = [{"role": "user", "content": "hello 🐢"}, {"role": "assistant", "content": "é"}]


def saved_state(dtype: str = "float32", pending: int = 1, count: int = 9) -> SavedState:
    random = np.random.default_rng(0)
    state = {name: random.standard_normal((1, *shape)) for name, shape in SHAPES.items()}
    for name, array in state.items():
        state[name] = array.astype("float32" if name.endswith("rg_lru") else dtype)
    state[POSITION] = np.array([count - pending], np.int64)
    ids = np.arange(count)
    return SavedState(IDENTITY, key_of(ids[: count - pending]), state, ids, MESSAGES, "toy 1")


@pytest.mark.parametrize("precision", [None, "fp32", "fp16"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pending", [0, 1])
def test_what_is_written_is_read(precision, dtype, pending, tmp_path):
    saved, path = saved_state(dtype, pending), tmp_path / "a.state"
    saved = replace(saved, artifact="fp32", logits=np.array([1e-3, 70000.0], np.float32))
    write_state(path, saved_state(count=5))
    write_state(path, saved, precision=precision)
    assert [*tmp_path.iterdir()] == [path], "an earlier file is replaced at once"
    assert is_state_file(path) and read_state_header(path).tokens == 9
    arrays = safetensors.numpy.load_file(path)
    assert arrays.keys() >= {*SHAPES, "tokens"} and arrays["tokens"].tolist() == list(range(9))
    loaded = read_state(path, SHAPES)
    assert loaded.artifact == "fp32" and loaded.logits.dtype == np.float32
    np.testing.assert_array_equal(loaded.logits, saved.logits)
    assert (loaded.identity, loaded.messages, loaded.engine) == (IDENTITY, MESSAGES, "toy 1")
    assert loaded.tokens is not None and loaded.tokens.tolist() == list(range(9))
    assert loaded.position == 9 - pending and loaded.key == saved.key
    stored = {None: dtype, "fp32": "float32", "fp16": "float16"}[precision]
    for name, array in saved.state.items():
        if name != POSITION:
            kind = "float32" if name.endswith("rg_lru") else stored
            assert loaded.state[name].dtype == kind
            np.testing.assert_array_equal(loaded.state[name], array.astype(kind))
    data = sum(array.nbytes for name, array in loaded.state.items() if name != POSITION)
    assert data <= path.stat().st_size <= data + 4096


def test_what_cannot_be_written_or_read_is_one_line(tmp_path: Path) -> None:
    path, saved = tmp_path / "a.state", saved_state(pending=0)
    with pytest.raises(RequestError, match=r"cannot write .*none/a.state: No such file"):
        write_state(tmp_path / "none" / "a.state", saved)
    with pytest.raises(RequestError, match="of states is 'int8'; expected fp32 or fp16"):
        write_state(path, saved, precision="int8")
    write_state(path, replace(saved, logits=np.ones((2, 2), np.float32)))
    with pytest.raises(RequestError, match="is damaged"):
        read_state(path, SHAPES)
    shapes = {spec.name: spec.shape for spec in state_specs(ODD_CONFIGS["irregular"])}
    write_state(path, saved)
    with pytest.raises(RequestError, match="a state of toy, whose states have other shapes"):
        read_state(path, shapes)
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, path)
    assert not is_state_file(path)
    with pytest.raises(RequestError, match="is a file; expected a state file"):
        read_state(path, SHAPES)


@settings(max_examples=60)
@given(place=st.floats(0, 1), bit=st.integers(0, 7))
def test_an_altered_file_is_refused(place, bit, tmp_path_factory):
    """Whatever bit of it, the metadata included: but for spaces and words that nothing uses."""
    path = tmp_path_factory.mktemp("state") / "a.state"
    write_state(path, saved_state())
    data = bytearray(path.read_bytes())
    index = min(int(place * len(data)), len(data) - 1)
    data[index] ^= 1 << bit
    path.write_bytes(bytes(data))
    header = 8 + int.from_bytes(data[:8], "little") if index >= 8 else 0
    try:
        loaded = read_state(path, SHAPES)
    except RequestError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert index < header, "no bit of the data"
    for name, array in saved_state().state.items():
        np.testing.assert_array_equal(loaded.state[name], array)


WRONG = {
    "has format version 3; this rgexport reads 2": [{"format_version": 3}],
    "is damaged: in its metadata": [{"messages": [{"role": "user"}]}, {"position": True}],
    "is damaged": [{"position": 3}, {"tokens": 10}, {"sha256": "0" * 64}],
}


@pytest.mark.parametrize("message", WRONG)
def test_metadata_that_are_wrong(message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    write_state(path, saved_state())
    fields, arrays = to_json(read_state_header(path)), safetensors.numpy.load_file(path)
    for change in WRONG[message]:
        safetensors.numpy.save_file(arrays, path, {METADATA: json.dumps(fields | change)})
        with pytest.raises(RequestError, match=message):
            read_state(path, SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "00" * 32}, "the model toy with other weights"),
        ({"window": 9}, "a window of 8 tokens; this artifact is toy with a window"),
        ({"template": "00" * 32}, "another chat template of toy"),
    ],
)
def test_another_model_is_named(change: dict, message: str, tmp_path: Path) -> None:
    saved, other = saved_state(), replace(IDENTITY, **change)
    with pytest.raises(RequestError, match=message):
        require_same_model(tmp_path, saved, other)
    if "template" in change:  # a plain text has none
        require_same_model(tmp_path, replace(saved, messages=None), other)
