"""What chooses levels, against plain formulas in float64."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Factors, Grid

GROUP, BITS = 16, 4
MIDDLE, TOP = 8, 15


def positive(k: int, seed: int = 0) -> np.ndarray:
    """A matrix like those of inputs, float64 [k, k]: some columns large, many alike."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * k, k)) @ (rng.standard_normal((k, k)) / k**0.5 + np.eye(k))
    return x.T @ x * np.outer(scale := rng.lognormal(size=k), scale) / len(x)


def rows_of(count: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, k)).astype(np.float32)


def grid_of(weights: np.ndarray, group: int = GROUP) -> tuple[Grid, np.ndarray]:
    """Symmetric levels by the extremes of groups, and their zero points."""
    starts = np.arange(0, weights.shape[1], group)
    high = np.maximum.reduceat(np.abs(weights), starts, axis=1)
    scale = (high / MIDDLE).astype(np.float16).astype(np.float32)
    return Grid(group, TOP, scale, -scale * MIDDLE), np.full_like(scale, MIDDLE)


def per_column(values: np.ndarray, grid: Grid, columns: int) -> np.ndarray:
    return np.repeat(values.astype(np.float64), grid.group, axis=1)[:, :columns]


def values_of(levels: np.ndarray, grid: Grid) -> np.ndarray:
    if grid.table is not None:
        return np.take_along_axis(grid.table, levels.astype(np.intp), axis=1)
    scale, offset = (per_column(x, grid, levels.shape[1]) for x in (grid.scale, grid.offset))
    return levels * scale + offset


def losses(weights: np.ndarray, levels: np.ndarray, grid: Grid, h: np.ndarray) -> np.ndarray:
    off = weights - values_of(levels, grid)
    return np.einsum("nk,kl,nl->n", off, h, off)


def nearest(weights: np.ndarray, grid: Grid) -> np.ndarray:
    scale, offset = (per_column(x, grid, weights.shape[1]) for x in (grid.scale, grid.offset))
    return np.clip(np.rint((weights - offset) / scale), 0, grid.top).astype(np.uint8)


def gptq(weights: np.ndarray, grid: Grid, h: np.ndarray) -> np.ndarray:
    """As the paper has it (arXiv 2210.17323, algorithm 1): Cholesky's factor of the inverse."""
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    scale, offset = (per_column(x, grid, weights.shape[1]) for x in (grid.scale, grid.offset))
    w, levels = weights.astype(np.float64), np.empty(weights.shape, np.uint8)
    for j in range(w.shape[1]):
        q = np.clip(np.rint((w[:, j] - offset[:, j]) / scale[:, j]), 0, grid.top)
        levels[:, j] = q
        error = (w[:, j] - (q * scale[:, j] + offset[:, j])) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return levels


@pytest.mark.parametrize("k", [1, 7, 64, 65, 200])
def test_factors_give_the_matrix_back(k):
    h = positive(k, seed=k)
    found = library.factor(h.copy())
    assert isinstance(found, Factors) and not np.tril(found.m).any() and (found.d > 0).all()
    m = np.eye(k) + found.m
    np.testing.assert_allclose((m * found.d) @ m.T, h, rtol=0, atol=1e-6 * np.abs(h).max())


def test_a_matrix_that_is_not_positive_has_no_factors():
    h = positive(40)
    h[7] = h[:, 7] = 0
    assert library.factor(h) is None
    assert library.factor(np.full((3, 3), np.nan)) is None


@pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 33), (49, 130), (100, 257)])
def test_feedback_is_gptq(count, k):
    weights, h = rows_of(count, k), positive(k)
    grid, _ = grid_of(weights)
    levels, lost = library.feedback(weights, grid, library.factor(h.copy()))
    expected = gptq(weights, grid, h)
    # Float32 against float64: a tie may fall to the other side, and all behind it follows.
    same = (levels == expected).all(axis=1)
    assert same.mean() >= 0.9
    np.testing.assert_allclose(lost, losses(weights, levels, grid, h), rtol=1e-4)
    ours, theirs = lost.sum(), losses(weights, expected, grid, h).sum()
    np.testing.assert_allclose(ours, theirs, rtol=0.02)


def test_loss_of_given_levels():
    weights, h = rows_of(50, 100), positive(100)
    grid, _ = grid_of(weights)
    levels = nearest(weights, grid)
    found = library.loss(weights, grid, library.factor(h.copy()), levels)
    np.testing.assert_allclose(found, losses(weights, levels, grid, h), rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 150), st.sampled_from([1, 5, 16, 32]), st.integers(0, 9))
def test_refining_only_lowers_the_loss(count, k, group, seed):
    weights, h = rows_of(count, k, seed), positive(k, seed)
    grid, zeros = grid_of(weights, group)
    levels = nearest(weights, grid)
    before = losses(weights, levels, grid, h)
    for _ in range(3):
        library.refine(
            weights, grid, h.astype(np.float32), levels, rounds=1, zeros=zeros, half=True
        )
        after = losses(weights, levels, grid, h)
        assert (after <= before * (1 + 1e-5) + 1e-12).all()
        before = after
    assert np.array_equal(grid.scale, grid.scale.astype(np.float16))
    np.testing.assert_array_equal(grid.offset, -grid.scale * MIDDLE)


def test_scales_are_those_of_least_squares():
    """With H = L Lᵀ the loss is ‖(w − Σ s_g u_g) L‖², for which there is a solver."""
    weights, h = rows_of(9, 80), positive(80)
    grid, zeros = grid_of(weights)
    levels = nearest(weights, grid)
    units, root = levels.astype(np.float64) - MIDDLE, np.linalg.cholesky(h)
    expected = np.empty(grid.scale.shape)
    for row in range(len(weights)):
        parts = np.zeros((5, 80))
        for g in range(5):
            own = slice(g * GROUP, (g + 1) * GROUP)
            parts[g, own] = units[row, own]
        expected[row] = np.linalg.lstsq((parts @ root).T, weights[row] @ root, rcond=None)[0]
    fixed = Grid(GROUP, TOP, grid.scale.copy(), grid.offset.copy())
    library.refine(weights, fixed, h.astype(np.float32), levels, rounds=1, zeros=zeros)
    np.testing.assert_allclose(fixed.scale, expected, rtol=1e-3)


def test_descent_ends_where_no_level_is_better():
    weights, h = rows_of(8, 60), positive(60)
    grid, _ = grid_of(weights)
    levels = nearest(weights, grid)
    library.refine(weights, grid, h.astype(np.float32), levels, rounds=60)
    least = losses(weights, levels, grid, h)
    for column in range(60):
        for step in (-1, 1):
            other = levels.astype(np.int16)
            other[:, column] = np.clip(other[:, column] + step, 0, TOP)
            assert (losses(weights, other, grid, h) >= least * (1 - 1e-5)).all()


def test_tables():
    weights, h = rows_of(20, 50), positive(50)
    table = np.sort(rows_of(20, 16, seed=1), axis=1)
    grid = Grid(1, TOP, table=table)
    close = np.abs(weights[:, :, None] - table[:, None, :]).argmin(2).astype(np.uint8)
    alone, lost = library.feedback(
        weights, grid, Factors(np.zeros((50, 50), np.float32), np.ones(50, np.float32))
    )
    np.testing.assert_array_equal(alone, close)
    np.testing.assert_allclose(lost, losses(weights, close, grid, np.eye(50)), rtol=1e-5)
    levels, lost = library.feedback(weights, grid, library.factor(h.copy()))
    assert lost.sum() < losses(weights, close, grid, h).sum()
    library.refine(weights, grid, h.astype(np.float32), levels, rounds=2)
    assert losses(weights, levels, grid, h).sum() < lost.sum()


def squared(weights: np.ndarray, h: np.ndarray, scale: float, zero: float, top: int) -> float:
    q = np.clip(np.rint(weights / scale), -zero, top - zero)
    return float((h * (weights - q * scale) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [True, False])
def test_search_finds_what_trying_finds(symmetric, half, bits, weighted):
    rng, top = np.random.default_rng(bits), 2**bits - 1
    blocks = rng.standard_t(4, size=(7, 5, 32)).astype(np.float32)
    importance = rng.lognormal(size=(5, 32)).astype(np.float32) if weighted else None
    if symmetric:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)[..., 0]
        scales, zeros = largest / np.float32(-(2 ** (bits - 1))), np.full((7, 5), 2 ** (bits - 1))
    else:
        low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
        scales = (high - low) / np.float32(top)
        zeros = np.rint(-low / scales)
    zeros = zeros.astype(np.float32)
    first, places = scales.copy(), zeros.copy()
    levels = library.search(blocks, importance, bits, symmetric, half, scales, zeros)
    assert not half or np.array_equal(scales, scales.astype(np.float16))
    for row, column in np.ndindex(7, 5):
        w = blocks[row, column].astype(np.float64)
        h = np.ones(32) if importance is None else importance[column].astype(np.float64)
        found = squared(w, h, scales[row, column], zeros[row, column], top)
        least = squared(w, h, first[row, column], places[row, column], top)
        for fraction in np.linspace(0.9 if bits == 8 else 0.5, 1.12, 32):
            for sign in (1, -1) if symmetric else (1,):
                scale = first[row, column] * fraction * sign
                scale = float(np.float16(scale)) if half else scale
                least = min(least, squared(w, h, scale, places[row, column], top))
        assert found <= least * (1 + 1e-4)
        value = (levels[row, column] - zeros[row, column]) * scales[row, column]
        np.testing.assert_allclose((h * (w - value) ** 2).sum(), found, rtol=1e-4)


def test_float16_is_numpys():
    """Of every float16 the neighbourhood: what is stored is what a cast gives."""
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    near = np.concatenate([halves, np.nextafter(halves, 0), halves * np.float32(1.0003)])
    near = near[(near > 1e-6) & (near < 8000)]
    near = np.resize(near, (-(-len(near) // 16) * 16,))
    # A block with the levels ±1 only: its scale is fitted to its one weight.
    blocks = np.zeros((len(near), 1, 16), np.float32)
    blocks[:, 0, 0] = near
    start = near.astype(np.float16)[:, None] * np.float16(1.5)  # so that others are better
    scales, zeros = start.astype(np.float32), np.full((len(near), 1), 8, np.float32)
    library.search(blocks, None, 4, True, True, scales, zeros)
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
    assert (np.abs(scales) != start).mean() > 0.9


PROGRAM = """
import sys, numpy as np
from tests.kernels.rounding.test_rounding import everything
np.savez(sys.argv[1], **everything())
"""


def everything() -> dict[str, np.ndarray]:
    """All functions on rows of an odd size."""
    weights, h = rows_of(70, 150), positive(150)
    grid, zeros = grid_of(weights)
    factors = library.factor(h.copy())
    levels, lost = library.feedback(weights, grid, factors)
    library.refine(weights, grid, h.astype(np.float32), levels, rounds=2, zeros=zeros, half=True)
    blocks = rows_of(50, 96).reshape(50, 3, 32)
    scales = np.abs(blocks).max(2) / np.float32(8)
    found = library.search(blocks, None, 4, True, True, scales, np.full_like(scales, 8))
    return {
        "m": factors.m,
        "lost": lost,
        "levels": levels,
        "scale": grid.scale,
        "found": found,
        "scales": scales,
    }


@pytest.mark.parametrize("cpu", ["scalar", "avx2"])
def test_every_processor_gives_the_same_bits(cpu, tmp_path):
    target = tmp_path / "all.npz"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(target)],
        env=os.environ | {"RGEXPORT_CPU": cpu},
        cwd=Path(__file__).parents[3],
        check=True,
    )
    with np.load(target) as theirs:
        for name, ours in everything().items():
            np.testing.assert_array_equal(ours, theirs[name], err_msg=name)


def test_rows_do_not_depend_on_others_nor_on_threads():
    weights, h = rows_of(120, 90), positive(90)
    factors, matrix = library.factor(h.copy()), h.astype(np.float32)

    def chosen(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = np.ascontiguousarray(part)
        grid, zeros = grid_of(own)
        levels, _ = library.feedback(own, grid, factors)
        library.refine(own, grid, matrix, levels, rounds=2, zeros=zeros, half=True)
        return levels, grid.scale

    whole = chosen(weights)
    with ThreadPoolExecutor(4) as pool:
        cuts = [(0, 1), (1, 50), (50, 97), (97, 120)]
        parts = list(pool.map(lambda cut: chosen(weights[slice(*cut)]), cuts))
    for place in (0, 1):
        np.testing.assert_array_equal(np.concatenate([p[place] for p in parts]), whole[place])
