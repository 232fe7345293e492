"""The layout of llama.cpp's states: written as it reads them, and never misread."""

import struct
from collections.abc import Iterator

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


def _numbers(data: bytes) -> Iterator[int]:
    """Where the numbers that we know lie: those that are not floats or positions."""
    cells, attention, width = 16, 1, LAYOUT.config.head_dim
    at = [0, 8, 16, *(20 + 12 * i for i in range(cells))]
    after = 16 + 12 * cells
    at += [after, after + 4, after + 8, after + 12]
    values = after + 8 + attention * (12 + 2 * cells * width)
    at += [values, values + 4, values + 8]
    recurrent = values + 12 + 2 * cells * width
    return iter([*at, recurrent, *range(recurrent + 8, recurrent + 28, 4)])


def test_a_layout_that_drifted_is_named() -> None:
    """Whichever number is another one, and wherever the data end."""
    data = pack(_state(LAYOUT, 40), LAYOUT)
    assert struct.unpack_from("<I", data)[0] == MAGIC
    for at in _numbers(data):
        drifted = bytearray(data)
        drifted[at] ^= 0x40
        with pytest.raises(RequestError, match=r"not laid out as .* expected|follow|than 1|ends"):
            unpack(bytes(drifted), LAYOUT)
    for end in (0, 3, 20, 300, len(data) - 1):
        with pytest.raises(RequestError, match=f"it ends after {end} bytes"):
            unpack(data[:end], LAYOUT)
    with pytest.raises(RequestError, match="4 bytes are left over"):
        unpack(data + bytes(4), LAYOUT)


def test_another_context_is_named() -> None:
    """What differs between contexts of one model."""
    data = pack(_state(LAYOUT, 40), LAYOUT)
    for change, complaint in (
        ({"streams": 2}, "the number of streams is 0x1; expected 0x2"),
        ({"transposed": False}, "whether values are transposed is 0x1; expected 0x0"),
        ({"cache_type": "float32"}, "the type of keys and values is 0x1; expected 0x0"),
        ({"config": ODD_CONFIGS["attention_tail"]}, "the number of attention layers is 0x1"),
    ):
        other = Layout(**{**vars(LAYOUT), **change})
        with pytest.raises(RequestError, match=complaint):
            unpack(data, other)
