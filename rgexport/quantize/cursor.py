"""Reads a binary file forward, and never more than there can be."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from rgexport.errors import RequestError


class Cursor:
    """A place in a file of `size` bytes of which at most `limit` may be read; little-endian."""

    def __init__(self, path: Path, file: BinaryIO, size: int, limit: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._file, self._limit = file, limit

    @property
    def left(self) -> int:
        """Bytes up to the end of the file."""
        return self.size - self.at

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            RequestError: there are not so many, or a negative number is asked for.
        """
        self.require(count)
        taken = self._file.read(count)
        if len(taken) != count:
            raise RequestError(f"{self.path} was changed while it was read")
        self.at += count
        return taken

    def require(self, count: int) -> None:
        """Refuses to go on where `count` more bytes cannot be.

        Raises:
            RequestError: the file ends before, or no sensible file has so many.
        """
        if count < 0:
            raise self.damaged(f"it has a length of {count}")
        if self.at + count > self.size:
            raise RequestError(
                f"{self.path} is truncated or damaged: it has {self.size} bytes, its contents "
                f"need {self.at + count} or more; copy or download it again"
            )
        if self.at + count > self._limit:
            raise self.damaged(f"it would have to be read beyond byte {self._limit}")

    def integer(self, nbytes: int, *, signed: bool = False) -> int:
        """A whole number of so many bytes."""
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def array(self, dtype: np.dtype, count: int) -> np.ndarray:
        """`count` numbers."""
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def text(self, nbytes: int) -> str:
        """So many bytes of UTF-8."""
        try:
            return self.take(nbytes).decode()
        except UnicodeDecodeError:
            raise self.damaged("a string in it is not UTF-8") from None

    def damaged(self, what: str) -> RequestError:
        """The error for contents that contradict themselves."""
        return RequestError(f"{self.path} is damaged: {what}; copy or download it again")
