"""Mapped files become resident, but for what is left out."""

import mmap
import re
import sys
import threading
from pathlib import Path

import pytest

from rgexport.runtimes import resident_files
from rgexport.runtimes.resident_files import Extent, resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of mappings")
MIB = 1 << 20
SIZE = 40 * MIB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a folder" / "weights.data"
    path.parent.mkdir()
    path.write_bytes(bytes(SIZE))
    return path


def map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)


def resident_bytes(path: Path) -> int:
    """Of all mappings of a file."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = (re.search(r"Rss: +(\d+) kB", entry) for entry in entries if str(path) in entry)
    return 1024 * sum(int(size[1]) for size in sizes)


def settle(path: Path, *leave_out: Extent, folder: Path | None = None) -> int:
    """Maps a file in a block and waits; what is resident of it then."""
    threads = set(threading.enumerate())
    with resident(folder or path.parent, leave_out):
        region = map_file(path)
    for thread in set(threading.enumerate()) - threads:
        thread.join(20)
    found = resident_bytes(path)
    region.close()
    return found


def test_all_of_a_file(file):
    assert settle(file) == SIZE


def test_what_is_left_out(file):
    extents = Extent(file, 3 * MIB + 5, 9 * MIB + 7), Extent(file, 20 * MIB, 50 * MIB)
    around = 1 << 16  # the kernel maps as much with a page
    assert settle(file, *extents) == pytest.approx(3 * MIB + 11 * MIB, abs=2 * around)
    assert settle(file, Extent(file.with_name("other"), 0, SIZE)) == SIZE


def test_other_folders_stay_as_they_are(file, tmp_path):
    (tmp_path / "a").mkdir()
    assert settle(file, folder=tmp_path / "a") < MIB


def test_what_was_mapped_before_stays_as_it_is(file):
    before = map_file(file)
    assert settle(file) == SIZE  # of the second mapping
    before.close()


def test_not_where_memory_is_short(file, monkeypatch):
    monkeypatch.setattr(resident_files, "available_bytes", lambda: SIZE - 1)
    assert settle(file) < MIB


def test_old_kernels_read_ahead(file, monkeypatch):
    advice = []

    def refuse(start: int, end: int, kind: int) -> bool:
        advice.append((end - start, kind))
        return kind != 22

    monkeypatch.setattr(resident_files, "advise", refuse)
    settle(file)
    assert advice == [(size * MIB, kind) for size in (16, 16, 8) for kind in (22, 3)]
