"""`rgexport calibrate`: collects statistics of a model on a text, for its quantization."""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rgexport._version import __version__
from rgexport.chat.tokenizer import Tokenizer, load_tokenizer
from rgexport.compress.cluster import spread_layer
from rgexport.compress.passages import LENGTH, Passages, join, read_text
from rgexport.compress.sampling import sample
from rgexport.compress.work import StatisticsFile, Work, open_work
from rgexport.errors import RequestError
from rgexport.export.origin import folder_of
from rgexport.export.request import as_argument
from rgexport.files.hashing import hash_file, remember_hashes
from rgexport.files.targets import check_file_target, continue_file, require_free_disk
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import FileHashes, require_sound
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.device import torch_device
from rgexport.progress import expect_stages
from rgexport.quantize.calibration import is_calibration
from rgexport.quantize.calibration_format import (
    FREQUENCY,
    HELD_OUT,
    HELD_OUT_LENGTHS,
    LENGTHS,
    TOKENS,
    Arrays,
    Provenance,
    arrays_of,
)
from rgexport.runtimes.cluster import Cluster
from rgexport.units import amount

SUFFIX = ".calibration"
BUILT_IN = Path(__file__).with_name("text.txt")
"""A text of many kinds: sampled text has little of what this model rarely writes."""
_BUILT_IN_PART = 6
"""One token in so many is the built-in text's."""
_SMALL, _TOKENS, _HELD_OUT = 1024, {True: 16384, False: 8192}, {True: 1, False: 4}
"""Width up to which more tokens take seconds; whether it is small → how many there are, and the
part of them that is added as held-out text."""

_MOST_TOKENS = 1 << 28
"""Years of work; their ids alone take 2 GB."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What a user can ask of a calibration.

    Attributes:
        text: a file with text, or None for the built-in one.
        tokens: how many tokens the statistics are of; None leaves it to the model's width.
        held_out: how many there are beside them, which no statistic sees: plans are measured on
            these. None leaves it to the model's width. In whole sequences; fewer of a short text;
            none of the built-in text beside sampled text.
        sampled: how many of `tokens` are sampled from the model; None: none beside a user's text,
            else five sixths, or all without a tokenizer. The same part of the held-out tokens is.
        gradient_tokens: how many have gradients; in whole sequences, at least one.
        seed: of what is drawn.
        device: where torch computes; `auto` is CUDA where there is one.

    Raises:
        RequestError: a number is outside its range, or no text is left.
    """

    text: Path | None = None
    tokens: int | None = None
    held_out: int | None = None
    sampled: int | None = None
    gradient_tokens: int = 1024
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuses contradictions."""
        for name, value, least, most in (
            ("--tokens", self.tokens, 1, _MOST_TOKENS),
            ("--gradient-tokens", self.gradient_tokens, 1, _MOST_TOKENS),
            ("--seed", self.seed, 0, 2**63 - 1),
            ("--sampled", self.sampled, 0, _MOST_TOKENS),
            ("--held-out", self.held_out, 0, _MOST_TOKENS),
        ):
            if value is not None and value < least:
                raise RequestError(f"{name} is {value}; expected at least {least}")
            if value is not None and value > most:
                raise RequestError(f"{name} is {value}; expected at most {most}")
        if self.tokens is None or self.sampled is None:
            return
        if self.sampled > self.tokens:
            raise RequestError(f"--sampled {self.sampled} is more than --tokens {self.tokens}")
        if self.sampled == self.tokens and self.text is not None:
            raise RequestError(
                f"--sampled {self.sampled} leaves nothing of --tokens {self.tokens} for --text"
            )

    def for_model(self, config: GriffinConfig, *, readable: bool) -> "CalibrationOptions":
        """With numbers of tokens; `readable` says whether the model's tokenizer can read text.

        Raises:
            RequestError: nothing of them is left for the text.
        """
        small = config.width <= _SMALL
        tokens = _TOKENS[small] if self.tokens is None else self.tokens
        part = tokens // _HELD_OUT[small] // LENGTH * LENGTH
        built_in = tokens // _BUILT_IN_PART if readable else 0
        sampled = 0 if self.text is not None else tokens - built_in
        sampled = sampled if self.sampled is None else self.sampled
        return replace(
            self,
            text=BUILT_IN if not sampled and self.text is None else self.text,
            tokens=tokens,
            held_out=part if self.held_out is None else self.held_out,
            sampled=sampled,
        )

    @property
    def from_model(self) -> int:
        """How many tokens are sampled."""
        assert self.sampled is not None, "see `for_model`"
        return self.sampled

    @property
    def from_text(self) -> int:
        """How many tokens are those of the text, at most."""
        assert self.tokens is not None, "see `for_model`"
        return self.tokens - self.from_model

    def with_held_out(self, tokens: int) -> int:
        """So many tokens of the statistics, and those that are held out beside them."""
        assert self.tokens is not None and self.held_out is not None, "see `for_model`"
        return tokens + tokens * self.held_out // self.tokens

    def split(self, text: Passages) -> tuple[Passages, Passages]:
        """The sequences of the statistics but the built-in ones, and those that are held out.

        Of a text that is too short for both, no more than a third is held out.
        """
        used = self.from_model + (self.from_text if self.text is not None else 0)
        sequences, wanted = len(text.lengths), self.with_held_out(used)
        count = min(sequences * (wanted - used) // wanted, sequences - 1)
        if len(text.tokens) < wanted:
            count = min(count, sequences // 3)
        return text.without_last(count)

    @property
    def source(self) -> str:
        """Where the text is from, in words."""
        sampled = f"{self.from_model} tokens sampled from the model" if self.from_model else ""
        given = self.text_name if self.from_text else ""
        return " and ".join(filter(None, (sampled, given)))

    @property
    def text_name(self) -> str:
        """The text that is read, in words."""
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

    A run that ends early leaves `TARGET.partial`, and the same request goes on from there. With
    `workers` these run the layers.

    Raises:
        RequestError: an unsound checkpoint, a text that cannot be read, a target that exists, or
            unfinished work of another request there.
    """
    check_file_target(target, force=force, replaceable=is_calibration)
    tokenizer = load_tokenizer(folder_of(checkpoint)) if checkpoint.tokenizer_files else None
    readable = tokenizer is not None and tokenizer.vocab_size <= checkpoint.config.vocab_size
    options = options.for_model(checkpoint.config, readable=readable)
    device = torch_device(options.device)
    given = _given_text(options, tokenizer, checkpoint.config.vocab_size)
    expect_stages(5 if options.from_model else 4)
    hashes = require_sound(checkpoint)
    remember_hashes({path: hashes[name].sha256 for name, path in checkpoint.weight_files.items()})
    request = _request(options, hashes)
    with continue_file(target, force=force, replaceable=is_calibration) as folder:
        work = open_work(folder, request, force=force)
        built_in = [] if options.text else given
        text = _text(work, checkpoint, tokenizer, options, given if options.text else [])
        text, held_out = options.split(text)
        text = join([*text.sequences(), *built_in], options.seed) if built_in else text
        collect(work, checkpoint, text, held_out, options, hashes, device, workers)
    return target


def closing_line(checkpoint: Checkpoint, target: Path) -> str:
    """What the command prints."""
    model = as_argument(checkpoint.path)
    return (
        f"{target} is complete ({amount(target.stat().st_size)}). Use it: "
        f"rgexport onnx -m {model} --int4 --calibration {as_argument(target)}"
    )


def _request(options: CalibrationOptions, hashes: FileHashes) -> dict[str, Any]:
    """What must be equal for a run to go on with another's work."""
    return {
        "rgexport": __version__,
        "weights": {name: record.sha256 for name, record in hashes.items()},
        "--text": None if options.text is None else hash_file(options.text).sha256,
        "--tokens": options.tokens,
        "--held-out": options.held_out,
        "--sampled": options.from_model,
        "--gradient-tokens": options.gradient_tokens,
        "--seed": options.seed,
    }


def _given_text(
    options: CalibrationOptions, tokenizer: Tokenizer | None, vocab_size: int
) -> list[np.ndarray]:
    """The sequences of the user's text, or of the built-in one."""
    if not options.from_text:
        return []
    if tokenizer is None:
        raise RequestError(
            f"the model has no tokenizer to read {options.text_name} with; put its "
            "tokenizer.model into its folder, or leave --text and --sampled out to take all text "
            "from the model"
        )
    if options.text is None:
        return read_text(BUILT_IN, tokenizer, options.from_text)
    found = read_text(options.text, tokenizer, options.with_held_out(options.from_text))
    largest = max(int(sequence.max()) for sequence in found)
    if largest >= vocab_size:
        raise RequestError(
            f"the tokenizer gives the id {largest}, but the model has {vocab_size} tokens; put "
            "the model's own tokenizer into its folder"
        )
    return found


def _text(
    work: Work,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    options: CalibrationOptions,
    given: list[np.ndarray],
) -> Passages:
    """The text of this request: that of an earlier run, or a new one."""
    tokens, lengths = work.load(TOKENS), work.load(LENGTHS)
    if tokens is not None and lengths is not None:
        expect_stages(3)  # nothing is sampled now
        return Passages(tokens, lengths)
    sampled = []
    if options.from_model:
        sampled = sample(
            checkpoint,
            tokenizer,
            options.with_held_out(options.from_model),
            seed=options.seed,
            folder=work.folder / "sampled",
        )
    text = join([*sampled, *given], options.seed)
    work.save(LENGTHS, text.lengths)
    work.save(TOKENS, text.tokens)
    return text


def collect(
    work: Work,
    checkpoint: Checkpoint,
    text: Passages,
    held_out: Passages,
    options: CalibrationOptions,
    hashes: FileHashes,
    device: str,
    workers: Cluster | None = None,
) -> None:
    """Fills the file with the statistics of the text; what is held out is only kept in it."""
    from rgexport.compress.statistics import Collector, run_layer
    from rgexport.griffin.reference import Reference

    config = checkpoint.config
    gradients = text.first(options.gradient_tokens)
    provenance = Provenance(
        model=checkpoint.name,
        files={name: record.sha256 for name, record in hashes.items()},
        tokens=len(text.tokens),
        gradient_tokens=len(gradients.tokens),
        text=options.source,
        tokens_sha256=hashlib.sha256(text.tokens.tobytes()).hexdigest(),
        seed=options.seed,
        tool=f"rgexport {__version__}",
    )
    texts = {TOKENS: text.tokens, LENGTHS: text.lengths}
    if len(held_out.tokens):
        texts |= {HELD_OUT: held_out.tokens, HELD_OUT_LENGTHS: held_out.lengths}
    arrays = arrays_of(config, texts)
    require_free_disk(work.folder, _free_bytes(arrays, len(text.tokens) * config.width))
    file = StatisticsFile(work, provenance, arrays)
    counts = np.bincount(text.tokens, minlength=config.vocab_size)
    frequency = (counts / len(text.tokens)).astype(np.float32)
    file.write(texts | {FREQUENCY: frequency})
    model = Reference(config, checkpoint.weights, device=device)
    run = spread_layer(workers, checkpoint, device) if workers else partial(run_layer, model)
    Collector(model, text, gradients, work, file, options.seed, run).collect()


def _free_bytes(arrays: Arrays, stream: int) -> int:
    """What the file takes, and the residual stream twice."""
    sizes = (dtype.itemsize * int(np.prod(shape)) for dtype, shape in arrays.values())
    return sum(sizes) + 2 * 4 * stream
