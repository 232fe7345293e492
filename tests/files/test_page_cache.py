"""Eviction of files from the page cache."""

import os

import pytest

from rgexport.files.page_cache import forget

SIZE = 64 << 20


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"abcd" + bytes(SIZE - 4))
    return path


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such advice")
def test_only_large_files_are_dropped(large, tmp_path, monkeypatch):
    advised, before = [], large.stat()
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments[1:]))
    (tmp_path / "small").write_bytes(b"abcd")
    forget(tmp_path / "small")
    assert not advised
    forget(large)
    assert advised == [(0, 0, os.POSIX_FADV_DONTNEED)]
    assert large.stat().st_mtime_ns == before.st_mtime_ns and large.read_bytes()[:5] == b"abcd\0"


def test_a_refusal_is_no_error(large, monkeypatch):
    def refuse(descriptor):
        raise OSError("read only")

    monkeypatch.setattr(os, "fdatasync", refuse, raising=False)
    forget(large)
    assert large.stat().st_size == SIZE
