import numpy as np

from rgexport.griffin.state import POSITION, State
from rgexport.validate.states import RECENT, checkpoints, recent, state_errors, worst


def make(**arrays: list[float]) -> State:
    state = {f"layers.0.{name}": np.array([a], np.float32) for name, a in arrays.items()}
    return state | {POSITION: np.array([3])}


def test_errors_are_relative_to_the_reference():
    (key, value) = state_errors(make(key=[3, -4], value=[1, 1]), make(key=[3, -2], value=[1, 1]))
    assert (key.name, key.relative_max, key.relative_norm) == ("layers.0.key", 0.5, 0.4)
    assert (value.relative_max, value.relative_norm) == (0, 0)
    assert worst([key, value]) == 0.5 and worst([]) == 0
    (zeros,) = state_errors(make(key=[0, 0]), make(key=[0, 0.25]))
    assert zeros.relative_max == zeros.relative_norm == 0.25
    assert np.isnan(worst(state_errors(make(key=[1], value=[1]), make(key=[np.nan], value=[2]))))
    shorter = state_errors(make(key=[1, 2, 3], rg_lru=[1]), make(key=[1, 2], rg_lru=[1]))
    assert [error.name for error in shorter] == ["layers.0.rg_lru"], "another window is left out"


def test_checkpoints_double():
    assert checkpoints(64) == []
    assert checkpoints(65) == [64]
    assert checkpoints(1025) == [64, 128, 256, 512, 1024]


def test_of_caches_only_what_is_recent_is_kept():
    key = np.arange(300, dtype=np.float32).reshape(1, 100, 3)
    state = {"layers.0.key": key, "layers.1.rg_lru": key[:, 0], POSITION: np.array([7])}
    found = recent(state)
    assert np.array_equal(found["layers.0.key"], key[:, 100 - RECENT :])
    assert np.array_equal(found["layers.1.rg_lru"], key[:, 0])
    found["layers.0.key"][:] = 0
    assert key[0, -1, -1] == 299, "a copy"
    short = {"layers.0.key": key[:, :5]}
    assert np.array_equal(recent(short)["layers.0.key"], key[:, :5])
