"""The layout of llama.cpp's states: written as it reads them, and never misread."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State, state_specs
from rgexport.runtimes.llama_cpp.state import MAGIC, Layout, pack, unpack
from tests.models import ODD_CONFIGS


def _layouts() -> st.SearchStrategy[Layout]:
    return st.builds(
        Layout,
        config=st.sampled_from(list(ODD_CONFIGS.values())),
        cache_type=st.sampled_from(["float32", "float16"]),
        transposed=st.booleans(),
        streams=st.integers(1, 3),
    )


def _state(layout: Layout, position: int) -> State:
    rng = np.random.default_rng(position)
    state: State = {POSITION: np.array(position)}
    for spec in state_specs(layout.config, layout.cache_type):
        kind = spec.dtype if spec.name.endswith(("key", "value")) else "float32"
        state[spec.name] = rng.standard_normal(spec.shape).astype(kind)
        if spec.name.endswith(("key", "value")):
            state[spec.name][: max(0, layout.config.window - position)] = 0
    return state


@settings(deadline=None)
@given(_layouts(), st.integers(1, 60))
def test_what_is_written_is_read(layout: Layout, position: int) -> None:
    state = _state(layout, position)
    found = unpack(pack(state, layout), layout)
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert found[name].dtype == array.dtype or name == POSITION
        np.testing.assert_array_equal(found[name], array)


LAYOUT = Layout(ODD_CONFIGS["regular"], "float16", transposed=True, streams=1)


def _known_numbers(data: bytes) -> list[int]:
    """Offsets of the numbers that are neither floats nor positions."""
    cells, attention, width = 16, 1, LAYOUT.config.head_dim
    after = 16 + 12 * cells
    values = after + 8 + attention * (12 + 2 * cells * width)
    recurrent = values + 12 + 2 * cells * width
    in_cells = [20 + 12 * i for i in range(cells)]
    in_cache = [after, after + 4, after + 8, after + 12, values, values + 4, values + 8]
    return [0, 8, 12, *in_cells, *in_cache, recurrent, *range(recurrent + 8, recurrent + 28, 4)]


def test_another_layout_is_refused() -> None:
    """Whichever number is another one, and wherever the data end."""
    data = pack(_state(LAYOUT, 40), LAYOUT)
    assert struct.unpack_from("<I", data)[0] == MAGIC
    changed = [bytearray(data) for _ in _known_numbers(data)]
    for at, drifted in zip(_known_numbers(data), changed, strict=True):
        drifted[at] ^= 0x40
    cut = [data[:end] for end in (0, 3, 20, 300, len(data) - 1)]
    for damaged in (*map(bytes, changed), *cut, data + bytes(4)):
        with pytest.raises(RequestError, match=r"not laid out as .* (expected|cells in)"):
            unpack(damaged, LAYOUT)
    moved = bytearray(data)
    moved[16] ^= 0x40
    with pytest.raises(RequestError, match="do not follow one another"):
        unpack(bytes(moved), LAYOUT)
