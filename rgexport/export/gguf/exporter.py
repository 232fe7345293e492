"""From a checkpoint to a GGUF file, in one pass."""

from collections.abc import Iterator
from pathlib import Path

from gguf import GGUFValueType as Kind

from rgexport.export.checked import NOT_ASKED_FOR, SelfCheck
from rgexport.export.gguf import integrity
from rgexport.export.gguf.mark import mark_text, write_mark
from rgexport.export.gguf.metadata import Value, metadata
from rgexport.export.gguf.options import Choice, GgufOptions
from rgexport.export.gguf.vocabulary import read_vocabulary
from rgexport.export.gguf.writer import data_bytes, write_file
from rgexport.export.verified import remember, trusted_within
from rgexport.files.atomic import check_file_target, replace_file, require_free_disk
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.progress import expect_stages, group, note, task, warn
from rgexport.quantize.ggml_library import load_library
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.gguf_header import is_gguf, read_header

QUANTIZATION_VERSION = 2
"""ggml.h's `GGML_QNT_VERSION`."""
_HEADER_BYTES = 32 << 20
"""Upper bound of what stands before the data: a vocabulary of 256k takes 7 MB."""


def default_target(model: str, file_type: str) -> Path:
    """Where a file goes without `-o`, such as `./recurrentgemma-2b-Q4_K_M.gguf`."""
    return Path(f"{model}-{file_type.upper()}.gguf")


def replaceable(file: Path) -> bool:
    """Whether `--force` may replace `file`: another GGUF file, nothing else."""
    return is_gguf(file)


def export_gguf(
    checkpoint: Checkpoint,
    options: GgufOptions,
    target: Path,
    *,
    force: bool = False,
    check: SelfCheck | None = None,
) -> Path:
    """Exports `checkpoint` to the file `target`, which appears when it is complete.

    Peak memory does not depend on the model's size: weights are read, quantized and written in
    slabs of a few MB. `check` runs the complete file, and takes memory of its own.

    Raises:
        RequestError: an unsound checkpoint (all problems at once), a target that exists or
            cannot be written, too little disk, an option that does not fit, or no ggml to
            quantize with.
    """
    check_file_target(target, force=force, replaceable=replaceable)
    choice = options.choose(checkpoint.config)
    _announce(choice)
    if any(TYPES[kind].is_quantized for kind in choice.types.values()):
        load_library()  # or nothing is begun
    vocabulary = read_vocabulary(checkpoint.tokenizer_files, checkpoint.config.vocab_size)
    if vocabulary is None:
        warn(f"{checkpoint.name} has no tokenizer: the file will take token ids, not text")
    require_free_disk(target.resolve().parent, data_bytes(choice) + _HEADER_BYTES)
    expect_stages(2 if check is None else 3)
    hashes = require_sound(checkpoint)

    values = [*metadata(checkpoint, hashes, vocabulary), *_values_of_types(choice)]
    total = sum(tensor.nbytes for tensor in checkpoint.weights.values())
    with replace_file(target, force=force, replaceable=replaceable) as partial:
        with task("Writing the weights", total) as advance:
            digest = write_file(partial, values, choice, checkpoint.weights, advance)
        start = integrity.data_start(read_header(partial))
        if check is not None:
            with trusted_within({partial: digest}, start=start), group("Self-check"):
                found = check(partial)
            write_mark(partial, found)
    remember({target: digest}, start=start)
    return target


def _announce(choice: Choice) -> None:
    """Tells of tensors whose rows are no whole number of blocks."""
    wanted = choice.file_type.default
    fallen = [
        tensor.name
        for tensor in choice.tensors
        if tensor.quantizable and not TYPES[wanted].fits(tensor.shape[-1])
    ]
    if fallen:
        note(
            f"{len(fallen)} tensors have rows that {wanted} does not fit, such as {fallen[0]}; "
            f"they are stored in another type, as llama-quantize does ({choice.types[fallen[0]]})"
        )


def _values_of_types(choice: Choice) -> Iterator[Value]:
    """What differs from type to type, as llama-quantize appends it: last."""
    types = ((tensor.name, choice.types[tensor.name]) for tensor in choice.tensors)
    for key, digest in integrity.placeholders(types).items():
        yield Value(key, digest, Kind.STRING)
    yield Value(integrity.CHECK, mark_text(NOT_ASKED_FOR), Kind.STRING)
    yield Value("general.quantization_version", QUANTIZATION_VERSION, Kind.UINT32)
    yield Value(integrity.FILE_TYPE, choice.file_type.value, Kind.UINT32)
    for key, told in (choice.imatrix.metadata() if choice.imatrix else {}).items():
        yield Value(key, told, Kind.STRING if isinstance(told, str) else Kind.UINT32)
