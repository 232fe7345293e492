"""Whether the files of a session, which it may have mapped, are still those that it opened.

What is written into a mapped file changes the session's weights at once, and reading past the end
of one that was cut ends the process. No program can check before each read; this checks whenever a
conversation begins.
"""

from pathlib import Path

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact


class UnchangedFiles:
    """The files of an artifact whose names begin with `prefix`, as they are when this is made."""

    def __init__(self, artifact: Artifact, prefix: str = ""):
        """Notes them.

        Raises:
            RequestError: one has another size than when the artifact was opened.
        """
        whole = artifact.path.is_file()  # a GGUF file is its own folder
        self._stamps: dict[Path, tuple[int, int, int] | None] = {}
        for name, record in artifact.manifest.files.items():
            path = artifact.path if whole else artifact.file(name)
            if name.startswith(prefix) and path.exists():  # the engine says what is missing
                self._stamps[path] = _stamp(path)
                if path.stat().st_size != record.size:
                    raise _changed(path)

    def require(self) -> None:
        """Compares them with what was noted.

        Raises:
            RequestError: one was written to, cut, replaced or removed.
        """
        for path, before in self._stamps.items():
            if _stamp(path) != before:
                raise _changed(path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and time of the last change; None if it cannot be found."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _changed(path: Path) -> RequestError:
    return RequestError(f"{path} changed while it was open; open the artifact again")
