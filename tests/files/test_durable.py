"""Files that are on the disk when a call returns."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rgexport.files.durable import write_file

PARTS = [b"ab", memoryview(b"cd")]


def test_file_and_folder_are_synchronized_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return call(*arguments, **options)

        return record

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    write_file(tmp_path / "a", PARTS)
    assert (tmp_path / "a").read_bytes() == b"abcd"
    assert calls == ["fsync", "replace", "fsync"][: 2 if os.name == "nt" else 3]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_failure_is_told_unless_the_system_synchronizes_no_folders(
    failing: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "a", [0]
    path.write_bytes(b"before")

    def sync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == failing + 1:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", sync)
    if (failing, code) == (1, errno.EINVAL):
        write_file(path, PARTS)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            write_file(path, PARTS)
    assert path.read_bytes() == (b"abcd" if failing else b"before")
    assert [*tmp_path.iterdir()] == [path], "nothing half-written is left"
