"""`rgexport reference`: captures what the full-precision model computes for some prompts.

All prompts go through one layer before the next one is read, and logits exist for one block of
positions at a time, so memory is that of a layer and a block, whatever the prompts' length. Where
the whole model fits into memory, its layers stay there, which speeds up the greedy continuations.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.export.origin import folder_of
from rgexport.files.hashing import FileRecord, hash_new_files
from rgexport.files.targets import check_file_target
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import linear_inputs, model_tensors
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import State, state_specs, zero_state
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.progress import detail, expect_stages, task
from rgexport.runtimes.environment import environment
from rgexport.units import amount
from rgexport.validate.continuations import continue_greedily
from rgexport.validate.identity.text import text_identity
from rgexport.validate.reference.implementations import OWN, choose_implementation
from rgexport.validate.reference.logit_rows import choose_positions, record_logits
from rgexport.validate.reference.prompts import choose_prompts
from rgexport.validate.reference.reference_file import (
    Header,
    PromptRecord,
    checkpoint_name,
    checkpoint_specs,
    inputs_name,
    is_reference,
    outputs_name,
    sketch_name,
    state_name,
    stored_shape,
    write_reference,
)
from rgexport.validate.reference_pass import ReferenceModel, watched_layers
from rgexport.validate.states import checkpoints
from rgexport.validate.structure.elements import Fingerprint
from rgexport.validate.structure.record import can_record, record_structures
from rgexport.validate.text import Text
from rgexport.validate.weights.input_mixtures import MixtureRecorder, Mixtures, mixed
from rgexport.validate.weights.sketch import SLAB_BYTES, sketch

GREEDY_TOKENS = 32
MIXED_TOKENS = 256
"""The most tokens whose inputs of linears are mixed."""


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
        impl: who computes, `implementations.OWN` or `DEEPMIND`.
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
    texts = choose_prompts(
        tokenizer,
        vocab_size=checkpoint.config.vocab_size,
        window=checkpoint.config.window,
        file=prompts,
    )
    expect_stages(5 + bool(tokenizer) + can_record())
    require_sound(checkpoint)
    structures = record_structures(checkpoint)
    count = sum(len(text.tokens) for text in texts)
    detail(f"Capturing {checkpoint.name} on {len(texts)} prompts, {count} tokens")
    model = make(checkpoint.config, checkpoint.weights)
    records, arrays = _record(model, texts, tokenizer)
    longest = max(texts, key=lambda text: len(text.tokens))
    arrays |= sketch_arrays(checkpoint.config, checkpoint.weights, longest.tokens)
    header = _header(checkpoint, model, records, structures)
    write_reference(target, header, arrays, force=force)
    return target


def closing_line(target: Path) -> str:
    """What the command prints."""
    size = amount(target.stat().st_size)
    return f"{target} is complete ({size}). Use it: rgexport validate ARTIFACT --reference {target}"


def _header(
    checkpoint: Checkpoint,
    model: ReferenceModel,
    prompts: tuple[PromptRecord, ...],
    structures: tuple[Fingerprint, ...],
) -> Header:
    names = {path: name for name, path in checkpoint.weight_files.items()}
    hashes = hash_new_files(names)
    return Header(
        model=checkpoint.name,
        config=model.config,
        files={names[p]: FileRecord(sha, p.stat().st_size) for p, sha in hashes.items()},
        computed=model.describe(),
        environment=environment(),
        prompts=prompts,
        structures=structures,
        identity=text_identity(checkpoint),
    )


def _record(
    model: ReferenceModel, texts: Sequence[Text], tokenizer: Tokenizer | None
) -> tuple[tuple[PromptRecord, ...], dict[str, np.ndarray]]:
    """Runs the model over the prompts; it continues them where there is a tokenizer.

    Returns:
        A record of each prompt, and the file's arrays of all prompts.
    """
    lengths = [len(text.tokens) for text in texts]
    longest = int(np.argmax(lengths))
    stops = [checkpoints(n) if i == longest else [] for i, n in enumerate(lengths)]
    positions = choose_positions(lengths, model.config.vocab_size)
    hidden, states = zip(*_run(model, texts, stops), strict=True)
    arrays = {"tokens": np.concatenate([text.tokens for text in texts])}
    for index, (codes, scales) in enumerate(record_logits(model, hidden, positions)):
        arrays |= {f"logits.{index}": codes, f"scales.{index}": scales}
    greedy: list[list[int]] = [[] for _ in texts]
    if tokenizer is not None:
        ends = [after[-1] for after in states]
        greedy = continue_greedily(model, hidden, ends, GREEDY_TOKENS, tokenizer.stop_ids)
    for index, (ids, after) in enumerate(zip(greedy, states, strict=True)):
        arrays |= {f"greedy.{index}": np.array(ids, np.int64)} if ids else {}
        arrays |= _state_arrays(model.config, index, lengths[index], after)
    records = (
        PromptRecord(text.name, len(text.tokens), text.bytes, tuple(at), len(ids), tuple(inside))
        for text, at, ids, inside in zip(texts, positions, greedy, stops, strict=True)
    )
    return tuple(records), arrays


def _run(
    model: ReferenceModel, texts: Sequence[Text], stops: Sequence[Sequence[int]]
) -> list[tuple[Any, list[State]]]:
    """Runs all prompts from their beginnings; see `ReferenceModel.run_each`."""
    starts = [(text.tokens[None], zero_state(model.config, 1)) for text in texts]
    total = sum(len(text.tokens) for text in texts) * model.config.num_layers
    with task("Running the reference", total, "tokens through layers") as advance:
        return model.run_each(
            starts, stops=stops, watch=lambda layer, index, stream: advance(stream.shape[1])
        )


def _state_arrays(
    config: GriffinConfig, index: int, tokens: int, states: Sequence[State]
) -> dict[str, np.ndarray]:
    """The arrays of a prompt's states: after its checkpoints, and after its end."""
    *inside, end = states
    arrays = {}
    for spec in state_specs(config):
        rows = stored_shape(spec, tokens)[0]
        arrays[state_name(index, spec)] = end[spec.name][0, spec.shape[0] - rows :]
    for spec in checkpoint_specs(config) if inside else ():
        stacked = np.concatenate([state[spec.name] for state in inside])
        arrays[checkpoint_name(index, spec)] = stacked
    return arrays


def sketch_arrays(
    config: GriffinConfig, weights: WeightSource, tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """Sketches of all tensors that an artifact may hold, and the sums of their squares.

    Linears are sketched by mixtures of their inputs over the first of tokens [T], too.
    """
    names = list(model_tensors(config))
    sites, mixtures = linear_inputs(config), _record_mixtures(config, weights, tokens)
    arrays = {inputs_name(site): mixture for site, mixture in mixtures.items()}
    squares = []
    with task("Sketching the weights", sum(weights[name].nbytes for name in names)) as advance:
        for name in names:
            arrays[sketch_name(name)], square = sketch(weights[name])
            squares.append(square)
            if name in sites:
                arrays[outputs_name(name)] = _outputs(weights[name], mixtures[sites[name]])
            advance(weights[name].nbytes)
    return arrays | {"squares": np.array(squares)}


def _record_mixtures(config: GriffinConfig, weights: WeightSource, tokens: np.ndarray) -> Mixtures:
    """Runs a model over the first of tokens [T] and returns mixtures of its linears' inputs."""
    tokens = tokens[:MIXED_TOKENS]
    recorder = MixtureRecorder(config, len(tokens))
    with watched_layers("Recording inputs", weights) as watched:
        model = NumpyReference(config, watched)
        model.look = recorder.look
        model.run(tokens[None])
    return recorder.mixtures


def _outputs(weight: RowTensor, mixtures: np.ndarray) -> np.ndarray:
    """Products of a linear's rows with mixtures [m, K]: [rows, m] float32."""
    slabs = weight.slabs(SLAB_BYTES)
    products = [mixed(rows.astype(np.float32, copy=False), mixtures) for _, rows in slabs]
    return np.concatenate(products).astype(np.float32)
