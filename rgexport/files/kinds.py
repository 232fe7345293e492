"""Tells rgexport's own files by their contents, and reads their metadata."""

from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from rgexport.errors import RequestError
from rgexport.files.safetensors import has_metadata, read_metadata
from rgexport.files.typed_json import Mismatch, from_json, parse_json, read_json, require_version

_KINDS = {
    "rgexport.state": "a state file; see `rgexport state info`, and --load-state of chat",
    "rgexport.calibration": "a calibration of `rgexport calibrate`; exports take --calibration",
    "rgexport_reference": "a reference file of `rgexport reference`; see validate --reference",
}
"""Key of a file's metadata → kind of the file, and what reads it."""
T = TypeVar("T")


def is_plan(path: Path) -> bool:
    with suppress(RequestError):
        return "plan" in read_json(path)
    return False


def describe_file(path: Path) -> str:
    """Returns what a file is, and what reads it; "a file" if another program made it."""
    plan = "a plan; exports take it with --plan" if is_plan(path) else "a file"
    return next((kind for key, kind in _KINDS.items() if has_metadata(key, path)), plan)


def read_typed_metadata(path: Path, key: str, kind: type[T], version: int) -> T:
    """Returns the metadata of one kind of file; RequestError for other files, and damage."""
    text = read_metadata(path).get(key)
    if text is None:
        expected = _KINDS[key].partition(";")[0]
        raise RequestError(f"{path} is {describe_file(path)}; expected {expected}")
    try:
        fields = from_json(dict[str, Any], parse_json(text))
        require_version(path, fields.get("format_version"), version, "make it again")
        return from_json(kind, fields)
    except Mismatch as error:
        raise RequestError(f"{path} is damaged: in its metadata, {error}") from None
