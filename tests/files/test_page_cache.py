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


def test_the_file_stays_as_it_is(large):
    before = large.stat()
    forget(large)
    after = large.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert large.read_bytes()[:5] == b"abcd\0"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such advice")
def test_only_large_files_are_dropped(large, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]))
    small = tmp_path / "small"
    small.write_bytes(b"abcd")
    forget(small)
    assert not asked
    forget(large)
    assert asked == [(0, 0, os.POSIX_FADV_DONTNEED)]


def test_a_refusal_is_no_error(large, monkeypatch):
    def refuse(descriptor):
        raise OSError("read only")

    monkeypatch.setattr(os, "fdatasync", refuse, raising=False)
    forget(large)
    assert large.stat().st_size == SIZE
