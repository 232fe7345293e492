"""What tests compile is cached as long as its sources, flags and compiler are the same."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest

from tests import built as module
from tests.built import built

MADE: list[Path] = []


def make(folder: Path, *words: str) -> None:
    sleep(0.01)
    MADE.append(folder)
    if "broken" in words:
        raise ValueError("broken")
    (folder / "it").write_text(" ".join(words))


@pytest.fixture(autouse=True)
def source(tmp_path, monkeypatch) -> Path:
    """A source file; nothing has been made yet."""
    MADE.clear()
    monkeypatch.setattr(module, "FOLDER", tmp_path / "built")
    (tmp_path / "source.cpp").write_text("one")
    return tmp_path / "source.cpp"


def test_is_made_once_for_each_argument(source):
    for word in ("one", "other", "one"):
        assert (built(make, [source], word) / "it").read_text() == word
    assert len(MADE) == 2


def test_is_made_again_from_other_sources_or_flags(source, monkeypatch):
    before = built(make, [source])
    source.write_text("two")
    after = built(make, [source])
    assert after != before and not before.exists() and (after / "it").exists()
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert built(make, [source]) != after != built(make, [source], compiler="cmake")


def test_a_failed_build_is_not_kept(source):
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            built(make, [source], "broken")
    assert len(MADE) == 2


def test_a_second_builder_waits(source):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: built(make, [source]), range(4)))
    assert len(folders) == len(MADE) == 1
