"""The port of RecurrentGemma to llama.cpp: the release it is for, and the files it changes.

`git apply` needs git, and in a folder inside another repository skips every file.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from rgexport.errors import RequestError
from rgexport.files.atomic import replacing

DISTRIBUTION = "llama-cpp-python"
RELEASE = "0.3.36"
"""The release of the Python bindings whose llama.cpp the port is made for."""
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
"""Its commit of llama.cpp."""

MODEL_FILE = "src/models/recurrentgemma.cpp"
"""The model file's path in a llama.cpp tree, whose build compiles all of `src/models`."""
BUILD_COMMAND = "rgexport llama-cpp build"

_MODEL = Path(__file__).with_name("recurrentgemma.cpp")
_REGISTRATION = Path(__file__).with_name("registration.patch")
_CHECKOUT_MARK = Path("include/llama.h")


class Hunk(NamedTuple):
    """Whole lines to find, with the line end before them, and their replacement."""

    before: str
    after: str


def model_source() -> str:
    return _MODEL.read_text("utf-8")


@cache
def registration() -> dict[str, tuple[Hunk, ...]]:
    """Returns the changes of llama.cpp's own files: path in its tree → hunks."""
    pieces = re.split(r"^\+\+\+ b/(.*)\n", _REGISTRATION.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {
        path: tuple(map(_parse_hunk, re.split(r"^@@ .*\n", body, flags=re.MULTILINE)[1:]))
        for path, body in zip(pieces[::2], pieces[1::2], strict=True)
    }


def _parse_hunk(body: str) -> Hunk:
    lines = list(takewhile(lambda line: line.startswith((" ", "+", "-")), body.split("\n")))
    before, after = (
        "\n" + "".join(f"{line[1:]}\n" for line in lines if line[0] != sign) for sign in "+-"
    )
    return Hunk(before, after)


def port_version() -> str:
    """Returns the version of a patched build, such as `0.3.36+rgexport.g1a2b3c4d`.

    A local version: `==0.3.36` accepts it, pip does not replace it, and it changes with the port.
    """
    digest = hashlib.sha256(_MODEL.read_bytes() + _REGISTRATION.read_bytes()).hexdigest()
    return f"{RELEASE}+rgexport.g{digest[:8]}"


def apply_hunks(hunks: Sequence[Hunk], text: str) -> str | None:
    """Returns a file with all hunks applied, or None if a hunk's lines are not there once."""
    changed = "\n" + text.replace("\r\n", "\n")
    if all(changed.count(hunk.after) == 1 for hunk in hunks):
        return text
    for hunk in hunks:
        if changed.count(hunk.before) != 1:
            return None
        changed = changed.replace(hunk.before, hunk.after)
    return changed[1:].replace("\n", "\r\n" if "\r\n" in text else "\n")


def patch_checkout(folder: Path) -> list[str]:
    """Adds the port to a llama.cpp checkout, all or nothing; returns the changed paths in it."""
    if not (folder / _CHECKOUT_MARK).is_file():
        raise RequestError(f"{folder} is no llama.cpp: it has no {_CHECKOUT_MARK}")
    before = {path: _read(folder / path) for path in (*registration(), MODEL_FILE)}
    patched = {
        path: _patched(folder / path, before[path], hunks) for path, hunks in registration().items()
    }
    model = before[MODEL_FILE]
    if model is None:
        patched[MODEL_FILE] = model_source()
    elif model.replace("\r\n", "\n") != model_source():
        raise RequestError(
            f"{folder / MODEL_FILE} is there and differs from the port's: this llama.cpp "
            "holds another version of it. Remove that first; nothing was changed"
        )
    changed = {path: text for path, text in patched.items() if before[path] != text}
    _write_all({folder / path: text for path, text in changed.items()})
    return list(changed)


def _patched(path: Path, text: str | None, hunks: Sequence[Hunk]) -> str:
    patched = None if text is None else apply_hunks(hunks, text)
    if patched is None:
        raise RequestError(
            f"{path} {'is missing' if text is None else 'has drifted'}: the port is made for "
            f"llama.cpp {COMMIT[:7]}, in {DISTRIBUTION} {RELEASE}; check out a commit near that "
            "one. Nothing was changed"
        )
    return patched


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None


def _write_all(texts: Mapping[Path, str]) -> None:
    """Writes all files or none: each beside its path, then all into place."""
    new = {path.resolve(): text.encode("utf-8", "surrogateescape") for path, text in texts.items()}
    before = {path: path.read_bytes() if path.exists() else None for path in new}
    try:
        with ExitStack() as moves:
            for path, content in new.items():
                partial = moves.enter_context(replacing(path))
                partial.write_bytes(content)
                if before[path] is not None:
                    shutil.copymode(path, partial)
    except BaseException:
        for path, old in before.items():
            if old is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != old:
                path.write_bytes(old)
        raise
