"""Whether a head in two stages could pay: how many rows the second stage would have to read.

    python -m bench.two_stage_head [ARTIFACT]

The levels of an 8-bit head are cut into a coarse part, the upper 4 bits, and a fine one. All rows
meet the activations with the coarse part; a bound on what the fine part can add says which rows may
still be among the k best. Those would be read in full. The artifact (by default the demo in int4)
gives real activations; a random head as wide as a 2B's shows what width does, with activations
whose best logit is so many standard deviations above the mean.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rgexport.artifacts.opening import open_artifact
from rgexport.chat.artifact_text import open_tokenizer
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference

TEXT = Path("rgexport/chat/sample.txt")
TOKENS, WIDTH, ROWS, BLOCK = 256, 2560, 16384, 32
COUNTS = 1, 40
PEAKS = 5, 10, 20


def main() -> None:
    """Prints a table: the share of rows that each bound leaves."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path, nargs="?", default=Path("out/demo-int4-onnx"))
    path = parser.parse_args().artifact
    print("| activations | best | any fine part | its norm, by row | its norm, by block |")
    print("|---|---|---|---|---|")
    for name, rows, activations in (*of_artifact(path), *random_ones()):
        head = TwoStages(rows)
        for count in COUNTS:
            shares = np.array([head.left(x, count) for x in activations])
            cells = " | ".join(f"{100 * share:.1f} %" for share in np.median(shares, 0))
            print(f"| {name} | {count} | {cells} |")


def of_artifact(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The head's weights, and what comes before it for a text."""
    artifact = open_artifact(path)
    tokens = np.array([open_tokenizer(artifact).encode_text(TEXT.read_text())[:TOKENS]])
    hidden, _ = Reference(artifact.manifest.config, artifact.weights).run(tokens)
    rows = artifact.weights[EMBEDDING].read(0, artifact.manifest.config.vocab_size)
    yield path.name, rows.astype(np.float32), hidden.numpy()[0]


def random_ones() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Normal rows, and activations that point to one of them."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((ROWS, WIDTH), np.float32)
    for peak in PEAKS:
        noise = rng.standard_normal((16, WIDTH), np.float32)
        chosen = rows[rng.integers(0, ROWS, 16)]
        # A part `share` along a row gives it a logit of share · |row|, in standard deviations.
        share = np.float32(peak / WIDTH**0.5)
        yield f"random, {peak} σ", rows, share * chosen + np.sqrt(1 - share**2) * noise


class TwoStages:
    """A head [rows, width] in 8 bits: its coarse part, and what bounds the fine one."""

    def __init__(self, rows: np.ndarray) -> None:
        """Rounds the rows to 8 bits in blocks."""
        blocks = rows.reshape(len(rows), -1, BLOCK)
        scales = np.abs(blocks).max(-1, keepdims=True) / 127
        levels = np.rint(blocks / np.where(scales > 0, scales, 1))
        coarse = 16 * np.floor((levels + 8) / 16)
        self._coarse = (coarse * scales).reshape(rows.shape)
        self._most = 8 * scales[..., 0]
        self._norms = np.linalg.norm((levels - coarse) * scales, axis=-1)

    def left(self, x: np.ndarray, count: int) -> list[float]:
        """The share of rows that may be among the `count` best, by each of three bounds."""
        logits, parts = self._coarse @ x, x.reshape(-1, BLOCK)
        norms = np.linalg.norm(parts, axis=-1)
        bounds = (
            self._most @ np.abs(parts).sum(-1),
            np.linalg.norm(self._norms, axis=-1) * np.linalg.norm(x),
            self._norms @ norms,
        )
        shares = []
        for bound in bounds:
            least = np.partition(logits - bound, -count)[-count]
            shares.append(float((logits + bound >= least).mean()))
        return shares


if __name__ == "__main__":
    main()
