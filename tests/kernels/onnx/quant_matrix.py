"""Random block-wise quantized matrices, and what a product with one should be."""

from dataclasses import dataclass, replace

import numpy as np

from tests.kernels.onnx.one_node import Case


@dataclass(frozen=True)
class QuantMatrix:
    """A matrix [N, K] as MatMulNBits stores it.

    `levels` [N, blocks · block] and `zeros` [N, blocks] are the unpacked numbers; the columns
    after K hold numbers that must not matter.
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

    def with_scales_in(self, dtype: type[np.floating]) -> "QuantMatrix":
        return replace(self, scales=self.scales.astype(dtype))

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
        attributes = {"K": self.columns, "N": rows, "bits": self.bits, "block_size": self.block}
        attributes |= {"digits": self.digits} if self.digits > 1 else {}
        outputs = {"y": (*x.shape[:-1], rows)}
        return Case("QuantLinear", inputs, outputs, attributes, frozenset(inputs) - {"x"})


def random_matrix(
    columns: int, rows: int, bits: int, block: int, *, asymmetric=False, bias=False, digits=1
) -> QuantMatrix:
    """Levels over the whole range, and in the padding; scales of both signs."""
    rng = np.random.default_rng(0)
    blocks = -(-columns // block)
    levels = rng.integers(0, 2**bits, (rows, blocks * block), np.uint8)
    zeros = np.full((rows, blocks), 2 ** (bits - 1), np.uint8)
    if asymmetric:
        zeros = rng.integers(0, 2**bits, (rows, blocks), np.uint8)
    scales = rng.uniform(-2, 2, (rows, blocks)).astype(np.float32) / 2**bits
    added = rng.standard_normal(rows, np.float32) if bias else None
    return QuantMatrix(columns, bits, block, levels, scales, zeros, asymmetric, added, digits)


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


def activations(batch: int, tokens: int, columns: int, seed: int = 1) -> np.ndarray:
    """Rows whose codes are certain: nothing that is rounded lies next to a half."""
    rng = np.random.default_rng(seed)
    shape = batch, tokens, columns
    codes = rng.integers(-126, 127, shape) + rng.uniform(-0.45, 0.45, shape)
    codes[..., ::16] = 127  # the first of every block: the scale is what follows
    return (codes * 2.0 ** rng.integers(-6, 3, (batch, tokens, 1))).astype(np.float32)


def together(x: np.ndarray, matrices: list[QuantMatrix]) -> Case:
    """QuantLinear2 or QuantLinear3: each kind of input for all matrices, then the next kind."""
    cases = [w.case(x) for w in matrices]
    kinds = [kind for kind in cases[0].inputs if kind != "x"]
    each = {f"{kind}{i}": case.inputs[kind] for kind in kinds for i, case in enumerate(cases)}
    sizes = {f"N{i + 1 if i else ''}": case.attributes["N"] for i, case in enumerate(cases)}
    outputs = {f"y{i}": case.outputs["y"] for i, case in enumerate(cases)}
    attributes = cases[0].attributes | sizes
    return Case(f"QuantLinear{len(cases)}", {"x": x} | each, outputs, attributes, frozenset(each))
