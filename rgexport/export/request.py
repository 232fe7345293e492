"""What a user asks an export for, and what the export answers."""

import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

from rgexport.choices import Quality
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.checked import NOT_ASKED_FOR
from rgexport.export.format import format_of
from rgexport.quantize.scheme import Ggml, Plan
from rgexport.units import amount

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def bytes_of(flag: str, text: str) -> float:
    """The bytes that an option's text means, such as `1.5GB`.

    Raises:
        RequestError: it is no number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise RequestError(
            f"{flag} is {text!r}; expected a number of bytes, such as 1500MB or 1.5GB"
        )
    return float(match[1]) * _UNITS[match[2].lower()]


def precision_word(precision: str | None, int4: bool, int8: bool, kind: str) -> str | None:
    """The precision that `--precision`, `--int4` and `--int8` name, if any, for a kind of artifact.

    Raises:
        RequestError: they contradict each other, or the word is unknown.
    """
    flags = {"int4": int4, "int8": int8}
    asked = [word for word, given in flags.items() if given]
    named = {*asked, *([precision] if precision else [])}
    if len(named) > 1:
        given = [f"--{word}" for word in asked] + [f"--precision {precision}"] * bool(precision)
        raise RequestError(f"{' and '.join(given)} contradict each other; give one of them")
    word = named.pop() if named else None
    if word:
        require_word("--precision", word, format_of(kind).precisions)
    return word


def require_word(flag: str, word: str, words: Iterable[str]) -> None:
    """Refuses an unknown word of an option.

    Raises:
        RequestError: it is none of `words`.
    """
    if word not in words:
        raise RequestError(f"{flag} is {word!r}; expected one of {', '.join(words)}")


_FLOATS = {"fp32", "fp16", "f32", "f16", "bf16"}
QUALITIES: dict[Quality, str] = {"fast": "rtn", "default": "search", "best": "gptq"}
"""Word of `--quality` → the algorithm that chooses levels."""


def algorithm_word(
    quality: Quality | None, calibration: object | None, plan: object | None
) -> str | None:
    """The algorithm that is asked for; None leaves it to a plan, or to the default.

    Raises:
        RequestError: an unknown word, or a quality that a calibration is not for.
    """
    if quality is not None:
        require_word("--quality", quality, QUALITIES)
    if calibration is not None and quality not in (None, "best"):
        raise RequestError(
            f"--quality {quality} takes no calibration; leave out --calibration, or take "
            "--quality best"
        )
    if quality is None and (plan is not None or calibration is None):
        return None
    return QUALITIES[quality or "best"]


def refuse_beside_plan(options: Any, names: Iterable[str]) -> None:
    """Refuses options that a plan replaces.

    Args:
        options: a dataclass with a `plan`.
        names: its fields that say for all tensors what a plan says for each.

    Raises:
        RequestError: there is a plan, and one of these fields is not its default.
    """
    given = [name for name in names if getattr(options, name) != getattr(type(options), name)]
    if options.plan is not None and given:
        words = ", ".join(name.replace("_", " ") for name in given)
        raise RequestError(f"--plan says how each tensor is stored; leave out the {words}")


def refuse_ggml(plan: Plan | None) -> None:
    """Refuses a plan for GGUF.

    Raises:
        RequestError: it stores a tensor in a ggml type.
    """
    for name, scheme in (plan or {}).items():
        if isinstance(scheme, Ggml):
            raise RequestError(
                f"the plan stores {name} as {scheme.label}, which only GGUF files have"
            )


def refuse_idle(options: Mapping[str, object], where: str) -> None:
    """Refuses options that change nothing.

    Args:
        options: flag → its value; None, False and empty values were not given.
        where: goes on after `changes nothing in`, and says what to do.

    Raises:
        RequestError: one was given.
    """
    if given := [flag for flag, value in options.items() if value]:
        change = "changes" if len(given) == 1 else "change"
        raise RequestError(f"{' and '.join(given)} {change} nothing in {where}")


def require_blocks(
    words: Collection[str], block: int | None, symmetric: bool | None, exact: bool = False
) -> None:
    """Refuses the options of quantized weights where none is quantized in blocks.

    Args:
        words: the precisions of the linears and of the embedding.
        block: `--block-size`.
        symmetric: `--symmetric` or `--asymmetric`.
        exact: `--exact`.

    Raises:
        RequestError: one was given, and no precision has blocks.
    """
    if {"int3", "int4", "int8"}.isdisjoint(words):
        flag = "--symmetric" if symmetric else "--asymmetric"
        refuse_idle(
            {"--block-size": block is not None, "--exact": exact, flag: symmetric is not None},
            f"{' and '.join(dict.fromkeys(words))} weights; expected it beside --int8 or --int4: "
            "give one of those, or leave it out",
        )


def require_levels(words: Collection[str], algorithm: str | None) -> None:
    """Refuses to choose the levels of weights that have none.

    Args:
        words: the precisions of the linears and of the embedding, or the type of a GGUF file.
        algorithm: what `--quality` or `--calibration` asks for.

    Raises:
        RequestError: there is an algorithm, and no precision has levels.
    """
    if algorithm is not None and {*words} <= _FLOATS:
        refuse_idle(
            {"--quality (or --calibration)": True},
            f"{' and '.join(dict.fromkeys(words))} weights; expected it beside weights of 8 or 4 "
            "bits: give --int8 or --int4, or leave it out",
        )


def default_target(model: str, precision: str, kind: str, profile: str = "cpu") -> Path:
    """The folder that is written without `-o`, such as `./recurrentgemma-2b-int4-onnx`."""
    words = [model, precision, kind, *([] if profile == "cpu" else [profile])]
    return Path("-".join(words))


def as_argument(path: Path) -> str:
    """Returns a path, quoted for a shell of this system."""
    text = f".{os.sep}{path}" if str(path).startswith("-") else str(path)
    return list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


def closing_line(artifact: Artifact) -> str:
    """Where an artifact is, and what to type next."""
    size = amount(sum(record.size for record in artifact.manifest.files.values()))
    place = format_of(artifact.manifest.kind).runs_on
    engine = f"It runs {place}. " if place else ""
    return f"{artifact.path} is complete ({size}). {engine}{_next_step(artifact)}"


def check_line(artifact: Artifact) -> str | None:
    """How the self-check ended, and what to do about it; None where none was asked for."""
    found = artifact.manifest.check
    if found == NOT_ASKED_FOR:
        return None
    advice = _ADVICE.get(found.status)
    if advice is None:
        return found.sentence
    return f"{found.sentence} {advice}: rgexport validate {as_argument(artifact.path)}"


_ADVICE = {"unverified": "Look closer", "skipped": "Do it later"}
"""Status of a self-check → why to run `validate`."""


def _next_step(artifact: Artifact) -> str:
    path = as_argument(artifact.path)
    if not artifact.manifest.has_tokenizer:
        return f"It has no tokenizer; try: rgexport generate {path} --ids 2"
    if artifact.manifest.instruction_tuned:
        return f"Chat with it: rgexport chat {path}"
    line = f'Try: rgexport generate {path} -p "The meaning of life is"'
    tuned = _TUNED.get(artifact.manifest.name)
    return line + (f" (a base model; to chat, export --size {tuned})" if tuned else "")


_TUNED = {"recurrentgemma-2b": "2b-it", "recurrentgemma-9b": "9b-it"}
"""Released base models → the size word of the model to chat with."""
