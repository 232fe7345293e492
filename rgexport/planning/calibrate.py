"""`rgexport calibrate`: collects statistics of a model on a text, for its quantization."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from rgexport._version import __version__
from rgexport.artifacts.opening import as_argument, model_argument
from rgexport.artifacts.origin import folder_of
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.errors import RequestError
from rgexport.files.hashing import hash_file, hash_new_files, remember_hashes
from rgexport.files.targets import check_file_target, continue_file, require_free_disk
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import FileHashes, require_sound
from rgexport.griffin.config import GriffinConfig
from rgexport.planning.calibration_folder import CalibrationFolder, StatisticsFile
from rgexport.planning.cluster import encoder_statistics, spread_layer
from rgexport.planning.passages import LENGTH, Passages, join, read_text, sample
from rgexport.progress import expect_stages, group, note
from rgexport.quantize.algorithms import calibration_file as stored
from rgexport.quantize.algorithms.statistics import StatisticsOf
from rgexport.quantize.built_in_text import BUILT_IN
from rgexport.runtimes.cluster import Cluster, connected
from rgexport.runtimes.machine import torch_device
from rgexport.units import amount

SUFFIX = ".calibration"
_BUILT_IN_PART = 6  # one token in so many is from the built-in text
_SMALL_WIDTH = 1024
"""Width up to which a model is small: its statistics come from more tokens."""
_MOST_TOKENS = 1 << 28  # their ids alone take 2 GB


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The options of `rgexport calibrate`; None leaves a number to the model's width.

    Attributes:
        text: a file with text, or None for the built-in one.
        held_out: further tokens in whole sequences, on which plans are measured. A short text has
            fewer; the built-in text beside sampled text none.
        sampled: how many of `tokens` are sampled from the model, and the same share of the
            held-out tokens. None: none with a user's text, else five sixths, or all without a
            tokenizer.
        gradient_tokens: tokens with gradients, in whole sequences, at least one.
        device: where torch computes; `auto` is CUDA where there is one.
    """

    text: Path | None = None
    tokens: int | None = None
    held_out: int | None = None
    sampled: int | None = None
    gradient_tokens: int = 1024
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("--tokens", self.tokens, 1, _MOST_TOKENS),
            ("--gradient-tokens", self.gradient_tokens, 1, _MOST_TOKENS),
            ("--seed", self.seed, 0, 2**63 - 1),
            ("--sampled", self.sampled, 0, _MOST_TOKENS),
            ("--held-out", self.held_out, 0, _MOST_TOKENS),
        ):
            if value is not None and not least <= value <= most:
                limit = f"at least {least}" if value < least else f"at most {most}"
                raise RequestError(f"{name} is {value}; expected {limit}")
        if self.tokens is None or self.sampled is None:
            return
        if self.sampled > self.tokens - (self.text is not None):
            rest = "leaves nothing of" if self.sampled == self.tokens else "is more than"
            raise RequestError(f"--sampled {self.sampled} {rest} --tokens {self.tokens}")

    def for_model(self, config: GriffinConfig, *, readable: bool) -> "CalibrationOptions":
        """Returns a copy with all defaults; `readable`: the model's tokenizer can read text."""
        is_small = config.width <= _SMALL_WIDTH
        tokens = self.tokens
        if tokens is None:
            tokens = 16384 if is_small else 8192
        sampled = self.sampled
        if sampled is None:
            sampled = self._sampled_by_default(tokens, readable)
        held_out = self.held_out
        if held_out is None:
            tokens_per_held_out = 1 if is_small else 4
            held_out = tokens // tokens_per_held_out // LENGTH * LENGTH
        text = self.text
        if not sampled and text is None:
            text = BUILT_IN
        return replace(self, text=text, tokens=tokens, held_out=held_out, sampled=sampled)

    def _sampled_by_default(self, tokens: int, readable: bool) -> int:
        """Returns how many of `tokens` the model writes, where the user gives no number."""
        if self.text is not None:
            return 0
        if not readable:
            return tokens
        return tokens - tokens // _BUILT_IN_PART

    @property
    def from_model(self) -> int:
        assert self.sampled is not None
        return self.sampled

    @property
    def from_text(self) -> int:
        assert self.tokens is not None
        return self.tokens - self.from_model

    def with_held_out(self, tokens: int) -> int:
        """Returns `tokens` of the statistics plus the held-out tokens beside them."""
        assert self.tokens is not None and self.held_out is not None
        return tokens + tokens * self.held_out // self.tokens

    def split(self, text: Passages) -> tuple[Passages, Passages]:
        """Splits a text, without the built-in one; of a short one, at most a third is held out."""
        used = self.from_model + (self.from_text if self.text is not None else 0)
        sequences, total = len(text.lengths), self.with_held_out(used)
        count = min(sequences * (total - used) // total, sequences - 1)
        if len(text.tokens) < total:
            count = min(count, sequences // 3)
        return text.without_last(count)

    @property
    def source(self) -> str:
        sampled = [f"{self.from_model} tokens sampled from the model"] if self.from_model else []
        return " and ".join([*sampled, *([self.text_name] if self.from_text else [])])

    @property
    def text_name(self) -> str:
        if self.text is None or self.text == BUILT_IN:
            return "the built-in text"
        return f"the text of {self.text.name}"


def calibrate(
    checkpoint: Checkpoint,
    options: CalibrationOptions,
    target: Path,
    *,
    force: bool = False,
    workers: Cluster | None = None,
) -> Path:
    """Writes the statistics of a model into the file `target`, which appears when it is complete.

    An interrupted run leaves `TARGET.partial`, and the same request continues it. `workers` run the
    layers.

    Raises RequestError: an unsound checkpoint, an unreadable text, a target that exists, or
    unfinished work of another request there.
    """
    check_file_target(target, force=force, replaceable=stored.is_calibration)
    tokenizer = load_tokenizer(folder_of(checkpoint)) if checkpoint.tokenizer_files else None
    readable = tokenizer is not None and tokenizer.vocab_size <= checkpoint.config.vocab_size
    options = options.for_model(checkpoint.config, readable=readable)
    options = replace(options, device=torch_device(options.device))
    read = _read_text(options, tokenizer, checkpoint.config.vocab_size)
    expect_stages(5 if options.from_model else 4)
    hashes = require_sound(checkpoint)
    remember_hashes({path: hashes[name].sha256 for name, path in checkpoint.weight_files.items()})
    request = {  # equal for a run that continues an earlier one
        "rgexport": __version__,
        "weights": {name: record.sha256 for name, record in hashes.items()},
        "--text": None if options.text is None else hash_file(options.text).sha256,
        "--tokens": options.tokens,
        "--held-out": options.held_out,
        "--sampled": options.from_model,
        "--gradient-tokens": options.gradient_tokens,
        "--seed": options.seed,
    }
    with continue_file(target, force=force, replaceable=stored.is_calibration) as folder:
        unfinished = CalibrationFolder.open(folder, request, force=force)
        built_in = [] if options.text else read
        text = _text(unfinished, checkpoint, tokenizer, options, read if options.text else [])
        text, held_out = options.split(text)
        text = join([*text.sequences(), *built_in], options.seed) if built_in else text
        collect(unfinished, checkpoint, text, held_out, options, hashes, workers)
    return target


def closing_line(checkpoint: Checkpoint, target: Path) -> str:
    return (
        f"{target} is complete ({amount(target.stat().st_size)}). Use it: "
        f"rgexport onnx {model_argument(checkpoint)} --int4 --calibration {as_argument(target)}"
    )


def _read_text(
    options: CalibrationOptions, tokenizer: Tokenizer | None, vocab_size: int
) -> list[np.ndarray]:
    if not options.from_text:
        return []
    if tokenizer is None:
        raise RequestError(
            f"the model has no tokenizer to read {options.text_name}; put its tokenizer.model into "
            "its folder, or leave out --text and --sampled: then it writes all of the text"
        )
    if options.text is None:
        return read_text(BUILT_IN, tokenizer, options.from_text)
    sequences = read_text(options.text, tokenizer, options.with_held_out(options.from_text))
    largest = max(int(sequence.max()) for sequence in sequences)
    if largest >= vocab_size:
        raise RequestError(
            f"the tokenizer gives the id {largest}, but the model has {vocab_size} tokens; put "
            "the model's own tokenizer into its folder"
        )
    return sequences


def _text(
    folder: CalibrationFolder,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    options: CalibrationOptions,
    read: list[np.ndarray],
) -> Passages:
    tokens, lengths = folder.load(stored.TOKENS), folder.load(stored.LENGTHS)
    if tokens is not None and lengths is not None:
        total = 5 if options.from_model else 4
        expect_stages(total, done=total - 3)  # nothing is sampled now
        return Passages(tokens, lengths)
    sampled = []
    if options.from_model:
        count, target = options.with_held_out(options.from_model), folder.path / "sampled"
        sampled = sample(checkpoint, tokenizer, count, seed=options.seed, folder=target)
    text = join([*sampled, *read], options.seed)
    folder.save(stored.LENGTHS, text.lengths)
    folder.save(stored.TOKENS, text.tokens)
    return text


def collect(
    folder: CalibrationFolder,
    checkpoint: Checkpoint,
    text: Passages,
    held_out: Passages,
    options: CalibrationOptions,
    hashes: FileHashes,
    workers: Cluster | None = None,
) -> None:
    from rgexport.griffin.reference import Reference
    from rgexport.planning.layer_pass import Collector, run_layer

    config = checkpoint.config
    gradients = text.first(options.gradient_tokens)
    provenance = stored.Provenance(
        model=checkpoint.name,
        files={name: record.sha256 for name, record in hashes.items()},
        tokens=len(text.tokens),
        gradient_tokens=len(gradients.tokens),
        text=options.source,
        tokens_sha256=hashlib.sha256(text.tokens.tobytes()).hexdigest(),
        seed=options.seed,
        tool=f"rgexport {__version__}",
    )
    texts = {stored.TOKENS: text.tokens, stored.LENGTHS: text.lengths}
    if len(held_out.tokens):
        texts |= {stored.HELD_OUT: held_out.tokens, stored.HELD_OUT_LENGTHS: held_out.lengths}
    arrays = stored.arrays_of(config, texts)
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in arrays.values())
    require_free_disk(folder.path, size + 2 * 4 * len(text.tokens) * config.width)
    file = StatisticsFile(folder, provenance, arrays)
    counts = np.bincount(text.tokens, minlength=config.vocab_size)
    frequency = (counts / len(text.tokens)).astype(np.float32)
    file.write(texts | {stored.FREQUENCY: frequency})
    device = options.device
    model = Reference(config, checkpoint.weights, device=device)
    run = spread_layer(workers, checkpoint, device) if workers else partial(run_layer, model)
    Collector(model, text, gradients, folder, file, options.seed, run).collect()


@contextmanager
def known_statistics(
    checkpoint: Checkpoint, file: Path | None, cluster: str | None = None
) -> Iterator[StatisticsOf]:
    """Yields the statistics of `known_calibration`; a cluster's workers quantize."""
    with connected(cluster) as workers:
        calibration = known_calibration(checkpoint, file, workers)
        calibration.require_for(hash_new_files(checkpoint.weight_files.values()).values())
        yield encoder_statistics(calibration, checkpoint.config, workers)


def known_calibration(
    checkpoint: Checkpoint, file: Path | None, workers: Cluster | None = None
) -> stored.Calibration:
    """Opens a calibration, by default `./MODEL.calibration`, which is computed if it is missing."""
    if file is None:
        file = Path(f"{checkpoint.name}{SUFFIX}")
        if file.exists():
            note(f"Taking the calibration {file}")
        else:
            with group("Calibration"):
                calibrate(checkpoint, CalibrationOptions(), file, workers=workers)
    return stored.open_calibration(file)
