"""Packing against a stream of bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.quantize.packing import pack, packed_width, unpack

BITS = (2, 3, 4, 8)


@given(st.sampled_from(BITS), st.data())
def test_a_row_is_a_stream_of_bits(bits: int, data: st.DataObject) -> None:
    shape = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)
    values = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    stream = (values[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    expected = np.packbits(
        stream.reshape(len(values), values.shape[1] * bits), axis=1, bitorder="little"
    )

    packed = pack(values, bits)

    assert packed.shape[1] == packed_width(values.shape[1], bits)
    np.testing.assert_array_equal(packed, expected)
    unpacked = unpack(packed, bits)
    np.testing.assert_array_equal(unpacked[:, : values.shape[1]], values)
    assert not unpacked[:, values.shape[1] :].any()


@pytest.mark.parametrize(("bits", "packed"), [(2, [0xE4]), (3, [0x88, 0x06]), (4, [0x10, 0x32])])
def test_the_first_integer_has_the_low_bits(bits: int, packed: list[int]) -> None:
    assert pack(np.arange(4, dtype=np.uint8)[None], bits).tolist() == [packed]
