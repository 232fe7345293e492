"""`rgexport reference`: captures what the full-precision model computes for some prompts.

All prompts go through one layer before the next one is read, and logits exist for one block at a
time. Where the whole model fits into memory, its layers stay there, which speeds up continuations.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.origin import folder_of
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.files.hashing import FileRecord, hash_new_files
from rgexport.files.targets import check_file_target
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import float32_bytes, linear_inputs, model_tensors
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import State, state_specs, zero_state
from rgexport.griffin.tensor import WeightSource, slab_bounds
from rgexport.progress import detail, expect_stages, note, task
from rgexport.runtimes.machine import available_bytes, environment, torch_device
from rgexport.units import amount
from rgexport.validate.continuations import continue_greedily
from rgexport.validate.metrics import checkpoints
from rgexport.validate.reference import reference_file
from rgexport.validate.reference_pass import ReferenceModel, watched_layers
from rgexport.validate.structure.compare import can_record, record_structures
from rgexport.validate.text import Text, choose_prompts
from rgexport.validate.text_items import text_identity
from rgexport.validate.weights.sketch import SLAB_BYTES, MixtureRecorder, products, sketch

OWN = "rgexport"
ROOM = 1.25
"""Free memory that a whole model takes, as a multiple of its float32 weights, …"""
WORKING_BYTES = 2 << 30
"""… and for activations."""

MakeReference = Callable[[GriffinConfig, WeightSource], ReferenceModel]


def choose_implementation(name: str, device: str, low_memory: bool) -> MakeReference:
    """Returns the constructor of `OWN` or `deepmind`; raises RequestError if it cannot run.

    rgexport's own computes in NumPy on the CPU, and in torch on a GPU, which `auto` prefers. It
    keeps its weights in memory where they fit, unless `low_memory` forbids it.
    """
    if name == OWN:
        numpy_only = device == "cpu" or (device == "auto" and find_spec("torch") is None)
        return partial(_open_own, "cpu" if numpy_only else torch_device(device), low_memory)
    if low_memory:
        raise RequestError(
            f"--impl {name} holds the whole model in memory; leave out --low-memory, or --impl"
        )
    device = torch_device(device)
    try:
        import rgexport.validate.reference.deepmind_model  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f"--impl deepmind needs a package that is missing ({error.name}): "
            "pip install 'recurrentgemma[torch]' flax jax"
        ) from None
    return partial(_open_deepmind, device)


def _open_own(
    device: str, low_memory: bool, config: GriffinConfig, weights: WeightSource
) -> ReferenceModel:
    needed = float32_bytes(config)
    free = None if low_memory else _free_bytes(device)
    keep = free is not None and ROOM * needed + WORKING_BYTES <= free
    if not low_memory and not keep:
        note(f"{amount(needed)} of weights do not fit into memory: one layer at a time")
    if device == "cpu":
        return NumpyReference(config, weights, keep=keep)
    from rgexport.griffin.reference import Reference

    return Reference(config, weights, device=device, keep=keep)


def _open_deepmind(device: str, config: GriffinConfig, weights: WeightSource) -> ReferenceModel:
    from rgexport.validate.reference.deepmind_model import DeepMindModel

    needed, free = float32_bytes(config), _free_bytes(device)
    if free is not None and needed > free:
        raise RequestError(
            f"--impl deepmind takes {amount(needed)} of memory for the weights alone, and "
            f"{amount(free)} are free; leave it out: rgexport's own reads layer by layer"
        )
    return DeepMindModel(config, weights, device=device)


def _free_bytes(device: str) -> int | None:
    if not device.startswith("cuda"):
        return available_bytes()
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])


LOGITS_BYTES = 17_280_000
"""The file's budget for logits: all positions of the demo."""
LEAST_POSITIONS = 128
"""Positions that have logits, whatever they take: 64 MB of a 2B."""
BLOCK_BYTES = 128 << 20
"""Logits that exist at a time."""


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

    Raises RequestError: no torch, device or package, an unsound checkpoint, or one that the package
    cannot run, prompts that cannot be read, or a target that exists or cannot be written.
    """
    check_file_target(target, force=force, replaceable=reference_file.is_reference)
    make_model = choose_implementation(impl, device, low_memory)
    tokenizer = load_tokenizer(folder_of(checkpoint)) if checkpoint.tokenizer_files else None
    config = checkpoint.config
    texts = choose_prompts(tokenizer, config.vocab_size, config.window, prompts)
    expect_stages(5 + bool(tokenizer) + can_record())
    require_sound(checkpoint)
    structures = record_structures(checkpoint)
    count = sum(len(text.tokens) for text in texts)
    detail(f"Capturing {checkpoint.name} on {len(texts)} prompts, {count} tokens")
    model = make_model(config, checkpoint.weights)
    records, arrays = _record(model, texts, tokenizer)
    longest = max(texts, key=lambda text: len(text.tokens))
    arrays |= _sketch_arrays(config, checkpoint.weights, longest.tokens)
    hashes = hash_new_files(checkpoint.weight_files.values())
    files = {n: FileRecord(hashes[p], p.stat().st_size) for n, p in checkpoint.weight_files.items()}
    header = reference_file.Header(
        model=checkpoint.name,
        config=model.config,
        files=files,
        computed=model.describe(),
        environment=environment(),
        prompts=records,
        structures=structures,
        identity=text_identity(checkpoint),
    )
    reference_file.write_reference(target, header, arrays, force=force)
    return target


def closing_line(target: Path) -> str:
    size = amount(target.stat().st_size)
    return f"{target} is complete ({size}). Use it: rgexport validate ARTIFACT --reference {target}"


def _record(
    model: ReferenceModel, texts: Sequence[Text], tokenizer: Tokenizer | None
) -> tuple[tuple[reference_file.PromptRecord, ...], dict[str, np.ndarray]]:
    lengths = [len(text.tokens) for text in texts]
    longest = int(np.argmax(lengths))
    stops = [checkpoints(n) if i == longest else [] for i, n in enumerate(lengths)]
    positions = choose_positions(lengths, model.config.vocab_size)
    starts = [(text.tokens[None], zero_state(model.config, 1)) for text in texts]
    total = sum(lengths) * model.config.num_layers
    with task("Running the reference", total, "steps") as advance:
        passes = model.run_each(
            starts, stops=stops, watch=lambda layer, index, stream: advance(stream.shape[1])
        )
    hidden, states = zip(*passes, strict=True)
    arrays = {"tokens": np.concatenate([text.tokens for text in texts])}
    for index, (codes, scales) in enumerate(_record_logits(model, hidden, positions)):
        arrays |= {f"logits.{index}": codes, f"scales.{index}": scales}
    greedy: list[list[int]] = [[] for _ in texts]
    if tokenizer is not None:
        ends = [after[-1] for after in states]
        greedy = continue_greedily(model, hidden, ends, 32, tokenizer.stop_ids)
    for index, (ids, after) in enumerate(zip(greedy, states, strict=True)):
        arrays |= {f"greedy.{index}": np.array(ids, np.int64)} if ids else {}
        arrays |= _state_arrays(model.config, index, lengths[index], after)
    records = (
        reference_file.PromptRecord(
            text.name, len(text.tokens), text.bytes, tuple(at), len(ids), tuple(inside)
        )
        for text, at, ids, inside in zip(texts, positions, greedy, stops, strict=True)
    )
    return tuple(records), arrays


def choose_positions(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Chooses positions to record: each prompt's last one, and others at even distances."""
    ends = np.cumsum(lengths)
    others = np.setdiff1d(np.arange(ends[-1]), ends - 1)
    most = max(LEAST_POSITIONS, LOGITS_BYTES // (2 * vocab_size))
    count = min(max(0, most - len(ends)), len(others))
    spread = others[np.linspace(0, len(others) - 1, count).round().astype(np.int64)]
    chosen = np.union1d(ends - 1, spread)
    return [
        (chosen[(chosen >= end - length) & (chosen < end)] - (end - length)).tolist()
        for end, length in zip(ends, lengths, strict=True)
    ]


def _record_logits(
    model: ReferenceModel, hidden: Sequence[Any], positions: Sequence[Sequence[int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    row_bytes = 4 * model.config.vocab_size
    with task("Recording logits", sum(map(len, positions)), "positions") as advance:
        for states, chosen in zip(hidden, positions, strict=True):
            blocks = []
            for start, stop in slab_bounds(len(chosen), row_bytes, BLOCK_BYTES):
                blocks.append(
                    reference_file.encode_logits(model.logits(states[:, chosen[start:stop]])[0])
                )
                advance(stop - start)
            codes, scales = zip(*blocks, strict=True)
            yield np.concatenate(codes), np.concatenate(scales)


def _state_arrays(
    config: GriffinConfig, index: int, tokens: int, states: Sequence[State]
) -> dict[str, np.ndarray]:
    *inside, end = states
    arrays = {}
    for spec in state_specs(config):
        rows = reference_file.stored_shape(spec, tokens)[0]
        arrays[f"states.{index}.{spec.name}"] = end[spec.name][0, spec.shape[0] - rows :]
    for name in [spec.name for spec in reference_file.checkpoint_specs(config)] if inside else ():
        arrays[f"checkpoints.{index}.{name}"] = np.concatenate([state[name] for state in inside])
    return arrays


def _sketch_arrays(
    config: GriffinConfig, weights: WeightSource, tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """Sketches all tensors, and linears also by mixtures of their inputs over the first tokens."""
    tokens, sites = tokens[:256], linear_inputs(config)
    recorder = MixtureRecorder(config, len(tokens))
    with watched_layers("Recording inputs", weights) as watched:
        model = NumpyReference(config, watched)
        model.look = recorder.look
        model.run(tokens[None])
    arrays = {f"inputs.{site}": mixture for site, mixture in recorder.mixtures.items()}
    tensors = {name: weights[name] for name in model_tensors(config)}
    squares = []
    with task("Sketching the weights", sum(t.nbytes for t in tensors.values())) as advance:
        for name, tensor in tensors.items():
            arrays[f"weights.{name}"], square = sketch(tensor)
            squares.append(square)
            if name in sites:
                mixtures, slabs = recorder.mixtures[sites[name]], tensor.slabs(SLAB_BYTES)
                blocks = [
                    products(rows.astype(np.float32, copy=False), mixtures) for _, rows in slabs
                ]
                arrays[f"outputs.{name}"] = np.concatenate(blocks).astype(np.float32)
            advance(tensor.nbytes)
    return arrays | {"squares": np.array(squares)}
