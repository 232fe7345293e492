"""Adds the port to a llama.cpp checkout: all of it, or nothing."""

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.kernels.llama_cpp import port, unified_diff

_CHECKOUT_MARK = Path("include/llama.h")


def patch_checkout(folder: Path) -> list[str]:
    """Patches a llama.cpp checkout; files that are patched already are left alone.

    Returns:
        The files that were written, as paths in `folder`; none if all were patched already.

    Raises:
        RequestError: `folder` is no llama.cpp, or one of its files differs from what the port was
            made for. No file has been changed then.
    """
    if not (folder / _CHECKOUT_MARK).is_file():
        inside = folder / "vendor" / "llama.cpp"
        hint = f"; pass {inside}" if (inside / _CHECKOUT_MARK).is_file() else ""
        raise RequestError(f"{folder} is no llama.cpp: it has no {_CHECKOUT_MARK}{hint}")
    wanted = {path: _patched(folder, path) for path in port.registration()}
    wanted[port.MODEL_FILE] = _model_file(folder)
    changed = {path: text for path, text in wanted.items() if _read(folder / path) != text}
    _write_all({folder / path: text for path, text in changed.items()})
    return list(changed)


def _patched(folder: Path, path: str) -> str:
    text = _read(folder / path)
    patched = None if text is None else unified_diff.apply(port.registration()[path], text)
    if patched is None:
        raise RequestError(
            f"{folder / path} {'is missing' if text is None else 'has drifted'}: the port is made "
            f"for llama.cpp {port.COMMIT[:7]}, in {port.DISTRIBUTION} {port.RELEASE}; check out a "
            "commit near that one. Nothing was changed"
        )
    return patched


def _model_file(folder: Path) -> str:
    ours, theirs = port.model_source(), _read(folder / port.MODEL_FILE)
    if theirs is None:
        return ours
    if theirs.replace("\r\n", "\n") != ours:
        raise RequestError(
            f"{folder / port.MODEL_FILE} is there and differs from the port's: this llama.cpp "
            "holds another version of it. Remove that first; nothing was changed"
        )
    return theirs


def _read(path: Path) -> str | None:
    """A file's text with its line ends as they are, and any other bytes passed through."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None


def _write_all(texts: Mapping[Path, str]) -> None:
    """Writes all files or none: beside their places, then into them; undone where one fails."""
    real = {path.resolve(): text.encode("utf-8", "surrogateescape") for path, text in texts.items()}
    before = {path: path.read_bytes() if path.exists() else None for path in real}
    token = secrets.token_hex(4)
    staged = {path: path.with_name(f".{path.name}.partial-{token}") for path in real}
    moved = []
    try:
        for path, partial in staged.items():
            partial.write_bytes(real[path])
            if before[path] is not None:
                shutil.copymode(path, partial)
        for path, partial in staged.items():
            moved.append(path)
            partial.replace(path)
    except BaseException:
        for path in moved:
            _restore(path, before[path])
        raise
    finally:
        for partial in staged.values():
            partial.unlink(missing_ok=True)


def _restore(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)
