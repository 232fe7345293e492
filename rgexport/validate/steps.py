"""The distance between neighbouring values that a scheme can store, at each weight of a tensor."""

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.quantize.scheme import Affine, Ggml, Scheme
from rgexport.validate import ggml_steps

_AS_GOOD_AS_ZERO = 2.0**-100
"""No integer step is taken for smaller than this: such weights may be stored as zeros."""


def step_sizes(name: str, w: np.ndarray, stored: StoredTensor) -> np.ndarray:
    """The step at each of the weights [rows, columns], from them and the way of storing alone."""
    scheme = stored.scheme
    if isinstance(scheme, Affine):
        return _affine_steps(w, scheme)
    if isinstance(scheme, Ggml):
        return _ggml_steps(name, w, scheme.type)
    return _float_steps(w, *_FLOATS[scheme.dtype])


def _ggml_steps(name: str, w: np.ndarray, kind: str) -> np.ndarray:
    for end, steps in ggml_steps.TRANSFORMED.items():
        if name.endswith(end):
            return steps(w)
    if kind in ggml_steps.BLOCKS:
        return ggml_steps.block_steps(w, ggml_steps.BLOCKS[kind])
    return _float_steps(w, *ggml_steps.FLOATS[kind])


_FLOATS = {"float32": (23, 2.0**-126), "float16": (10, 2.0**-24)}
"""dtype → digits behind the point, smallest step."""


def _float_steps(w: np.ndarray, digits: int, smallest: float) -> np.ndarray:
    # frexp: |w| = m · 2^e with m in [0.5, 1), where the floats are 2^(e - 1 - digits) apart.
    exponent = np.frexp(w)[1] - (1 + digits)
    return np.maximum(np.ldexp(np.float32(1), exponent), np.float32(smallest))


def _affine_steps(w: np.ndarray, scheme: Affine) -> np.ndarray:
    """A block's range over the number of steps in it.

    Symmetric: 2^(bits - 1) from zero to the value of largest magnitude, whatever its sign;
    asymmetric: 2^bits - 1 from min(w, 0) to max(w, 0).
    """
    starts = np.arange(0, w.shape[1], scheme.block)
    high = np.maximum.reduceat(w, starts, axis=1)
    low = np.minimum.reduceat(w, starts, axis=1)
    if scheme.symmetric:
        step = np.maximum(high, -low) / np.float32(2 ** (scheme.bits - 1))
    else:
        step = (np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(2**scheme.bits - 1)
    step = np.maximum(step, np.float32(_AS_GOOD_AS_ZERO))
    return np.repeat(step, scheme.block, axis=1)[:, : w.shape[1]]


def without_clipping(
    error: np.ndarray, w: np.ndarray, step: np.ndarray, scheme: Scheme
) -> np.ndarray:
    """The error against what the outermost levels allow.

    Some schemes have one level less on one side, so a value beyond it may be stored as that
    level. Which side that is, is the encoder's choice: the smaller error counts.
    """
    levels = _levels_that_clip(scheme)
    if not levels:
        return error
    limit = step * np.float32(levels)
    beyond = w - np.clip(w, -limit, limit)
    return np.where(np.abs(error + beyond) < np.abs(error), error + beyond, error)


def _levels_that_clip(scheme: Scheme) -> int:
    """Levels on the side that has one less; 0 where both have as many."""
    if isinstance(scheme, Affine):
        return 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 0
    blocks = _blocks(scheme)
    return blocks.below - 1 if blocks and blocks.clips else 0


def is_searched(scheme: Scheme, weighted: bool) -> bool:
    """Whether levels are chosen for the least squared error, not for each weight."""
    blocks = _blocks(scheme)
    if blocks is None:
        return False
    return blocks.grouped > 0 or (weighted and blocks.below < ggml_steps.BLOCKS["q8_0"].below)


def _blocks(scheme: Scheme) -> ggml_steps.Blocks | None:
    return ggml_steps.BLOCKS.get(scheme.type) if isinstance(scheme, Ggml) else None
