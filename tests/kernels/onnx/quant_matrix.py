"""Random block-wise quantized matrices, and what a product with one should be."""

from dataclasses import dataclass, replace

import numpy as np

from tests.kernels.onnx.one_node import Case


@dataclass(frozen=True)
class QuantMatrix:
    """A matrix [N, K] as MatMulNBits stores it.

    `levels` [N, blocks · block] and `zeros` [N, blocks] are the unpacked numbers; the columns
    behind K hold what must not matter.
    """

    columns: int
    bits: int
    block: int
    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    asymmetric: bool
    bias: np.ndarray | None
    digits: int = 1
    """Of the activations in a product with it."""

    @property
    def in_half(self) -> "QuantMatrix":
        """The matrix with scales rounded to float16, and of that type."""
        return replace(self, scales=self.scales.astype(np.float16))

    @property
    def in_single(self) -> "QuantMatrix":
        """The same numbers as float32."""
        return replace(self, scales=self.scales.astype(np.float32))

    @property
    def dequantized(self) -> np.ndarray:
        """[N, K] float64."""
        moved = self.levels - np.repeat(self.zeros, self.block, 1).astype(np.float64)
        return (moved * np.repeat(self.scales, self.block, 1))[:, : self.columns]

    @property
    def sizes(self) -> np.ndarray:
        """[N, K]: of the numbers that a kernel adds, which are two where zero points differ."""
        if not self.asymmetric:
            return np.abs(self.dequantized)
        added = self.levels + np.repeat(self.zeros, self.block, 1).astype(np.float64)
        return (added * np.repeat(np.abs(self.scales), self.block, 1))[:, : self.columns]

    def case(self, x: np.ndarray) -> Case:
        """QuantLinear of x [..., K]."""
        rows, blocks = self.scales.shape
        inputs = {
            "x": x,
            "data": _packed(self.levels, self.bits).reshape(rows, blocks, -1),
            "scales": self.scales,
            "zero_points": _packed(self.zeros, self.bits) if self.asymmetric else None,
            "bias": self.bias,
        }
        return Case(
            "QuantLinear",
            inputs,
            {"y": (*x.shape[:-1], rows)},
            {"K": self.columns, "N": rows, "bits": self.bits, "block_size": self.block}
            | ({"digits": self.digits} if self.digits > 1 else {}),
            frozenset(inputs) - {"x"},
        )


def random_matrix(
    columns: int,
    rows: int,
    bits: int,
    block: int,
    *,
    asymmetric: bool = False,
    bias: bool = False,
    seed: int = 0,
    junk: bool = True,
    digits: int = 1,
) -> QuantMatrix:
    """Levels over the whole range, scales of both signs, and junk in the padding, if asked for."""
    rng = np.random.default_rng(seed)
    blocks = -(-columns // block)
    levels = rng.integers(0, 2**bits, (rows, blocks * block), np.uint8)
    symmetric = np.full((rows, blocks), 2 ** (bits - 1), np.uint8)
    zeros = rng.integers(0, 2**bits, (rows, blocks), np.uint8) if asymmetric else symmetric
    if not junk:
        levels[:, columns:] = np.repeat(zeros, block, 1)[:, columns:]
    scales = rng.uniform(-2, 2, (rows, blocks)).astype(np.float32) / 2**bits
    return QuantMatrix(
        columns,
        bits,
        block,
        levels,
        scales,
        zeros,
        asymmetric,
        rng.standard_normal(rows, np.float32) if bias else None,
        digits,
    )


def _packed(levels: np.ndarray, bits: int) -> np.ndarray:
    """Rows of numbers as bytes: with 4 bits, the even one in the low half; an odd row is padded."""
    if bits == 8:
        return levels
    even = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    return (even[:, 0::2] | even[:, 1::2] << 4).astype(np.uint8)


def rounded(x: np.ndarray, block: int, digits: int = 1) -> np.ndarray:
    """Activations [..., K] as int8 with one scale, absmax / 127, for each block; float64 again.

    Codes are the nearest integers to x · (127 / absmax), halves to even; 127 / absmax and the scale
    are float32 numbers. With two digits, what that leaves is rounded to 1/254 of the scale.
    """
    columns = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % block)])
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    most = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    scale = (most / np.float32(127)).astype(np.float64)
    kept = scale * np.rint(blocks.astype(np.float64) * inverse)
    if digits == 2:
        kept += scale / 254 * np.rint((blocks - kept) * inverse * 254)
    return kept.reshape(padded.shape)[..., :columns]


def product(x: np.ndarray, w: QuantMatrix) -> np.ndarray:
    """float64 [..., N]."""
    return x.astype(np.float64) @ w.dequantized.T + (0 if w.bias is None else w.bias)
