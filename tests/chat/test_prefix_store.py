"""States are found by exactly their tokens, in memory and in a folder."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.chat import state_folder
from rgexport.chat.prefix_key import key_of
from rgexport.chat.prefix_store import Prefix, PrefixStore
from rgexport.chat.state_file import read_fields
from rgexport.chat.state_folder import StateFolder
from rgexport.export.identity import Identity
from rgexport.griffin.state import POSITION, State
from tests.chat.conftest import until

SHAPES = {"layers.0.rg_lru": (64,)}
IDENTITY = Identity("toy", "ab" * 32, 8, "cd" * 32)
FP32, INT4 = "f" * 64, "4" * 64
"""Hashes of two artifacts."""
IDS = st.lists(st.integers(0, 2), max_size=8)


def state_of(ids: list[int]) -> State:
    """A state that says what it has seen."""
    memory = np.zeros((1, 64), np.float32)
    memory[0, : len(ids)] = ids
    return {"layers.0.rg_lru": memory, POSITION: np.array([len(ids)], np.int64)}


NBYTES = sum(array.nbytes for array in state_of([]).values())


@given(known=st.lists(st.tuples(IDS.filter(bool), st.booleans()), max_size=6), asked=IDS)
def test_the_longest_prefix_that_can_be_continued(known, asked):
    store, latest = PrefixStore(1 << 20), dict[tuple[int, ...], bool]()
    for ids, with_logits in known:
        store.put(ids, state_of(ids), np.zeros(3) if with_logits else None)
        latest[tuple(ids)] = with_logits or latest.get(tuple(ids), False)
    fitting = [
        len(ids)
        for ids, logits in latest.items()
        if list(ids) == asked[: len(ids)] and (logits or len(ids) < len(asked))
    ]
    found = store.longest(asked)
    assert (found.length if found else 0) == max(fitting, default=0) == store.length(asked)
    if found:
        expected = state_of(asked[: found.length])
        np.testing.assert_array_equal(found.state["layers.0.rg_lru"], expected["layers.0.rg_lru"])


def test_what_was_not_used_for_longest_goes_first() -> None:
    store = PrefixStore(3 * NBYTES)
    for token in range(3):
        store.put([token], state_of([token]))
    assert store.longest([0, 9]) is not None
    store.put([3], state_of([3]))
    assert [store.length([token, 9]) for token in range(4)] == [1, 0, 1, 1]
    assert store.nbytes == 3 * NBYTES
    store.put([3], state_of([3]))
    assert store.nbytes == 3 * NBYTES, "the same again takes nothing"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for states however busy the machine is."""
    monkeypatch.setattr(state_folder, "READ_SECONDS", 60.0)


def folder(
    path: Path, max_bytes: int = 1 << 20, identity: Identity = IDENTITY, artifact: str = FP32
) -> StateFolder:
    return StateFolder(
        path,
        identity,
        SHAPES,
        artifact=artifact,
        vocab_size=3,
        max_bytes=max_bytes,
        waiting_bytes=1 << 20,
    )


@contextmanager
def opened(path: Path, nbytes: int = NBYTES, **options: Any) -> Iterator[PrefixStore]:
    """A store with a folder, which is closed at the end."""
    store = PrefixStore(nbytes, folder(path, **options))
    yield store
    store.close()


def put(path: Path, *texts: list[int], **options: Any) -> None:
    """Writes states into a folder, as an earlier process would."""
    with opened(path, **options) as store:
        for ids in texts:
            store.put(ids, state_of(ids))


def longest(store: PrefixStore, ids: list[int]) -> Prefix | None:
    """The longest prefix, after the folder has been read."""
    fetch = store.fetch(ids, lambda: None)
    if fetch:
        fetch.wait()
    return store.longest(ids, fetch=fetch)


def test_a_folder_serves_the_next_process(tmp_path):
    put(tmp_path, *([*range(length)] for length in range(1, 6)))
    with opened(tmp_path) as again:
        known = longest(again, [0, 1, 2, 3, 9])
        assert known and known.length == 4
        assert known.state["layers.0.rg_lru"][0, :5].tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("change", [{"weights": "ef" * 32}, {"window": 9}])
def test_another_model_has_another_folder(change, tmp_path):
    put(tmp_path, [1, 2])
    with opened(tmp_path, identity=replace(IDENTITY, **change)) as store:
        assert longest(store, [1, 2, 3]) is None


def test_another_artifact_has_other_states(tmp_path):
    """Even where a file lies in the wrong folder."""
    put(tmp_path, [1, 2], artifact=INT4)
    (file,) = tmp_path.glob("*/*.state")
    with opened(tmp_path) as store:
        assert longest(store, [1, 2, 3]) is None and store.length([1, 2, 3]) == 0
    (other,) = {*tmp_path.iterdir()} - {file.parent}
    file.rename(other / file.name)
    with opened(tmp_path) as store:
        assert longest(store, [1, 2, 3]) is None and store.length([1, 2, 3]) == 0
        store.put([1, 2], state_of([1, 2]))
    assert read_fields(other / file.name)["artifact"] == FP32, "it is replaced"


def test_states_of_other_artifacts_are_trimmed_first(tmp_path):
    put(tmp_path, [1], artifact=INT4)
    (old,) = tmp_path.glob("*/*.state")
    beside = tmp_path / "notes"
    beside.write_bytes(bytes(5000))
    os.utime(old, (0, 0))
    put(tmp_path, [2], max_bytes=old.stat().st_size)
    assert len([*tmp_path.glob("*/*.state")]) == 1 and not old.exists() and beside.exists()


def test_what_is_foreign_or_does_not_last_is_not_written(tmp_path):
    with opened(tmp_path, 1 << 20) as store:
        store.add(key_of([1, 2]), state_of([1, 2]), foreign=True)
        known = longest(store, [1, 2, 3])
        assert known and known.foreign
        store.forget([1, 2])
        store.put([1, 2], state_of([1, 2]), lasting=False)
        assert store.length([1, 2, 3]) == 2
        store.forget([1, 2])
        assert store.length([1, 2, 3]) == 0 and store.nbytes == 0
    assert not [*tmp_path.glob("*/*.state")]


def test_logits_outlive_a_state_without_them_and_a_restart(tmp_path):
    logits = np.arange(3, dtype=np.float32)
    with opened(tmp_path, 1 << 20) as store:
        store.put([1, 2], state_of([1, 2]))
        assert store.length([1, 2]) == 0, "without logits, a token must be left"
        store.put([1, 2], state_of([1, 2]), logits)
        store.put([1, 2], state_of([1, 2]))
        for text in ([1, 2], [1, 2, 3]):
            known = store.longest(text)
            assert known and known.logits is logits and store.length(text) == 2
    with opened(tmp_path, 1 << 20) as again:
        known = longest(again, [1, 2])
        assert known and known.logits is not None and known.logits.tolist() == [0, 1, 2]
        assert again.length([1, 2]) == 2


def test_a_folder_is_trimmed(tmp_path):
    put(tmp_path, [0])
    (file,) = tmp_path.glob("*/*.state")
    put(tmp_path, [1], [2], [3], max_bytes=2 * file.stat().st_size)
    assert len([*tmp_path.glob("*/*.state")]) == 2
    with opened(tmp_path) as store:
        assert [store.length([token, 9]) for token in range(4)] == [0, 0, 1, 1]


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


def test_threads_share_a_store() -> None:
    store, wrong = PrefixStore(20 * NBYTES), list[str]()

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(300):
            ids = random.integers(0, 3, int(random.integers(1, 6))).tolist()
            if random.random() < 0.5:
                store.put(ids, state_of(ids))
            elif found := store.longest(ids):
                seen = found.state["layers.0.rg_lru"][0, : found.length].tolist()
                if seen != ids[: found.length]:
                    wrong.append(f"{seen} for {ids}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and store.nbytes <= 20 * NBYTES


def test_processes_share_a_folder(tmp_path):
    with opened(tmp_path, 1 << 20) as store:
        assert longest(store, [1, 2, 3]) is None
        put(tmp_path, [1, 2])
        until(lambda: longest(store, [1, 2, 3]))  # it looks for files of others now and then
        known = store.longest([1, 2, 3])
        assert known and known.length == 2
