"""`rgexport reference`: what the full-precision model says to some prompts, as one file.

All prompts go through one layer before the next one is read, and logits exist for one block of
positions at a time: memory is that of a layer and of a block, whatever the texts' length.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.atomic import check_file_target
from rgexport.export.origin import folder_of
from rgexport.export.verified import hash_new_files
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.state import State, state_specs, zero_state
from rgexport.griffin.tensor import slab_bounds
from rgexport.hashing import FileRecord
from rgexport.progress import amount, note, task
from rgexport.runtimes.environment import environment
from rgexport.runtimes.tokenizer import load_tokenizer
from rgexport.validate import condensed
from rgexport.validate.prompts import Prompt, choose_prompts
from rgexport.validate.reference_file import (
    Header,
    PromptRecord,
    is_reference,
    state_name,
    stored_shape,
    write_reference,
)
from rgexport.validate.teacher import (
    MakeReference,
    ReferenceModel,
    torch_reference,
    watched_layers,
)

LOGITS_BYTES = 17_500_000
"""What the file should take for logits, all positions together: with states, the demo's is below
20 MB and has 16 bits for every token everywhere."""
FULL_BYTES, LEAST_FULL = 1 << 20, 16
"""Of that, for logits as they are; but for so many positions or a few less, whatever it takes."""
LEAST_MOST = 1024
"""Where tails have no codes, the limit of kept tokens is no lower than this, whatever it takes."""
BLOCK_BYTES = 128 << 20
"""Logits of a block of positions."""
GREEDY_TOKENS = 32

Taught = tuple[Any, State]
"""What the model makes of a prompt: hidden states [1, T, width] of its own kind, and the state."""


@dataclass(frozen=True)
class Layout:
    """How the positions are stored."""

    full: np.ndarray
    """Positions that keep all logits, ascending."""
    tail_bits: int
    most: int
    """Kept tokens of a position, at most."""


@dataclass
class _Arrays:
    """What becomes of the logits, position by position."""

    sums: list[tuple[float, ...]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    codes: list[np.ndarray] = field(default_factory=list)
    full: list[np.ndarray] = field(default_factory=list)

    def add(self, logits: np.ndarray, next_token: int, layout: Layout, full: bool) -> None:
        """One position's logits [vocab]; `next_token` is -1 at the end of a prompt."""
        if full:
            total = condensed.log_sum_exp(logits.astype(np.float64))
            self.full.append(logits)
            self.counts.append(0)
            tail: tuple[float, ...] = (0,) * 5
        else:
            found = condensed.condense(logits, layout.tail_bits, layout.most)
            total = found.log_sum_exp
            self.counts.append(len(found.ids))
            self.ids.append(found.ids)
            self.logits.append(found.logits)
            if found.tail.codes is not None:
                self.codes.append(found.tail.codes)
            t = found.tail
            tail = t.mass, t.offset, t.moved, t.floor, t.step
        nll = 0.0 if next_token < 0 else total - float(logits[next_token])
        self.sums.append((total, nll, *tail))


def capture(
    checkpoint: Checkpoint,
    target: Path,
    *,
    prompts: Path | None = None,
    device: str = "auto",
    force: bool = False,
) -> Path:
    """Captures a reference into the file `target`, which appears when it is complete.

    Raises:
        RequestError: no torch or no such device, an unsound checkpoint, prompts that cannot be
            read, or a target that exists or cannot be written.
    """
    check_file_target(target, force=force, replaceable=is_reference)
    make = torch_reference(device)
    config = checkpoint.config
    tokenizer = load_tokenizer(folder_of(checkpoint)) if checkpoint.tokenizer_files else None
    chosen = choose_prompts(
        tokenizer, vocab_size=config.vocab_size, window=config.window, file=prompts
    )
    require_sound(checkpoint)
    model = make(config, checkpoint.weights)
    count = sum(len(prompt.tokens) for prompt in chosen)
    note(f"Capturing {checkpoint.name} on {len(chosen)} prompts, {count} tokens")

    passes = _run(make, checkpoint, chosen)
    layout = choose_layout([len(prompt.tokens) for prompt in chosen], config.vocab_size)
    found = _condense_all(model, chosen, passes, layout, 4 * config.vocab_size)
    stop_ids = frozenset[int]() if tokenizer is None else tokenizer.stop_ids
    greedy = _continue(model, passes, stop_ids) if tokenizer else [[] for _ in chosen]
    header = Header(
        model=checkpoint.name,
        config=config,
        files=_files(checkpoint),
        computed=model.describe(),
        environment=environment(),
        tail_bits=layout.tail_bits,
        prompts=tuple(_records(chosen, layout, greedy)),
    )
    arrays = {"tokens": np.concatenate([prompt.tokens for prompt in chosen])}
    arrays |= _logit_arrays(found, layout, config.vocab_size)
    arrays |= {f"greedy.{i}": np.array(ids, np.int64) for i, ids in enumerate(greedy) if ids}
    for index, (prompt, (_, state)) in enumerate(zip(chosen, passes, strict=True)):
        for spec in state_specs(config):
            kept = stored_shape(spec, len(prompt.tokens))[0]
            arrays[state_name(index, spec)] = state[spec.name][0, spec.shape[0] - kept :]
    write_reference(target, header, arrays, force=force)
    return target


def closing_line(target: Path) -> str:
    """Where the file is and what to do with it."""
    size = amount(target.stat().st_size)
    return f"{target} is complete ({size}). Use it: rgexport validate ARTIFACT --reference {target}"


def choose_layout(lengths: Sequence[int], vocab_size: int) -> Layout:
    """What fits into `LOGITS_BYTES`, for prompts of these lengths.

    Full are the last positions of the prompts, and others at even distances.
    """
    count, item = sum(lengths), np.dtype(np.float32).itemsize
    if count * vocab_size * item <= LOGITS_BYTES:
        return Layout(np.arange(count), 0, condensed.LEAST)
    room = max(LEAST_FULL, FULL_BYTES // (vocab_size * item))
    last = np.cumsum(lengths) - 1
    last = last[np.linspace(0, len(last) - 1, min(room, len(last))).astype(np.int64)]
    even = np.linspace(0, count - 1, max(room - len(last), 0)).round().astype(np.int64)
    full = np.unique(np.concatenate([last, even]))[:count]
    left = LOGITS_BYTES - len(full) * vocab_size * item
    each = left / max(1, count - len(full))
    kept = 2 * item  # an id and a logit
    fitting = (bits for bits in (16, 8) if vocab_size * bits // 8 + condensed.LEAST * kept <= each)
    bits = next(fitting, 0)
    most = max(int(each - vocab_size * bits // 8) // kept, 0 if bits else LEAST_MOST)
    return Layout(full, bits, min(most, condensed.MOST, vocab_size))


def _run(make: MakeReference, checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> list[Taught]:
    """All prompts through the model, one layer at a time."""
    texts = [(prompt.tokens[None], zero_state(checkpoint.config, 1)) for prompt in prompts]
    with watched_layers("Running the reference", checkpoint.weights) as weights:
        return make(checkpoint.config, weights).run_each(texts)


def _condense_all(
    model: ReferenceModel,
    prompts: Sequence[Prompt],
    passes: Sequence[Taught],
    layout: Layout,
    row_bytes: int,
) -> _Arrays:
    found = _Arrays()
    full = set(layout.full.tolist())
    total = sum(len(prompt.tokens) for prompt in prompts)
    with task("Keeping logits", total, "tokens") as advance:
        for prompt, (hidden, _) in zip(prompts, passes, strict=True):
            following = [*prompt.tokens[1:].tolist(), -1]
            for start, stop in slab_bounds(len(following), row_bytes, BLOCK_BYTES):
                block = model.logits(hidden[:, start:stop])[0]
                for logits, token in zip(block, following[start:stop], strict=True):
                    found.add(logits.copy(), token, layout, len(found.counts) in full)
                    advance(1)
    return found


def _continue(
    model: ReferenceModel, passes: Sequence[Taught], stop_ids: Collection[int]
) -> list[list[int]]:
    """The most likely continuation of each prompt, all in one batch; a stop id ends one."""
    state = {n: np.concatenate([s[n] for _, s in passes]) for n in passes[0][1]}
    following = [int(model.logits(hidden[:, -1:])[0, -1].argmax()) for hidden, _ in passes]
    found = [[token] for token in following]
    with task("Continuing greedily", GREEDY_TOKENS, "tokens") as advance:
        for _ in range(GREEDY_TOKENS - 1):
            hidden, state = model.run(np.array(following, np.int64)[:, None], state)
            following = model.logits(hidden)[:, -1].argmax(1).tolist()
            for ids, token in zip(found, following, strict=True):
                if ids[-1] not in stop_ids:
                    ids.append(token)
            advance(1)
    return found


def _logit_arrays(found: _Arrays, layout: Layout, vocab_size: int) -> dict[str, np.ndarray]:
    """All that `reference_file` has of the logits."""

    def joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)

    def stacked(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
        return np.stack(parts) if parts else np.empty((0, vocab_size), dtype)

    arrays = {
        "full.positions": layout.full.astype(np.int64),
        "full.logits": stacked(found.full, np.float32),
        "kept.counts": np.array(found.counts, np.int64),
        "kept.ids": joined(found.ids, np.int32),
        "kept.logits": joined(found.logits, np.float32),
        "sums": np.array(found.sums, np.float64),
    }
    dtype = condensed.CODES[layout.tail_bits]
    return arrays if dtype is None else arrays | {"codes": stacked(found.codes, dtype)}


def _records(
    prompts: Sequence[Prompt], layout: Layout, greedy: Sequence[list[int]]
) -> Iterator[PromptRecord]:
    start = 0
    for prompt, ids in zip(prompts, greedy, strict=True):
        count = len(prompt.tokens)
        full = int(((layout.full >= start) & (layout.full < start + count)).sum())
        exact = dict.fromkeys(("next token", "first choice", "first five", "states"), "exact")
        exact["KL"] = "exact" if full == count else "an interval"
        exact["logits"] = "exact" if full == count else "at full positions"
        yield PromptRecord(prompt.name, count, prompt.bytes, full, len(ids), exact)
        start += count


def _files(checkpoint: Checkpoint) -> dict[str, FileRecord]:
    hashes = hash_new_files(checkpoint.weight_files)
    return {path.name: FileRecord(sha, path.stat().st_size) for path, sha in hashes.items()}
