"""Files appear complete or not at all; what they share with folders is in `test_atomic`."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rgexport.errors import RequestError
from rgexport.files.atomic import check_file_target, replace_file


def is_ours(file: Path) -> bool:
    return file.read_text().startswith("ours")


def write(target: Path, text: str = "ours", *, force: bool = False) -> None:
    with replace_file(target, force=force, replaceable=is_ours) as partial:
        assert partial.parent == target.parent and not partial.exists()
        partial.write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_appears_complete(tmp_path):
    write(tmp_path / "out")
    assert entries(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "ours"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_nothing(tmp_path, error, existing):
    target = tmp_path / "out"
    if existing:
        write(target, "ours, old")
    with pytest.raises(error), replace_file(target, force=True, replaceable=is_ours) as partial:
        partial.write_text("half")
        raise error
    assert entries(tmp_path) == (["out"] if existing else [])
    assert not existing or target.read_text() == "ours, old"


def test_force_replaces_its_own_kind(tmp_path):
    write(tmp_path / "out", "ours, old")
    write(tmp_path / "out", "ours, new", force=True)
    assert entries(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "ours, new"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real").write_text("ours, old")
    (tmp_path / "out").symlink_to("real")
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real").read_text() == "ours"


@pytest.mark.parametrize(
    ("make", "force", "complaint"),
    [
        (write, False, "out exists; pass --force"),
        (Path.touch, True, "out exists and is something else"),
        (Path.mkdir, True, "out exists and is a folder"),
    ],
)
def test_refused_before_any_work(tmp_path, make, force, complaint):
    make(tmp_path / "out")
    with pytest.raises(RequestError, match=complaint):
        check_file_target(tmp_path / "out", force=force, replaceable=is_ours)
    with pytest.raises(RequestError, match=complaint):
        write(tmp_path / "out", force=force)
    assert entries(tmp_path) == ["out"]


def test_what_came_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(RequestError, match="out exists and is something else"),
        replace_file(tmp_path / "out", force=True, replaceable=is_ours) as partial,
    ):
        partial.write_text("ours")
        (tmp_path / "out").write_text("a thesis")
    assert entries(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "a thesis"


def test_killed_run_leaves_what_the_next_removes(tmp_path):
    program = f"""
        import os
        from pathlib import Path
        from rgexport.files.atomic import replace_file
        target = Path({str(tmp_path / "out")!r})
        with replace_file(target, force=True, replaceable=lambda file: True) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), 9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert any(name.startswith(".out.partial-") for name in entries(tmp_path))
    write(tmp_path / "out")
    assert entries(tmp_path) == ["out"]


def test_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(RequestError, match="no space left while writing .*out"),
        replace_file(tmp_path / "out", force=False, replaceable=is_ours) as partial,
    ):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert entries(tmp_path) == []
