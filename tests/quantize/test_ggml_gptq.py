"""GPTQ in ggml's types: other levels on ggml's own scales, and less loss."""

import itertools

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.quantize.algorithms import encode
from rgexport.quantize.ggml_grid import GRID_TYPES, Grid, grid_of, with_levels
from rgexport.quantize.ggml_library import quantize_rows
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.scheme import Ggml
from rgexport.quantize.statistics import Statistics, statistics_of
from tests.artifacts import require_ggml


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    """All tests here quantize with ggml's library."""
    require_ggml()


def correlated(draw: np.random.Generator, columns: int, cuts: tuple[int, ...] = ()) -> Statistics:
    """Statistics of inputs that go together, of very different sizes; H in blocks between cuts."""
    mixed = draw.standard_normal((3 * columns, columns // 4)) @ draw.standard_normal(
        (columns // 4, columns)
    )
    inputs = (mixed + draw.standard_normal(mixed.shape)) * np.exp(draw.normal(0, 1, columns))
    h = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    edges = [0, *cuts, columns]
    blocks = [h[a:b, a:b] for a, b in itertools.pairwise(edges)]
    return statistics_of(blocks, len(inputs))


def losses(statistics: Statistics, off: np.ndarray) -> np.ndarray:
    """The diagonal of ΔW H ΔWᵀ."""
    total = np.zeros(len(off))
    for part in statistics.hessians:
        own = off[:, part.start : part.stop].astype(np.float64)
        total += np.einsum("ri,ij,rj->r", own, part.matrix.astype(np.float64), own)
    return total


def dequantized(packed: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(TYPES[kind].value))


def packed_by(word: str, rows: np.ndarray, kind: str, statistics: Statistics) -> np.ndarray:
    return encode("w", rows, Ggml(kind, algorithm=word), statistics)["data"]


def plain_gptq(rows: np.ndarray, grid: Grid, statistics: Statistics) -> np.ndarray:
    """Values by GPTQ as published (arXiv 2210.17323): the upper Cholesky factor U of H⁻¹."""
    scale, offset = (np.repeat(x, grid.group, axis=1) for x in (grid.scale, grid.offset))
    w = rows.astype(np.float64)
    values = np.empty_like(w)
    for part in statistics.hessians:
        inverse = np.linalg.inv(part.matrix.astype(np.float64))
        upper = np.linalg.cholesky(inverse).T
        for i in range(len(upper)):
            j = part.start + i
            safe = np.where(scale[:, j] == 0, 1, scale[:, j])
            level = np.clip(np.rint((w[:, j] - offset[:, j]) / safe), 0, grid.top)
            values[:, j] = scale[:, j] * level + offset[:, j]
            off = (w[:, j] - values[:, j]) / upper[i, i]
            w[:, j : part.stop] -= off[:, None] * upper[i, i:]
    return values


@pytest.mark.parametrize("kind", GRID_TYPES)
@pytest.mark.parametrize("cuts", [(), (200,), (256, 512)], ids=str)
def test_loss_is_at_most_that_of_published_gptq(kind: str, cuts: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    rows, known = draw.standard_normal((24, 768)).astype(np.float32), correlated(draw, 768, cuts)
    own = packed_by("ggml", rows, kind, known)
    ours = losses(known, dequantized(packed_by("gptq", rows, kind, known), kind) - rows)
    theirs = losses(known, plain_gptq(rows, grid_of(own, kind), known) - rows)
    assert ours.sum() <= 1.001 * theirs.sum()
    assert ours.sum() < 0.8 * losses(known, dequantized(own, kind) - rows).sum()


@settings(deadline=None)
@given(
    kind=st.sampled_from(GRID_TYPES),
    rows=st.integers(0, 4),
    blocks=st.integers(1, 2),
    spread=st.floats(0, 3),
    seed=st.integers(0, 2**32),
)
def test_no_row_is_worse_than_ggml_leaves_it(
    kind: str, rows: int, blocks: int, spread: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    columns = 256 * blocks
    weights = draw.standard_normal((rows, columns)) * np.exp(draw.normal(0, spread, columns))
    weights = np.where(draw.random(weights.shape) < 0.1, 0, weights).astype(np.float32)
    known = correlated(draw, columns, tuple(sorted({*draw.integers(1, columns, 2).tolist()})))
    own, ours = (packed_by(word, weights, kind, known) for word in ("ggml", "gptq"))
    np.testing.assert_array_equal(own, quantize_rows(weights, kind, known.importance))
    # all but the levels is as ggml left it
    np.testing.assert_array_equal(with_levels(ours, kind, grid_of(own, kind).levels), own)
    before, after = (
        losses(known, dequantized(packed, kind) - weights) if rows else np.zeros(0)
        for packed in (own, ours)
    )
    np.testing.assert_array_less(after, before * (1 + 1e-4) + 1e-12)


@pytest.mark.parametrize("kind", GRID_TYPES)
def test_zeros_constants_and_outliers(kind: str) -> None:
    draw = np.random.default_rng(5)
    rows, known = draw.standard_normal((4, 512)).astype(np.float32), correlated(draw, 512)
    rows[0], rows[1], rows[2, :256], rows[3, 77] = 0, 0.5, 0, 1e4
    values = dequantized(packed_by("gptq", rows, kind, known), kind)
    assert np.isfinite(values).all() and not values[0].any() and not values[2, :256].any()
    assert abs(values[3, 77] - 1e4) < 400


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_floats_have_no_levels(kind: str) -> None:
    draw = np.random.default_rng(6)
    rows, known = draw.standard_normal((2, 32)).astype(np.float32), correlated(draw, 32)
    np.testing.assert_array_equal(
        packed_by("gptq", rows, kind, known), packed_by("ggml", rows, kind, known)
    )
