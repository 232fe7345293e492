"""Weights of many distributions, how a scheme stores them, and how the weight table judges that."""

from types import SimpleNamespace

import numpy as np
from gguf import GGMLQuantizationType, quants

from rgexport.artifacts.manifest import StoredTensor
from rgexport.griffin.layout import input_site
from rgexport.griffin.tensor import from_array
from rgexport.quantize.algorithms.statistics import Hessian, Statistics
from rgexport.quantize.schemes.ggml_library import quantize_rows
from rgexport.quantize.schemes.ggml_types import TYPES
from rgexport.quantize.schemes.registry import Affine, Ggml, Palette, Scheme, TwoLevel
from rgexport.validate.weights.sketch import MIXTURES, sketch
from rgexport.validate.weights.sketch_errors import sketch_errors
from rgexport.validate.weights.weight_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import sketch_checks, weight_checks

LINEAR = "layers.0.mlp_block.up_proj.weight"
KINDS = {
    "normal": lambda rng, s: rng.normal(size=s),
    "uniform": lambda rng, s: rng.uniform(-1, 1, s),
    "heavy": lambda rng, s: rng.standard_t(3, s),
    "zeros": lambda rng, s: np.zeros(s),
    "loud columns": lambda rng, s: rng.normal(size=s) * np.where(np.arange(s[1]) % 64, 1, 20),
    "rows of all sizes": lambda rng, s: rng.normal(size=s) * np.exp(rng.normal(size=(s[0], 1))),
    "columns of all sizes": lambda rng, s: rng.normal(size=s) * np.exp(rng.normal(size=(1, s[1]))),
    "all large": lambda rng, s: rng.choice([-1, 1], s) * rng.uniform(0.9, 1, s),
}

WEIGHTS = ("normal", "uniform", "heavy", "columns of all sizes", "loud columns", "zeros")


def draw(kind: str, shape: tuple[int, int], *, size: float = 0.02, seed: int = 0) -> np.ndarray:
    """Weights [rows, columns] float32 of a distribution."""
    rng = np.random.default_rng([seed, *shape])
    return (size * KINDS[kind](rng, shape)).astype(np.float32)


def store(w, scheme, gain=1.0, importance=None, statistics=None) -> np.ndarray:
    """Ŵ, with all scales or tables multiplied by `gain`."""
    if isinstance(scheme, Affine | Palette | TwoLevel):
        parts = scheme.encode("w", w, statistics)
        label = {Affine: "scales", Palette: "lut", TwoLevel: "units"}[type(scheme)]
        parts[label] = (parts[label] * np.float32(gain)).astype(parts[label].dtype)
        return scheme.decode(parts, w.shape[1])
    if isinstance(scheme, Ggml):
        kind = GGMLQuantizationType(TYPES[scheme.type].value)
        return gain * quants.dequantize(quantize_rows(w, scheme.type, importance), kind)
    return (w * np.float32(gain)).astype(scheme.dtype).astype(np.float32)


def error_of(w, dequantized, scheme, *, name="w") -> WeightError:
    tensors = {name: StoredTensor(w.shape, scheme, {})}
    sources = ({name: from_array(array)} for array in (w, dequantized))
    return weight_errors(*sources, tensors)[0]


def passes(error: WeightError) -> bool:
    return all(check.passed for check in weight_checks([error]))


def inputs(columns: int, seed: int = 0) -> np.ndarray:
    """Correlated inputs [4 columns, columns], whose mean squares differ by two orders of magnitude.

    Those of other seeds have the same distribution.
    """
    rng, samples = np.random.default_rng(0), np.random.default_rng([1, seed])
    mix = np.eye(columns) + rng.standard_normal((columns, columns)) / columns**0.5
    drawn = samples.standard_normal((4 * columns, columns))
    return drawn @ mix * rng.lognormal(sigma=0.5, size=columns)


def mixtures(columns: int) -> np.ndarray:
    """As `MixtureRecorder` makes them of a text that no calibration has seen."""
    other = inputs(columns, seed=1)
    signs = np.random.default_rng(2).choice([-1, 1], (MIXTURES, len(other)))
    return (signs @ other).astype(np.float32)


def known(w: np.ndarray) -> SimpleNamespace:
    """The sketches of one tensor, as a reference file has them."""
    (array, square), mixed = sketch(from_array(w)), mixtures(w.shape[1])
    arrays = {"weights": array, "inputs": mixed, "outputs": (w @ mixed.T).astype(np.float32)}
    return SimpleNamespace(
        array=lambda name: arrays[name.partition(".")[0]], square=lambda name: square
    )


def complaints(w: np.ndarray, stored: np.ndarray, scheme: Scheme, weighted: bool) -> list[str]:
    """The kinds of checks that fail, in the weight table and by a sketch."""
    tensors = {LINEAR: StoredTensor(w.shape, scheme, {})}
    original, dequantized = ({LINEAR: from_array(x)} for x in (w, stored))
    known_inputs = {input_site(LINEAR): mixtures(w.shape[1])}
    table = weight_errors(original, dequantized, tensors, weighted=weighted, inputs=known_inputs)
    sketches = sketch_errors(known(w), dequantized, tensors, weighted=weighted)
    checks = [*weight_checks(table), *sketch_checks(sketches)]
    return [check.kind for check in checks if not check.passed]


def statistics(columns: int) -> Statistics:
    x = inputs(columns)
    hessian = x.T @ x / len(x)
    own = np.diag(hessian)
    damped = (0.7 * hessian + np.diag(0.3 * own + 0.01 * own.mean())).astype(np.float32)
    return Statistics(own.astype(np.float32), (Hessian(0, damped),))
