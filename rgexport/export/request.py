"""What a user asks an export for, and what the export answers."""

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.checked import NOT_ASKED_FOR
from rgexport.export.format import format_of
from rgexport.progress import amount


def precision_word(precision: str | None, int4: bool, int8: bool, kind: str) -> str | None:
    """The precision that `--precision`, `--int4` and `--int8` name together, if any.

    `kind` is that of the artifact, which says what words there are.

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
    words = format_of(kind).precisions
    if word not in (None, *words):
        raise RequestError(f"--precision is {word!r}; expected one of {', '.join(words)}")
    return word


_IN_BLOCKS = "int4", "int8"
"""Precisions whose weights have scales, and are multiplied by activations in int8."""


def require_blocks(words: Collection[str], options: Mapping[str, object]) -> None:
    """Refuses options that change nothing where no weight is quantized in blocks.

    Args:
        words: the precisions of the linears and of the embedding.
        options: flag → what was given; None and False were not.

    Raises:
        RequestError: one was given, and no precision has blocks.
    """
    given = [flag for flag, value in options.items() if value is not None and value is not False]
    if given and not set(words) & set(_IN_BLOCKS):
        raise RequestError(
            f"{' and '.join(given)} {'changes' if len(given) == 1 else 'change'} nothing in "
            f"{' and '.join(dict.fromkeys(words))} weights; expected it beside --int8 or --int4: "
            "give one of those, or leave it out"
        )


def symmetry(symmetric: bool | None) -> dict[str, object]:
    """The flag that was given for it, as `require_blocks` takes it."""
    return {} if symmetric is None else {"--symmetric" if symmetric else "--asymmetric": True}


def default_target(model: str, precision: str, kind: str, profile: str = "cpu") -> Path:
    """Where an artifact goes without `-o`, such as `./recurrentgemma-2b-int4-onnx`.

    One that is lowered for something else than a processor ends in the word for that.
    """
    words = [model, precision, kind, *([] if profile == "cpu" else [profile])]
    return Path("-".join(words))


def as_argument(path: Path) -> str:
    """A path as one types it in a shell."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def closing_line(artifact: Artifact) -> str:
    """Where an artifact is, and what to type next."""
    size = amount(sum(record.size for record in artifact.manifest.files.values()))
    return " ".join(
        (f"{artifact.path} is complete ({size}).", *_engine(artifact), _next_step(artifact))
    )


def check_line(artifact: Artifact) -> str | None:
    """How its self-check ended, and what may be done about it; None where nobody wanted one."""
    found = artifact.manifest.check
    if found == NOT_ASKED_FOR:
        return None
    advice = _ADVICE.get(found.status)
    if advice is None:
        return found.sentence
    return f"{found.sentence} {advice}: rgexport validate {as_argument(artifact.path)}"


_ADVICE = {"unverified": "Look closer", "skipped": "Do it later"}
"""Status of a self-check → what `validate` is good for then."""


def _engine(artifact: Artifact) -> list[str]:
    place = format_of(artifact.manifest.kind).runs_on
    return [f"It runs {place}."] if place else []


def _next_step(artifact: Artifact) -> str:
    path = as_argument(artifact.path)
    if not artifact.manifest.has_tokenizer:
        return f"It has no tokenizer; try: rgexport generate {path} --ids 2"
    if artifact.manifest.instruction_tuned:
        return f"Talk to it: rgexport chat {path}"
    line = f'Try: rgexport generate {path} -p "The meaning of life is"'
    tuned = _TUNED.get(artifact.manifest.name)
    return line + (f" (a base model; to chat, export --size {tuned})" if tuned else "")


_TUNED = {"recurrentgemma-2b": "2b-it", "recurrentgemma-9b": "9b-it"}
"""Released base models → the size word of the model to chat with."""
