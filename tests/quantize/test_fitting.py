import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rgexport.quantize.fitting import SMALLEST_BLOCK, fitted, least_padded, with_dtype
from rgexport.quantize.scheme import BLOCKS, INT8_ROWS, Affine, Float, Palette

affines = st.builds(
    Affine,
    st.sampled_from([4, 8]),
    st.one_of(st.none(), st.integers(1, 200)),
    symmetric=st.booleans(),
    scale=st.sampled_from(["float16", "float32"]),
)
palettes = st.builds(Palette, group=st.integers(1, 64), lut=st.sampled_from(["float16", "float32"]))
shapes = st.tuples(st.integers(1, 500), st.integers(1, 500))


@given(affines, shapes)
def test_blocks_divide_rows(asked: Affine, shape: tuple[int, int]) -> None:
    columns = shape[1]
    scheme = fitted(asked, shape)
    assert isinstance(scheme, Affine)
    block = scheme.block or columns
    assert columns % block == 0
    assert scheme.bits == (8 if columns % 2 else asked.bits)
    assert (scheme.symmetric, scheme.scale) == (asked.symmetric, asked.scale)
    if scheme.bits == 4:
        packed_zeros = not scheme.symmetric
        assert not (packed_zeros and columns // block % 2), "an even number of zero points"
        whole = columns // 2 if packed_zeros else columns
    else:
        whole = columns
    limit = min(asked.block or columns, whole)
    better = [b for b in range(max(block, SMALLEST_BLOCK - 1) + 1, limit + 1) if whole % b == 0]
    assert block == whole or not better, "the largest that fits"
    assert block <= limit or block == whole
    assert fitted(scheme, shape) == scheme


@given(palettes, shapes)
def test_groups_divide_rows(asked: Palette, shape: tuple[int, int]) -> None:
    scheme = fitted(asked, shape)
    if shape[1] % 2:
        assert scheme == Affine(8, None, symmetric=True, scale=asked.lut)
        return
    assert isinstance(scheme, Palette) and scheme.lut == asked.lut
    assert shape[0] % scheme.group == 0 and scheme.group <= asked.group
    assert not any(shape[0] % g == 0 for g in range(scheme.group + 1, asked.group + 1))


@given(affines, st.sampled_from([None, *BLOCKS]), st.integers(1, 3000))
def test_no_other_block_takes_fewer_bytes(asked: Affine, block: int | None, columns: int) -> None:
    asked = replace(asked, block=block)
    scheme = least_padded(asked, columns)
    assert isinstance(scheme, Affine) and replace(scheme, block=block) == asked
    if block is None:
        return

    def stored(size: int) -> int:
        """The layout of MatMulNBits: whole blocks, scales, packed zero points."""
        blocks = math.ceil(columns / size)
        zero_points = 0 if asked.symmetric else math.ceil(blocks * asked.bits / 8)
        return blocks * size * asked.bits // 8 + blocks * int(asked.scale[5:]) // 8 + zero_points

    sizes = {size: stored(size) for size in BLOCKS if size <= block}
    assert scheme.block == min(size for size in sizes if sizes[size] == min(sizes.values()))
    assert scheme.block == block or columns % block, "a block that divides stays"


def test_what_has_no_blocks_is_not_padded() -> None:
    for scheme in (INT8_ROWS, Float("float16"), Palette()):
        assert least_padded(scheme, 288) == scheme


def test_the_dtype_of_scales_and_tables() -> None:
    assert with_dtype(Affine(4, 32, symmetric=True), "float16").scale == "float16"
    assert with_dtype(Palette(), "float32").lut == "float32"
    assert with_dtype(Float("float32"), "float16") == Float("float32")
