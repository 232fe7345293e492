"""What chooses levels, against plain formulas in float64."""

import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.kernels.build import build
from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Factors, Grid
from tests.built import COMPILER, built
from tests.command_line import ROOT

GROUP, MIDDLE, TOP = 16, 8, 15


def positive(k, seed=0):
    """A matrix like those of inputs, float64 [k, k]: some columns large, many alike."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * k, k)) @ (rng.standard_normal((k, k)) / k**0.5 + np.eye(k))
    return x.T @ x * np.outer(scale := rng.lognormal(size=k), scale) / len(x)


def rows_of(count, k, seed=0):
    return np.random.default_rng(seed).standard_normal((count, k)).astype(np.float32)


def read_levels(weights, group=GROUP):
    """Symmetric levels by the extremes of groups, and their zero points."""
    starts = np.arange(0, weights.shape[1], group)
    high = np.maximum.reduceat(np.abs(weights), starts, axis=1)
    scale = (high / MIDDLE).astype(np.float16).astype(np.float32)
    return Grid(group, TOP, scale, -scale * MIDDLE), np.full_like(scale, MIDDLE)


def per_column(grid, columns):
    """Scales and offsets in float64."""
    both = (grid.scale, grid.offset)
    return (np.repeat(x.astype(np.float64), grid.group, 1)[:, :columns] for x in both)


def losses(weights, levels, grid, h):
    if grid.table is not None:
        values = np.take_along_axis(grid.table, levels.astype(np.intp), axis=1)
    else:
        scale, offset = per_column(grid, levels.shape[1])
        values = levels * scale + offset
    return np.einsum("nk,kl,nl->n", weights - values, h, weights - values)


def nearest(weights, grid):
    scale, offset = per_column(grid, weights.shape[1])
    return np.clip(np.rint((weights - offset) / scale), 0, grid.top).astype(np.uint8)


def gptq(weights, scale, offset, top, h):
    """As the paper has it (arXiv 2210.17323, algorithm 1): Cholesky's factor of the inverse."""
    upper = np.linalg.cholesky(np.linalg.inv(h.astype(np.float64))).T
    w, levels = weights.astype(np.float64), np.empty(weights.shape, np.uint8)
    for j in range(w.shape[1]):
        step = np.where(scale[:, j] == 0, 1, scale[:, j])
        levels[:, j] = q = np.clip(np.rint((w[:, j] - offset[:, j]) / step), 0, top)
        error = (w[:, j] - (q * scale[:, j] + offset[:, j])) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return levels


@pytest.mark.parametrize("k", [1, 7, 64, 65, 200])
def test_factors_give_the_matrix_back(k):
    """There are none of a matrix that is not positive."""
    h = positive(k, seed=k)
    factors = library.factor(h.copy())
    assert isinstance(factors, Factors) and not np.tril(factors.m).any() and (factors.d > 0).all()
    m = np.eye(k) + factors.m
    np.testing.assert_allclose((m * factors.d) @ m.T, h, rtol=0, atol=1e-6 * np.abs(h).max())
    h[-1] = h[:, -1] = 0
    assert library.factor(h) is None
    assert library.factor(np.full((k, k), np.nan)) is None


@pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 33), (49, 130), (100, 257)])
def test_feedback_is_gptq(count, k):
    weights, h = rows_of(count, k), positive(k)
    grid, _ = read_levels(weights)
    factors = library.factor(h.copy())
    levels, lost = library.feedback(weights, grid, factors)
    expected = gptq(weights, *per_column(grid, k), TOP, h)
    # Float32 against float64: a tie may fall to the other side, and changes all later columns.
    assert (levels == expected).all(axis=1).mean() >= 0.9
    np.testing.assert_allclose(lost, losses(weights, levels, grid, h), rtol=1e-4)
    ours, theirs = lost.sum(), losses(weights, expected, grid, h).sum()
    np.testing.assert_allclose(ours, theirs, rtol=0.02)

    near = nearest(weights, grid)
    lost = library.loss(weights, grid, factors, near)
    np.testing.assert_allclose(lost, losses(weights, near, grid, h), rtol=1e-4)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 150), st.sampled_from([1, 5, 16, 32]), st.integers(0, 9))
def test_refining_only_lowers_the_loss(count, k, group, seed):
    weights, h = rows_of(count, k, seed), positive(k, seed)
    grid, zeros = read_levels(weights, group)
    levels = nearest(weights, grid)
    before = losses(weights, levels, grid, h)
    options = {"rounds": 1, "zeros": zeros, "half": True}
    for _ in range(3):
        library.refine(weights, grid, h.astype(np.float32), levels, **options)
        after = losses(weights, levels, grid, h)
        assert (after <= before * (1 + 1e-5) + 1e-12).all()
        before = after
    assert np.array_equal(grid.scale, grid.scale.astype(np.float16))
    np.testing.assert_array_equal(grid.offset, -grid.scale * MIDDLE)


def test_scales_are_those_of_least_squares_and_no_other_level_is_better():
    """With H = L Lᵀ the loss is ‖(w − Σ s_g u_g) L‖², for which there is a solver."""
    weights, h = rows_of(9, 80), positive(80)
    grid, zeros = read_levels(weights)
    levels = nearest(weights, grid)
    groups, root = np.repeat(np.eye(5), GROUP, axis=1), np.linalg.cholesky(h)
    units = levels.astype(np.float64) - MIDDLE
    expected = [
        np.linalg.lstsq((groups * row @ root).T, w @ root, rcond=None)[0]
        for row, w in zip(units, weights, strict=True)
    ]
    library.refine(weights, grid, h.astype(np.float32), levels, rounds=1, zeros=zeros)
    np.testing.assert_allclose(grid.scale, expected, rtol=1e-3)

    library.refine(weights, grid, h.astype(np.float32), levels, rounds=60)
    least = losses(weights, levels, grid, h)
    for step in (*np.eye(80, dtype=np.int16), *-np.eye(80, dtype=np.int16)):
        other = np.clip(levels + step, 0, TOP)
        assert (losses(weights, other, grid, h) >= least * (1 - 1e-5)).all()


def test_tables():
    weights, h = rows_of(20, 50), positive(50)
    table = np.sort(rows_of(20, 16, seed=1), axis=1)
    grid = Grid(1, TOP, table=table)
    close = np.abs(weights[:, :, None] - table[:, None, :]).argmin(2).astype(np.uint8)
    alone = Factors(np.zeros((50, 50), np.float32), np.ones(50, np.float32))
    np.testing.assert_array_equal(library.feedback(weights, grid, alone)[0], close)
    levels, lost = library.feedback(weights, grid, library.factor(h.copy()))
    np.testing.assert_allclose(lost, losses(weights, levels, grid, h), rtol=1e-4)
    assert lost.sum() < losses(weights, close, grid, h).sum()
    library.refine(weights, grid, h.astype(np.float32), levels, rounds=2)
    assert losses(weights, levels, grid, h).sum() < lost.sum()


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
        first = largest / np.float32(-(2 ** (bits - 1)))
        zeros = np.full((7, 5), 2 ** (bits - 1), np.float32)
    else:
        low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
        first = (high - low) / np.float32(top)
        zeros = np.rint(-low / first).astype(np.float32)
    h = np.ones((5, 32)) if importance is None else importance.astype(np.float64)

    def lost(scale, zero):
        scale, zero = scale.astype(np.float64)[..., None], zero[..., None]
        q = np.clip(np.rint(blocks / scale), -zero, top - zero)
        return (h * (blocks - q * scale) ** 2).sum(2)

    least = lost(first, zeros)
    for fraction in np.linspace(0.9 if bits == 8 else 0.5, 1.12, 32):
        for sign in (1, -1) if symmetric else (1,):
            scale = first.astype(np.float64) * fraction * sign
            scale = scale.astype(np.float16) if half else scale
            least = np.minimum(least, lost(scale, zeros))
    scales = first.copy()
    levels = library.search(blocks, importance, bits, symmetric, half, scales, zeros)
    assert not half or np.array_equal(scales, scales.astype(np.float16))
    assert (lost(scales, zeros) <= least * (1 + 1e-4)).all()
    values = (levels - zeros[..., None]) * scales[..., None]
    np.testing.assert_allclose((h * (blocks - values) ** 2).sum(2), lost(scales, zeros), rtol=1e-4)


CODEBOOKS = "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"


def codebook_of(name):
    """The values of a type's entries in gguf-py, float32 [weights of an entry, entries]."""
    if name.startswith("IQ4"):
        return np.array([quants.IQ4_NL.kvalues], np.float32)
    codec = getattr(quants, name)
    codec.init_grid()
    return np.ascontiguousarray(codec.grid[0, 0].T)


def random_codes(name, rows, columns):
    """Packed rows of any bits, with values near 1."""
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(3).integers(0, 256, (rows, columns // block, size), np.uint8)
    packed[..., :2] = np.array([1], np.float16).view(np.uint8)
    largest = np.abs(quants.dequantize(packed.reshape(rows, -1), kind)).mean()
    packed[..., :2] = np.array([0.8 / largest], np.float16).view(np.uint8)
    return packed.reshape(rows, -1)


def choose_codes(name, weights, packed, h, first):
    factors, matrix = library.factor(h.copy()), h.astype(np.float32)
    number = GGMLQuantizationType[name].value
    library.choose_codes(weights, packed, number, codebook_of(name), first, matrix, factors)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_other_codes_lose_less_on_the_same_scales(name):
    """From random codes; gguf-py, which shares no code with the library, reads them."""
    weights, h, kind = rows_of(200, 512), positive(128), GGMLQuantizationType[name]
    packed = random_codes(name, *weights.shape)
    before = quants.dequantize(packed, kind)
    choose_codes(name, weights, packed, h, 128)
    after, errors = quants.dequantize(packed, kind), []
    others = np.r_[0:128, 256:512]
    np.testing.assert_array_equal(before[:, others], after[:, others])
    for values in (before, after):
        off = (weights - values)[:, 128:256]
        errors.append(np.einsum("nk,kl,nl->n", off, h, off))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].mean() < 0.2 * errors[0].mean()
    again = packed.copy()
    choose_codes(name, weights, again, h, 128)
    off = (weights - quants.dequantize(again, kind))[:, 128:256]
    assert (np.einsum("nk,kl,nl->n", off, h, off) <= errors[1] * (1 + 1e-6)).all()


def everything():
    """All functions on rows of an odd size."""
    weights, h = rows_of(70, 150), positive(150)
    grid, zeros = read_levels(weights)
    factors = library.factor(h.copy())
    levels, lost = library.feedback(weights, grid, factors)
    library.refine(weights, grid, h.astype(np.float32), levels, rounds=2, zeros=zeros, half=True)
    blocks = rows_of(50, 96).reshape(50, 3, 32)
    scales = np.abs(blocks).max(2) / np.float32(8)
    searched = library.search(blocks, None, 4, True, True, scales, np.full_like(scales, 8))
    results = {"m": factors.m, "lost": lost, "levels": levels, "scale": grid.scale}
    for name in CODEBOOKS:
        results[name] = random_codes(name, 50, 512)
        choose_codes(name, rows_of(50, 512), results[name], positive(256), 128)
    return results | {"searched": searched, "scales": scales}


PROGRAM = """
import pathlib, sys
import numpy as np
from rgexport.kernels.rounding import library
library.LIBRARY = pathlib.Path(sys.argv[1])
from tests.kernels.rounding.test_rounding import everything
np.savez(sys.argv[2], **everything())
"""


def assert_same_bits(path, folder, **variables):
    """Runs everything by the library at `path` in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(path), str(folder / "all.npz")]
    done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:].decode()
    theirs = np.load(folder / "all.npz")
    for name, ours in everything().items():
        np.testing.assert_array_equal(ours, theirs[name], err_msg=name)


@pytest.mark.parametrize("cpu", ["scalar", "avx2"])
def test_every_processor_gives_the_same_bits(cpu, tmp_path):
    assert_same_bits(library.LIBRARY, tmp_path, RGEXPORT_CPU=cpu)


def _sanitized_rounding(folder):
    source = library.LIBRARY.parent
    build(source, folder, folder / "build", "-DSANITIZE=address,undefined")


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is loaded as on Linux")
@pytest.mark.parametrize("cpu", ["scalar", "avx2", "avx512"])
def test_sanitizers_find_nothing(cpu, tmp_path):
    """Python is not built with the address sanitizer, so its own library is loaded first."""
    source, onnx = library.LIBRARY.parent, library.LIBRARY.parents[1] / "onnx" / "src"
    files = [*sorted((source / "src").iterdir()), source / "CMakeLists.txt"]
    folder = built(
        _sanitized_rounding, [*files, *(onnx / name for name in ("cpu.cpp", "cpu.h", "scales.h"))]
    )
    asked = [COMPILER, "-print-file-name=libasan.so"]
    first = subprocess.check_output(asked, text=True).strip()
    variables = {"LD_PRELOAD": first, "ASAN_OPTIONS": "detect_leaks=0"}
    assert_same_bits(folder / library.LIBRARY.name, tmp_path, RGEXPORT_CPU=cpu, **variables)
