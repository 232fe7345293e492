"""State files: what is read is what was written, and nothing else is taken for it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.prefix_key import key_of
from rgexport.chat.state_file import (
    METADATA,
    SavedState,
    is_state_file,
    read_fields,
    read_state,
    require_same_model,
    write_state,
)
from rgexport.errors import RequestError
from rgexport.export.identity import Identity
from rgexport.griffin.state import POSITION, state_specs
from tests.models import ODD_CONFIGS

SPECS = state_specs(ODD_CONFIGS["regular"])
SHAPES = {spec.name: spec.shape for spec in SPECS}
IDENTITY = Identity("toy", "ab" * 32, 8, "cd" * 32)
MESSAGES = [{"role": "user", "content": "hello 🐢"}, {"role": "assistant", "content": "é"}]


def saved_state(dtype: str = "float32", pending: int = 1, count: int = 9) -> SavedState:
    random = np.random.default_rng(0)
    state = {
        name: random.standard_normal((1, *shape)).astype(
            "float32" if name.endswith("rg_lru") else dtype
        )
        for name, shape in SHAPES.items()
    }
    state[POSITION] = np.array([count - pending], np.int64)
    ids = np.arange(count)
    return SavedState(IDENTITY, key_of(ids[: count - pending]), state, ids, MESSAGES, "toy 1")


@pytest.mark.parametrize("precision", [None, "fp32", "fp16"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pending", [0, 1])
def test_what_is_written_is_read(precision, dtype, pending, tmp_path):
    saved, path = saved_state(dtype, pending), tmp_path / "a.state"
    write_state(path, saved, precision=precision)
    found = read_state(path, SHAPES)
    assert (found.identity, found.messages, found.engine) == (IDENTITY, MESSAGES, "toy 1")
    assert found.tokens is not None and found.tokens.tolist() == list(range(9))
    assert found.position == 9 - pending and found.key == saved.key
    stored = {None: dtype, "fp32": "float32", "fp16": "float16"}[precision]
    for name, array in saved.state.items():
        if name != POSITION:
            kind = "float32" if name.endswith("rg_lru") else stored
            assert found.state[name].dtype == kind
            np.testing.assert_array_equal(found.state[name], array.astype(kind))
    data = sum(array.nbytes for name, array in found.state.items() if name != POSITION)
    assert data <= path.stat().st_size <= data + 4096


def test_a_hash_is_enough_for_who_has_the_text(tmp_path: Path) -> None:
    saved, path = saved_state(pending=0), tmp_path / "a.state"
    write_state(path, replace(saved, tokens=None, messages=None))
    found = read_state(path, SHAPES)
    assert found.tokens is None and found.messages is None and found.count == 9
    assert found.key == key_of(list(range(9))) and "hello" not in path.read_bytes().decode("latin")
    arrays = safetensors.numpy.load_file(path)
    assert arrays.keys() == {*SHAPES, "tokens_sha256"}
    arrays["tokens_sha256"][3] ^= 1
    fields = read_fields(path)
    safetensors.numpy.save_file(arrays, path, {METADATA: json.dumps(fields)})
    with pytest.raises(RequestError, match="is damaged"):
        read_state(path, SHAPES)
    arrays.pop("tokens_sha256")
    safetensors.numpy.save_file(arrays, path, {METADATA: json.dumps(fields)})
    with pytest.raises(RequestError, match="is damaged"):
        read_state(path, SHAPES)


def test_logits_keep_their_precision(tmp_path: Path) -> None:
    path, logits = tmp_path / "a.state", np.array([1e-3, 70000.0], np.float32)
    saved = replace(saved_state(pending=0), logits=logits, artifact="fp32")
    write_state(path, saved, precision="fp16")
    found = read_state(path, SHAPES)
    assert found.logits is not None and found.artifact == "fp32"
    np.testing.assert_array_equal(found.logits, logits)
    write_state(path, replace(saved, logits=np.ones((2, 2), np.float32)))
    with pytest.raises(RequestError, match="is damaged"):
        read_state(path, SHAPES)


def test_any_safetensors_library_reads_it(tmp_path: Path) -> None:
    saved, path = saved_state(), tmp_path / "a.state"
    write_state(path, saved)
    found = safetensors.numpy.load_file(path)
    assert found.keys() == {*SHAPES, "tokens"}
    np.testing.assert_array_equal(found["tokens"], saved.tokens)
    assert is_state_file(path) and read_fields(path)["tokens"] == 9
    write_state(path, saved_state(count=5))
    assert read_state(path, SHAPES).count == 5
    assert [*tmp_path.iterdir()] == [path], "an earlier file is replaced at once"


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot write .*none/a.state: No such file"):
        write_state(tmp_path / "none" / "a.state", saved_state())
    with pytest.raises(RequestError, match="of states is 'int8'; expected fp32 or fp16"):
        write_state(tmp_path / "a.state", saved_state(), precision="int8")


@settings(deadline=None, max_examples=60)
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
        found = read_state(path, SHAPES)
    except RequestError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert index < header, "no bit of the data"
    for name, array in saved_state().state.items():
        np.testing.assert_array_equal(found.state[name], array)


@pytest.mark.parametrize("size", [0, 5, 100, 2000, -1])
def test_a_truncated_file_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    write_state(path, saved_state())
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(RequestError, match=r"a\.state"):
        read_state(path, SHAPES)


def test_other_files_are_no_states(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, path)
    assert not is_state_file(path)
    with pytest.raises(RequestError, match="is no state file; expected one that rgexport saved"):
        read_state(path, SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "has the format version 3; this rgexport reads 2"),
        ({"messages": "none"}, "its metadata lack a field"),
        ({"messages": [{"role": "user"}]}, "its metadata lack a field"),
        ({"identity": {"name": "toy"}}, "its metadata lack a field"),
        ({"messages": ...}, "its metadata lack a field"),
        ({"position": 3}, "is damaged"),
        ({"position": True}, "its metadata lack a field"),
        ({"tokens": 10}, "is damaged"),
        ({"sha256": "0" * 64}, "is damaged"),
    ],
)
def test_metadata_that_are_wrong(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    write_state(path, saved_state())
    fields = {k: v for k, v in (read_fields(path) | change).items() if v is not ...}
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(arrays, path, {METADATA: json.dumps(fields)})
    with pytest.raises(RequestError, match=message):
        read_state(path, SHAPES)


def test_a_model_with_other_states(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    write_state(path, saved_state())
    shapes = {spec.name: spec.shape for spec in state_specs(ODD_CONFIGS["irregular"])}
    with pytest.raises(RequestError, match="a state of toy, whose states have other shapes"):
        read_state(path, shapes)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (replace(IDENTITY, weights="00" * 32), "the model toy with other weights"),
        (replace(IDENTITY, window=9), "a window of 8 tokens; this artifact is toy with a window"),
        (replace(IDENTITY, template="00" * 32), "another chat template of toy"),
    ],
)
def test_another_model_is_named(identity: Identity, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    with pytest.raises(RequestError, match=message):
        require_same_model(path, saved_state(), identity)


def test_a_plain_text_has_no_template(tmp_path: Path) -> None:
    plain = replace(saved_state(), messages=None)
    require_same_model(tmp_path, plain, replace(IDENTITY, template="00" * 32, name="other"))
