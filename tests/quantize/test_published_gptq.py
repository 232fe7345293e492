"""GPTQ beside that of coremltools, which follows the authors' code, on random layers."""

import numpy as np
import pytest

from rgexport.kernels.rounding import library
from rgexport.kernels.rounding.library import Grid
from rgexport.quantize import affine
from rgexport.quantize.algorithms import encode
from rgexport.quantize.scheme import Affine
from rgexport.quantize.statistics import statistics_of

torch = pytest.importorskip("torch")
published = pytest.importorskip("coremltools.optimize.torch.layerwise_compression.algorithms")

DAMPING = 0.01


def layer(seed: int, rows: int = 48, columns: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and correlated inputs [T, columns] of unequal sizes."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, columns)) * rng.uniform(0.2, 3, (rows, 1))
    mixing = rng.standard_normal((columns // 2, columns)) * np.exp(rng.standard_normal(columns))
    inputs = rng.standard_normal((600, columns // 2)) @ mixing
    inputs += 0.1 * rng.standard_normal(inputs.shape)
    return weights.astype(np.float32), inputs.astype(np.float32)


def by_coremltools(
    weights: np.ndarray, inputs: np.ndarray, **options: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantized weights, with the scales and zero points [rows, blocks]."""
    linear = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    linear.weight.data = torch.from_numpy(weights.copy())
    config = published.ModuleGPTQConfig.from_dict(
        {"weight_dtype": "uint4", "hessian_dampening": DAMPING, **options}
    )
    with torch.no_grad():
        gptq = published.GPTQ(linear, config)
        x = torch.from_numpy(inputs)
        gptq.add_batch(x, linear(x))
        gptq.compress()
    scales, zeros = (torch.cat(part, 1).numpy() for part in (gptq._scale, gptq._zero_point))
    return linear.weight.data.numpy(), scales, zeros


def hessian_of(inputs: np.ndarray) -> np.ndarray:
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("seed", [0, 1])
def test_on_its_scales_the_levels_are_the_same(scheme: str, seed: int) -> None:
    weights, inputs = layer(seed)
    found, scales, zeros = by_coremltools(weights, inputs, quantization_scheme=scheme)
    hessian = hessian_of(inputs).astype(np.float64)
    hessian += DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    factors = library.factor(hessian)
    assert factors is not None
    grid = Grid(weights.shape[1], 15, scales, -scales * zeros)
    levels, _ = library.feedback(weights, grid, factors)
    theirs = np.rint(found / scales + zeros)
    # In float32, a sum at the middle between two levels may fall to either; what follows differs.
    same = (levels == theirs).all(1)
    assert same.mean() > 0.9
    assert (levels == theirs).mean() > 0.99


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_whole_leaves_less(block: int, scheme: str, seed: int) -> None:
    """By its own measure, the error of the layer's outputs on the inputs that both have seen."""
    weights, inputs = layer(seed)
    options = {"quantization_scheme": scheme, "granularity": "per_block", "block_size": block}
    theirs, _, _ = by_coremltools(weights, inputs, **options)
    ours_as = Affine(4, block, symmetric=scheme == "symmetric", algorithm="gptq")
    known = statistics_of([hessian_of(inputs)], len(inputs))
    ours = affine.decode(encode("w", weights, ours_as, known), ours_as, weights.shape[1])

    def lost(quantized: np.ndarray) -> float:
        return float(np.square(inputs @ (quantized - weights).T, dtype=np.float64).sum())

    assert lost(ours) < lost(theirs)
