"""`rgexport reference`: captures what the full-precision model computes for some prompts.

All prompts go through one layer before the next one is read, and logits exist for one block of
positions at a time, so memory is that of a layer and a block, whatever the prompts' length. Where
the whole model fits into memory, its layers stay there, which speeds up the greedy continuations.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.export.origin import folder_of
from rgexport.export.verified import hash_new_files
from rgexport.files.atomic import check_file_target
from rgexport.files.hashing import FileRecord
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.state import State, state_specs, zero_state
from rgexport.griffin.tensor import WeightSource
from rgexport.progress import amount, detail, expect_stages, task
from rgexport.runtimes.environment import environment
from rgexport.validate.continuations import continue_greedily
from rgexport.validate.identity.text import text_identity
from rgexport.validate.reference.implementations import OWN, choose_implementation
from rgexport.validate.reference.kept_logits import Layout, choose_layout, keep_logits
from rgexport.validate.reference.prompts import choose_prompts
from rgexport.validate.reference.reference_file import (
    Header,
    PromptRecord,
    checkpoint_name,
    checkpoint_specs,
    is_reference,
    sketch_name,
    state_name,
    stored_shape,
    write_reference,
)
from rgexport.validate.reference_pass import ReferenceModel
from rgexport.validate.text import Text
from rgexport.validate.weights.sketch import sketch

GREEDY_TOKENS = 32


@dataclass(frozen=True)
class _Run:
    """What the model computed.

    Attributes:
        hidden: of each prompt, [1, T, width] of the model's own array type.
        states: of each prompt, those after its checkpoints and its end.
        activations: [watched positions, layers, width].
    """

    hidden: list[Any]
    states: list[list[State]]
    activations: np.ndarray


def capture(
    checkpoint: Checkpoint,
    target: Path,
    *,
    prompts: Path | None = None,
    device: str = "auto",
    impl: str = OWN,
    low_memory: bool = False,
    force: bool = False,
) -> Path:
    """Captures a reference into the file `target`, which appears once it is complete.

    Args:
        checkpoint: the model.
        target: the file.
        prompts: a file of them; by default the built-in ones.
        device: where torch computes; `auto` is CUDA where there is one.
        impl: who computes, one of `implementations.NAMES`.
        low_memory: hold the weights of one layer at a time even where all would fit.
        force: replace an earlier file.

    Raises:
        RequestError: no torch or no such device or package, an unsound checkpoint, or one that the
            package cannot run, prompts that cannot be read, or a target that exists or cannot be
            written.
    """
    check_file_target(target, force=force, replaceable=is_reference)
    make = choose_implementation(impl, device, low_memory)
    tokenizer = load_tokenizer(folder_of(checkpoint)) if checkpoint.tokenizer_files else None
    chosen = choose_prompts(
        tokenizer,
        vocab_size=checkpoint.config.vocab_size,
        window=checkpoint.config.window,
        file=prompts,
    )
    expect_stages(5 if tokenizer else 4)
    require_sound(checkpoint)
    lengths = [len(prompt.tokens) for prompt in chosen]
    detail(f"Capturing {checkpoint.name} on {len(chosen)} prompts, {sum(lengths)} tokens")
    model = make(checkpoint.config, checkpoint.weights)
    layout = choose_layout(lengths, model.config.vocab_size)
    run = _run(model, chosen, layout)
    arrays = {"tokens": np.concatenate([prompt.tokens for prompt in chosen])}
    arrays |= keep_logits(model, chosen, run.hidden, layout)
    greedy = _continue(model, run, tokenizer.stop_ids) if tokenizer else [[] for _ in chosen]
    header = _header(checkpoint, model, layout, tuple(_records(chosen, layout, greedy)))
    arrays |= {f"greedy.{i}": np.array(ids, np.int64) for i, ids in enumerate(greedy) if ids}
    arrays |= _state_arrays(header, run.states)
    arrays |= sketch_arrays(checkpoint.config, checkpoint.weights)
    write_reference(target, header, arrays | {"activations": run.activations}, force=force)
    return target


def closing_line(target: Path) -> str:
    """What the command prints."""
    size = amount(target.stat().st_size)
    return f"{target} is complete ({size}). Use it: rgexport validate ARTIFACT --reference {target}"


def _header(
    checkpoint: Checkpoint,
    model: ReferenceModel,
    layout: Layout,
    prompts: tuple[PromptRecord, ...],
) -> Header:
    names = {path: name for name, path in checkpoint.weight_files.items()}
    hashes = hash_new_files(names)
    return Header(
        model=checkpoint.name,
        config=model.config,
        files={names[p]: FileRecord(sha, p.stat().st_size) for p, sha in hashes.items()},
        computed=model.describe(),
        environment=environment(),
        tail_bits=layout.tail_bits,
        prompts=prompts,
        watched=tuple(layout.watched.tolist()),
        identity=text_identity(checkpoint),
    )


def _run(model: ReferenceModel, prompts: Sequence[Text], layout: Layout) -> _Run:
    config = model.config
    texts = [(prompt.tokens[None], zero_state(config, 1)) for prompt in prompts]
    ends = np.cumsum([len(prompt.tokens) for prompt in prompts])
    activations = np.zeros((len(layout.watched), config.num_layers, config.width), np.float32)

    def watch(layer: int, place: int, stream: Any) -> None:
        start, stop = int(ends[place]) - stream.shape[1], int(ends[place])
        here = (layout.watched >= start) & (layout.watched < stop)
        activations[here, layer] = stream[0, layout.watched[here] - start].tolist()
        advance(stop - start)

    total = int(ends[-1]) * config.num_layers
    with task("Running the reference", total, "tokens through layers") as advance:
        found = model.run_each(texts, stops=layout.checkpoints, watch=watch)
    return _Run([hidden for hidden, _ in found], [states for _, states in found], activations)


def _continue(model: ReferenceModel, run: _Run, stop_ids: Collection[int]) -> list[list[int]]:
    """The greedy continuation of each prompt."""
    ends = [states[-1] for states in run.states]
    return continue_greedily(model, run.hidden, ends, GREEDY_TOKENS, stop_ids)


def _state_arrays(header: Header, states: Sequence[Sequence[State]]) -> dict[str, np.ndarray]:
    """The states after each prompt, and after its checkpoints."""
    arrays = {}
    for index, (prompt, (*inside, end)) in enumerate(zip(header.prompts, states, strict=True)):
        for spec in state_specs(header.config):
            kept = stored_shape(spec, prompt.tokens)[0]
            arrays[state_name(index, spec)] = end[spec.name][0, spec.shape[0] - kept :]
        for spec in checkpoint_specs(header.config) if inside else ():
            stacked = np.concatenate([state[spec.name] for state in inside])
            arrays[checkpoint_name(index, spec)] = stacked
    return arrays


def sketch_arrays(config: GriffinConfig, weights: WeightSource) -> dict[str, np.ndarray]:
    """Sketches of all tensors that an artifact may hold, and the sums of their squares."""
    names = list(model_tensors(config))
    found, squares = {}, []
    with task("Sketching the weights", sum(weights[name].nbytes for name in names)) as advance:
        for name in names:
            found[sketch_name(name)], square = sketch(weights[name])
            squares.append(square)
            advance(weights[name].nbytes)
    return found | {"squares": np.array(squares)}


def _records(
    prompts: Sequence[Text], layout: Layout, greedy: Sequence[list[int]]
) -> Iterator[PromptRecord]:
    start = 0
    for prompt, ids, inside in zip(prompts, greedy, layout.checkpoints, strict=True):
        count = len(prompt.tokens)
        full = int(((layout.full >= start) & (layout.full < start + count)).sum())
        exact = dict.fromkeys(("next token", "first choice", "first five", "states"), "exact")
        exact["KL"] = "exact" if full == count else "an interval"
        exact["logits"] = "exact" if full == count else "at full positions"
        yield PromptRecord(prompt.name, count, prompt.bytes, full, len(ids), exact, tuple(inside))
        start += count
