"""What a reference file keeps of the logits, collected position by position."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rgexport.griffin.tensor import slab_bounds
from rgexport.progress import task
from rgexport.validate.reference import condensed
from rgexport.validate.reference.prompts import Prompt
from rgexport.validate.reference.reference_layout import Layout
from rgexport.validate.reference_pass import ReferenceModel

BLOCK_BYTES = 128 << 20
"""Logits of a block of positions."""


@dataclass
class _Kept:
    """What becomes of the logits."""

    layout: Layout
    sums: list[tuple[float, ...]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    codes: list[np.ndarray] = field(default_factory=list)
    full: list[np.ndarray] = field(default_factory=list)

    def add(self, logits: np.ndarray, next_token: int, full: bool) -> None:
        """One position's logits [vocab]; `next_token` is -1 at the end of a prompt."""
        wide = logits.astype(np.float64)
        total = condensed.log_sum_exp(wide)
        tail: tuple[float, ...] = (0,) * 5
        if full:
            self.full.append(logits.copy())
            self.counts.append(0)
        else:
            tail = self._add_condensed(logits)
        nll = 0.0 if next_token < 0 else total - float(logits[next_token])
        self.sums.append((total, nll, float(wide.var()), *tail))

    def _add_condensed(self, logits: np.ndarray) -> tuple[float, ...]:
        found = condensed.condense(logits, self.layout.tail_bits, self.layout.most)
        self.counts.append(len(found.ids))
        self.ids.append(found.ids)
        self.logits.append(found.logits)
        tail = found.tail
        if tail.codes is not None:
            self.codes.append(tail.codes)
        return tail.mass, tail.offset, tail.moved, tail.floor, tail.step

    def arrays(self, vocab_size: int) -> dict[str, np.ndarray]:
        """All that `reference_file` has of the logits."""

        def joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
            return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)

        def stacked(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
            return np.stack(parts) if parts else np.empty((0, vocab_size), dtype)

        arrays = {
            "full.positions": self.layout.full.astype(np.int64),
            "full.logits": stacked(self.full, np.float32),
            "kept.counts": np.array(self.counts, np.int64),
            "kept.ids": joined(self.ids, np.int32),
            "kept.logits": joined(self.logits, np.float32),
            "sums": np.array(self.sums, np.float64),
        }
        dtype = condensed.CODES[self.layout.tail_bits]
        return arrays if dtype is None else arrays | {"codes": stacked(self.codes, dtype)}


def keep_logits(
    model: ReferenceModel, prompts: Sequence[Prompt], hidden: Sequence[Any], layout: Layout
) -> dict[str, np.ndarray]:
    """The file's arrays of logits; those of one block of positions exist at a time.

    Args:
        model: makes logits of hidden states.
        prompts: their tokens.
        hidden: of each prompt, [1, T, width] of the model's own kind.
        layout: what is kept of which position.
    """
    vocab_size = model.config.vocab_size
    kept, full = _Kept(layout), set(layout.full.tolist())
    total = sum(len(prompt.tokens) for prompt in prompts)
    with task("Keeping logits", total, "tokens") as advance:
        for prompt, states in zip(prompts, hidden, strict=True):
            following = [*prompt.tokens[1:].tolist(), -1]
            for start, stop in slab_bounds(len(following), 4 * vocab_size, BLOCK_BYTES):
                block = model.logits(states[:, start:stop])[0]
                for logits, token in zip(block, following[start:stop], strict=True):
                    kept.add(logits, token, len(kept.counts) in full)
                    advance(1)
    return kept.arrays(vocab_size)
