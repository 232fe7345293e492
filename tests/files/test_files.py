"""Files that are on the disk when a call returns, their names, and the page cache."""

import errno
import os
from unittest.mock import Mock

import pytest

from rgexport.files.atomic import evict_from_page_cache, write_file
from rgexport.files.paths import stays_inside, windows_objection


@pytest.mark.parametrize(
    ("failing", "code"), [(9, 0), (0, errno.EIO), (1, errno.EIO), (1, errno.EINVAL)]
)
def test_file_and_folder_are_synchronized_around_the_rename(tmp_path, monkeypatch, failing, code):
    """A failure is told, but that of a system that synchronizes no folders (EINVAL)."""
    path, calls, replace = tmp_path / "a", [], os.replace
    path.write_bytes(b"before")

    def sync(descriptor):
        calls.append("fsync")
        if calls.count("fsync") == failing + 1:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("replace") or replace(*names))
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            write_file(path, [b"ab", memoryview(b"cd")])
    else:
        write_file(path, [b"ab", memoryview(b"cd")])
        assert calls == ["fsync", "replace", "fsync"][: 2 if os.name == "nt" else 3]
    assert path.read_bytes() == (b"abcd" if failing else b"before")
    assert [*tmp_path.iterdir()] == [path], "nothing half-written is left"


def test_names_that_lead_elsewhere_on_some_system_or_that_windows_refuses():
    outside = ["", ".", "../a", "a/../../b", "/etc/passwd", "C:\\a", "C:a", "..\\a", "\\\\h\\a"]
    assert not [name for name in [*outside, "a\nb"] if stays_inside(name)]
    assert all(map(stays_inside, ("model.onnx.data", "Data/weights/weight.bin", "./a")))
    for name in ("con", "NUL.onnx", "com1 .txt"):
        assert windows_objection(name) == "is the name of a device"
    assert all(map(windows_objection, ("hf:owner", "a<b>?", "a\tb", "plan-4.", "plan ")))
    fine = ("plan-4.25", "console", "com10", "ünï cödé", ".hidden", "a'b")
    assert not any(map(windows_objection, fine))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such advice")
def test_only_large_files_are_dropped_from_the_page_cache(tmp_path, monkeypatch):
    """A refusal is no error."""
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments[3]))
    for size in (4, 64 << 20):
        (tmp_path / "file").write_bytes(bytes(size))
        evict_from_page_cache(tmp_path / "file")
    assert advised == [os.POSIX_FADV_DONTNEED]
    monkeypatch.setattr(os, "fdatasync", Mock(side_effect=OSError("read only")))
    evict_from_page_cache(tmp_path / "file")
