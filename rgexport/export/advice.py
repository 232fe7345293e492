"""Tells a user after an export where the artifact is, and what to type next."""

import os
import shlex
from pathlib import Path
from subprocess import list2cmdline

from rgexport.export.artifact import Artifact
from rgexport.export.format import format_of
from rgexport.export.manifest import NOT_ASKED_FOR
from rgexport.units import amount

_CHECK_ADVICE = {"unverified": "Look closer", "skipped": "Do it later"}
"""Status of a self-check → why to run `validate`."""
_TUNED = {"recurrentgemma-2b": "2b-it", "recurrentgemma-9b": "9b-it"}
"""Released base model → the size word of the model to chat with."""


def default_target(model: str, precision: str, kind: str, profile: str = "cpu") -> Path:
    return Path("-".join([model, precision, kind, *([] if profile == "cpu" else [profile])]))


def as_argument(path: Path) -> str:
    text = f".{os.sep}{path}" if str(path).startswith("-") else str(path)
    return list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


def closing_line(artifact: Artifact) -> str:
    """Returns the last line of an export: the artifact's path, and the next command."""
    size = amount(sum(record.size for record in artifact.manifest.files.values()))
    runs_on = format_of(artifact.manifest.kind).runs_on
    engine = f"It runs {runs_on}. " if runs_on else ""
    return f"{artifact.path} is complete ({size}). {engine}{_next_step(artifact)}"


def _next_step(artifact: Artifact) -> str:
    path, manifest = as_argument(artifact.path), artifact.manifest
    if not manifest.has_tokenizer:
        return f"It has no tokenizer; try: rgexport generate {path} --ids 2"
    if manifest.instruction_tuned:
        return f"Chat with it: rgexport chat {path}"
    line = f'Try: rgexport generate {path} -p "The meaning of life is"'
    tuned = _TUNED.get(manifest.name)
    return line + (f" (a base model; to chat, export --size {tuned})" if tuned else "")


def check_line(artifact: Artifact) -> str | None:
    """Returns the self-check's outcome, and advice; None with `--no-check`."""
    check = artifact.manifest.check
    if check == NOT_ASKED_FOR:
        return None
    advice = _CHECK_ADVICE.get(check.status)
    if advice is None:
        return check.sentence
    return f"{check.sentence} {advice}: rgexport validate {as_argument(artifact.path)}"
