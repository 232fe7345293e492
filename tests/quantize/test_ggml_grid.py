"""Levels in ggml's packed rows, against gguf-py's dequantizer."""

import gguf
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rgexport.quantize.ggml_grid import GRID_TYPES, Grid, grid_of, with_levels
from rgexport.quantize.ggml_types import TYPES

HALVES = {
    **{"q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2)},
    **{"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)},
}
"""Type → where a block has its float16 numbers (ggml-common.h)."""

kinds = st.sampled_from(GRID_TYPES)
seeds = st.integers(0, 2**32)
sizes = st.integers(0, 4), st.integers(1, 3)


def random_rows(kind: str, rows: int, blocks: int, draw: np.random.Generator) -> np.ndarray:
    """Any bytes, but finite scales, and no -128 in q8_0, which ggml never writes."""
    size = TYPES[kind].block_bytes
    packed = draw.integers(0, 256, (rows * blocks, size), np.uint8)
    if kind == "q8_0":
        packed[packed == 128] = 127
    for place in HALVES[kind]:
        halves = draw.normal(0, 0.1, (len(packed), 1)).astype("<f2")
        packed[:, place : place + 2] = halves.view(np.uint8)
    return packed.reshape(rows, blocks * size)


def dequantized(packed: np.ndarray, kind: str) -> np.ndarray:
    if not len(packed):
        return np.zeros((0, packed.shape[1] // TYPES[kind].block_bytes * TYPES[kind].block))
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(TYPES[kind].value))


def values(grid: Grid, levels: np.ndarray) -> np.ndarray:
    scale, offset = (np.repeat(part, grid.group, axis=1) for part in (grid.scale, grid.offset))
    return scale * levels + offset


def assert_same(grid: Grid, levels: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to the rounding of float32: of products with the largest level."""
    largest = np.repeat(np.abs(grid.scale) * grid.top + np.abs(grid.offset), grid.group, axis=1)
    np.testing.assert_array_less(np.abs(values(grid, levels) - expected), 1e-30 + 2e-7 * largest)


def test_every_quantized_type_has_a_grid() -> None:
    assert set(GRID_TYPES) == {kind.name for kind in TYPES.values() if kind.is_quantized}


@given(kinds, *sizes, seeds)
def test_a_grid_and_other_levels_on_it_have_the_values_of_the_rows(
    kind: str, rows: int, blocks: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    packed = random_rows(kind, rows, blocks, draw)
    grid, before = grid_of(packed, kind), packed.copy()
    columns = blocks * TYPES[kind].block
    assert grid.levels.shape == (rows, columns) and grid.levels.dtype == np.uint8
    assert grid.scale.shape == grid.offset.shape == (rows, columns // grid.group)
    assert grid.scale.dtype == grid.offset.dtype == np.float32
    assert (grid.levels <= grid.top).all()
    assert_same(grid, grid.levels, dequantized(packed, kind))
    np.testing.assert_array_equal(with_levels(packed, kind, grid.levels), before)
    levels = draw.integers(0, grid.top + 1, grid.levels.shape, np.uint8)
    changed = with_levels(packed, kind, levels)
    assert_same(grid, levels, dequantized(changed, kind))
    np.testing.assert_array_equal(packed, before)
    again = grid_of(changed, kind)
    np.testing.assert_array_equal(again.levels, levels)
    np.testing.assert_array_equal(again.scale, grid.scale)
    np.testing.assert_array_equal(again.offset, grid.offset)
