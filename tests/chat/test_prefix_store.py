"""States are found by exactly their tokens, in memory and in a folder, whatever the disk does."""

import os
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.chat import state_folder
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.state_file import key_of, read_state_header
from rgexport.chat.state_folder import StateFolder
from rgexport.griffin.state import POSITION
from tests.chat.conftest import IDENTITY, until
from tests.faulty_disk import FAULTS, FaultyDisk
from tests.toy_session import ToySession

SHAPES = {"layers.0.rg_lru": (64,)}
FP32, INT4 = "f" * 64, "4" * 64  # hashes of two artifacts
IDS = st.lists(st.integers(0, 2), max_size=8)


def state_of(ids):
    """A state that says what it has seen."""
    memory = np.zeros((1, 64), np.float32)
    memory[0, : len(ids)] = ids
    return {"layers.0.rg_lru": memory, POSITION: np.array([len(ids)], np.int64)}


NBYTES = sum(array.nbytes for array in state_of([]).values())


@given(known=st.lists(st.tuples(IDS.filter(bool), st.booleans()), max_size=6), asked=IDS)
def test_the_longest_prefix_that_can_be_continued(known, asked):
    """A whole text needs its logits, which are kept when its state comes again without them."""
    store, lengths = PrefixStore(1 << 20), [0]
    for ids, with_logits in known:
        store.put(key_of(ids), state_of(ids), np.zeros(3) if with_logits else None)
        if ids == asked[: len(ids)] and (with_logits or len(ids) < len(asked)):
            lengths.append(len(ids))
    prefix = store.longest(asked)
    assert (prefix.length if prefix else 0) == max(lengths) == store.length(asked)
    if prefix:
        expected = state_of(asked[: prefix.length])
        np.testing.assert_array_equal(prefix.state["layers.0.rg_lru"], expected["layers.0.rg_lru"])


def test_what_was_not_used_for_longest_goes_first():
    store = PrefixStore(3 * NBYTES)
    for token in range(3):
        store.put(key_of([token]), state_of([token]))
    assert store.longest([0, 9]) is not None
    store.put(key_of([3]), state_of([3]))
    assert [store.length([token, 9]) for token in range(4)] == [1, 0, 1, 1]
    assert store.nbytes == 3 * NBYTES
    store.put(key_of([3]), state_of([3]))
    assert store.nbytes == 3 * NBYTES, "the same again takes nothing"


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Waits for states however busy the machine is."""
    monkeypatch.setattr(state_folder, "READ_SECONDS", 60.0)


@contextmanager
def opened(path, nbytes=NBYTES, identity=IDENTITY, **options):
    """Opens a store with a folder, and closes it at the end."""
    options = {"artifact": FP32, "max_bytes": 1 << 20, "waiting_bytes": 1 << 20} | options
    store = PrefixStore(nbytes, StateFolder(path, identity, SHAPES, vocab_size=3, **options))
    yield store
    store.close()


def put(path, *texts, **options):
    """Writes states into a folder, as an earlier process would."""
    with opened(path, **options) as store:
        for ids in texts:
            store.put(key_of(ids), state_of(ids))


def longest(store, ids):
    """The longest prefix, after the folder has been read."""
    fetch = store.fetch(ids, lambda: None)
    if fetch:
        until(lambda: not fetch.pending)
    return store.longest(ids, fetch=fetch)


def test_another_artifact_or_model_has_other_states(tmp_path):
    put(tmp_path, [1, 2], identity=replace(IDENTITY, weights="ef" * 32))
    put(tmp_path, [1, 2], artifact=INT4)
    file = max(tmp_path.glob("*/*.state"), key=os.path.getmtime)
    before = {*tmp_path.iterdir()}
    with opened(tmp_path) as store:
        assert longest(store, [1, 2, 3]) is None and store.length([1, 2, 3]) == 0
    (other,) = {*tmp_path.iterdir()} - before
    file.rename(other / file.name)
    with opened(tmp_path) as store:
        assert longest(store, [1, 2, 3]) is None and store.length([1, 2, 3]) == 0
        store.put(key_of([1, 2]), state_of([1, 2]))
    assert read_state_header(other / file.name).artifact == FP32, "it is replaced"


def test_a_folder_is_trimmed_and_shared_with_other_processes(tmp_path):
    """States of other artifacts go first, other files stay."""
    put(tmp_path, [0], artifact=INT4)
    (old,) = tmp_path.glob("*/*.state")
    (tmp_path / "notes").write_bytes(bytes(5000))
    os.utime(old, (0, 0))
    with opened(tmp_path) as store:
        assert longest(store, [3, 9]) is None
        put(tmp_path, [1], [2], [3], max_bytes=2 * old.stat().st_size)
        until(lambda: longest(store, [3, 9]))  # it looks for files of others now and then
        assert [token for token in range(4) if longest(store, [token, 9])] == [2, 3]
    assert len([*tmp_path.glob("*/*.state")]) == 2 and not old.exists()
    assert (tmp_path / "notes").exists()


@pytest.mark.parametrize("damage", ["cut", "swapped", "gone"])
def test_a_damaged_file_is_not_used(damage, tmp_path, capsys):
    put(tmp_path, [1], [1, 2])
    short, long = sorted(tmp_path.glob("*/*.state"))
    with opened(tmp_path) as store:
        if damage == "cut":
            os.truncate(long, long.stat().st_size - 4)
        elif damage == "swapped":
            long.write_bytes(short.read_bytes())
        else:
            long.unlink()
        known = longest(store, [1, 2, 3])
        assert known and known.length == 1
        assert (damage == "cut") == ("a saved state is not used" in capsys.readouterr().err)


def test_a_kill_leaves_no_half_file(tmp_path):
    """What a killed writer leaves has another name, and the next start removes it."""
    put(tmp_path)
    (states,) = tmp_path.iterdir()
    name = f"1-{key_of([1])[1]}.state"
    half = states / f".{name}.partial-00000000"
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    (states / f".{name}.partial-00000001").write_bytes(b"being written")
    with opened(tmp_path) as store:
        assert longest(store, [1, 2]) is None
    assert [path.name[-1] for path in states.iterdir()] == ["1"]


@pytest.mark.parametrize("fault", FAULTS)
def test_requests_are_answered_while_the_disk_fails(
    fault, make_model, gemma, tmp_path, monkeypatch, capsys
):
    disk, ids = FaultyDisk(tmp_path / "states", monkeypatch), [8] * 5
    model = make_model(gemma, state_folder=disk.folder)

    def read(ids):
        assert model.read(ids).result(timeout=30).error is None

    def is_saved_again():
        read([*ids, 9])
        ids.append(9)
        lengths = (path.name.partition("-")[0] for path in disk.folder.glob("*/*.state"))
        return max(map(int, lengths), default=0) > 5

    read([5, 6])
    until(lambda: [*disk.folder.glob("*/2-*.state")])
    disk.begin(fault)
    for token in range(12):
        read([7, token])
    model.scheduler.store.clear()
    read([5, 6, 7])
    disk.end()
    until(is_saved_again)
    model.close()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len({line.partition(":")[2] for line in warnings}) <= 4, "once a kind"


def test_all_choices_share_one_reading_of_the_prompt(make_model, gemma, tmp_path):
    """Also where its state has no logits, and after a restart."""
    sessions = [ToySession(gemma.vocab_size) for _ in range(2)]
    for session, count in zip(sessions, (16, 8), strict=True):
        model = make_model(gemma, session, state_folder=tmp_path, rows=4)
        ids = model.text_ids("hello " * 30)
        if session is sessions[0]:
            model.scheduler.store.put(key_of(ids), ToySession(gemma.vocab_size).get_rows(range(1)))
        streams = [model.complete("hello " * 30, max_new_tokens=1) for _ in range(count)]
        assert len({tuple(stream.reply().ids) for stream in streams}) == 1
        model.close()
    assert [session.fed for session in sessions] == [len(ids), 0]
