"""A session's files, which it may have mapped: whether they are still those that it opened.

What is written into a mapped file is in the session's weights at once, and reading behind the end
of one that was cut ends the process: no program can ask before each read. This asks whenever a
conversation begins.
"""

from pathlib import Path

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact

_Stamp = tuple[int, int, int]
"""Inode, size, and mtime in ns."""


class UnchangedFiles:
    """The files of an artifact whose names begin with `prefix`, as they are when this is made."""

    def __init__(self, artifact: Artifact, prefix: str = ""):
        """Notes them.

        Raises:
            RequestError: one has another size than when the artifact was opened.
        """
        whole = artifact.path.is_file()  # a GGUF file is its own folder
        self._stamps: dict[Path, _Stamp] = {}
        for name, record in artifact.manifest.files.items():
            path = artifact.path if whole else artifact.file(name)
            if name.startswith(prefix) and path.exists():  # an engine itself says what it lacks
                self._stamps[path] = stamp = _stamp(path)
                if stamp[1] != record.size:
                    raise _changed(path, f"{record.size} bytes became {stamp[1]}")

    def require(self) -> None:
        """Compares them with what was noted.

        Raises:
            RequestError: one was written to, cut, replaced or removed.
        """
        for path, before in self._stamps.items():
            now = _stamp(path)
            if now != before:
                what = "another file took its place"
                if now[0] == before[0]:
                    what = "it was written to"
                if now[1] != before[1]:
                    what = f"{before[1]} bytes became {now[1]}"
                raise _changed(path, what)


def _stamp(path: Path) -> _Stamp:
    try:
        stat = path.stat()
    except OSError as error:
        raise _changed(path, error.strerror or "it cannot be found") from None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _changed(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} changed while it was open ({what}); open the artifact anew")
