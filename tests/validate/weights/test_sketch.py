"""Sketches tell what the weights themselves would: the sound pass, each wrong tensor does not."""

from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import from_array
from rgexport.quantize import affine, palette
from rgexport.quantize.ggml_library import quantize_rows
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.scheme import Affine, Float, Ggml, Palette, Scheme
from rgexport.validate.weights.sketch import directions, sketch, sketch_shape
from rgexport.validate.weights.sketch_errors import SketchError, sketch_errors
from rgexport.validate.weights.weight_errors import weight_errors
from rgexport.validate.weights.weight_limits import sketch_checks
from tests.llama_tools import needs_llama_cpp

SCHEMES: list[Scheme] = [
    Affine(4, 128, symmetric=False),
    Affine(4, 32, symmetric=True),
    Affine(4, 32, symmetric=True, scale="float16"),
    Affine(8, None, symmetric=True),
    Palette(),
    Float("float16"),
    Float("float32"),
]
GGML = [Ggml(kind) for kind in ("q4_0", "q5_1", "q8_0", "q4_k", "q6_k", "q3_k", "bf16")]
WEIGHTS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, s: rng.normal(size=s),
    "uniform": lambda rng, s: rng.uniform(-1, 1, s),
    "heavy": lambda rng, s: rng.standard_t(4, s),
    "zeros": lambda rng, s: np.zeros(s),
    "loud columns": lambda rng, s: rng.normal(size=s) * np.where(np.arange(s[1]) % 64, 1, 20),
    "rows of all sizes": lambda rng, s: rng.normal(size=s) * np.exp(rng.normal(size=(s[0], 1))),
}


class Known:
    """The sketch of one tensor, as a reference file has it."""

    def __init__(self, w: np.ndarray):
        self._sketch, self._square = sketch(from_array(w))

    def sketch(self, name: str) -> np.ndarray:
        return self._sketch

    def square(self, name: str) -> float:
        return self._square


def store(w: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Ŵ."""
    if isinstance(scheme, Affine):
        return affine.decode(affine.encode(w, scheme), scheme, w.shape[1])
    if isinstance(scheme, Palette):
        return palette.decode(palette.encode(w, scheme), scheme, w.shape[1])
    if isinstance(scheme, Ggml):
        kind = GGMLQuantizationType(TYPES[scheme.type].value)
        return quants.dequantize(quantize_rows(w, scheme.type, None), kind)
    return w.astype(scheme.dtype).astype(np.float32)


def compared(w: np.ndarray, stored_weights: np.ndarray, scheme: Scheme) -> SketchError:
    tensors = {"w": StoredTensor(w.shape, scheme, {})}
    (found,) = sketch_errors(Known(w), {"w": from_array(stored_weights)}, tensors)
    return found


def failed(error: SketchError) -> dict[str, float]:
    """Kind of each check that failed → how many times its limit the value is."""
    checks = sketch_checks([error])
    return {check.kind: check.value / check.limit for check in checks if not check.passed}


def weights_of(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    return (0.02 * WEIGHTS[kind](rng, shape)).astype(np.float32)


def test_the_directions_are_the_same_everywhere() -> None:
    """A file that was captured with one numpy is read with another."""
    found = directions(5, 3)
    assert found[0].tolist() == [1, 1, 1, 1, 1]
    assert found[1:].tolist() == PINNED


PINNED = [[-1, -1, 1, -1, -1], [1, 1, 1, 1, -1], [1, 1, -1, 1, -1]]


@pytest.mark.parametrize(
    ("shape", "rows", "width"),
    [
        ((256_000, 2560), 256_000, 4),
        ((200, 300), 200, 7),
        ((40, 24), 40, 24),
        ((96,), 96, 1),
        ((64, 1, 4), 64, 4),
        ((10, 256, 256), 2560, 4),
    ],
)
def test_what_is_kept_of_a_shape(shape: tuple[int, ...], rows: int, width: int) -> None:
    found = sketch_shape(shape)
    assert (found.rows, found.width) == (rows, width)
    if len(shape) == 2 and rows < 1000:
        kept, _ = sketch(from_array(weights_of("normal", (shape[0], shape[1]))))
        assert kept.shape == (rows, width) and kept.dtype == np.float32


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_a_sketch_tells_what_the_weights_tell(scheme: Scheme) -> None:
    w = weights_of("normal", (512, 384))
    twin = store(w, scheme)
    exact = weight_errors(
        {"w": from_array(w)}, {"w": from_array(twin)}, {"w": StoredTensor(w.shape, scheme, {})}
    )[0]
    found = compared(w, twin, scheme)
    assert found.relative_error == pytest.approx(exact.relative_error, rel=0.1, abs=1e-6)
    assert found.projection == pytest.approx(exact.projection, abs=2e-3)
    if not isinstance(scheme, Float):
        assert found.shift == pytest.approx(exact.shift, abs=1e-4)
    if not isinstance(scheme, Palette):  # whose levels have other distances inside than outside
        assert found.noise == pytest.approx(exact.noise, rel=0.2, abs=0.05)


@settings(max_examples=150, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    kind=st.sampled_from(list(WEIGHTS)),
    groups=st.integers(1, 20),
    columns=st.integers(2, 20).map(lambda n: 16 * n),
    seed=st.integers(0, 9),
)
def test_a_sound_tensor_is_never_suspected(
    scheme: Scheme, kind: str, groups: int, columns: int, seed: int
) -> None:
    w = weights_of(kind, (16 * groups, columns), seed)
    found = compared(w, store(w, scheme), scheme)
    assert not failed(found), found


@needs_llama_cpp
@settings(max_examples=60, deadline=None)
@given(scheme=st.sampled_from(GGML), kind=st.sampled_from(list(WEIGHTS)), seed=st.integers(0, 9))
def test_nor_is_one_in_a_ggml_type(scheme: Scheme, kind: str, seed: int) -> None:
    w = weights_of(kind, (96, 512), seed)
    found = compared(w, store(w, scheme), scheme)
    assert not failed(found), found


def _permuted(w: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).permutation(w.reshape(-1)).reshape(w.shape)


def _other_row(w: np.ndarray) -> np.ndarray:
    changed = w.copy()
    changed[7] = w[8]
    return changed


WRONG: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "shuffled": (_permuted, 3.0),
    "other values": (lambda w: weights_of("normal", (w.shape[0], w.shape[1]), 9), 3.0),
    "a twentieth of other values": (lambda w: 0.05 * _permuted(w), 3.0),
    "rows shifted": (lambda w: np.roll(w, 1, axis=0), 3.0),
    "one row exchanged": (_other_row, 1.2),
    "times 1.05": (lambda w: np.float32(1.05) * w, 2.0),
    "times 0.95": (lambda w: np.float32(0.95) * w, 2.0),
    "not a number": (lambda w: np.where(w == w.max(), np.nan, w), 0.0),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_a_wrong_tensor_is_suspected(scheme: Scheme, wrong: str) -> None:
    """By a factor: unrelated weights by three and more."""
    w = weights_of("normal", (512, 384))
    make, factor = WRONG[wrong]
    if wrong == "not a number":
        twin = make(store(w, scheme))
    else:
        twin = store(make(w), scheme)
    found = failed(compared(w, twin, scheme))
    assert found and not max(found.values()) < factor, found
