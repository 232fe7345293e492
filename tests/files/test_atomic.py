"""Folders and files appear complete or not at all, whatever happens meanwhile."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from rgexport.errors import RequestError
from rgexport.files import atomic
from rgexport.files.atomic import (
    check_file_target,
    check_target,
    replace_file,
    replace_folder,
    require_free_disk,
)

KINDS = {"folder": (replace_folder, check_target), "file": (replace_file, check_file_target)}
each_kind = pytest.mark.parametrize("kind", KINDS)


def content(target: Path) -> Path:
    """The file in a folder of ours, or the file itself."""
    return target / "ours" if target.is_dir() else target


def is_ours(target: Path) -> bool:
    return content(target).is_file() and content(target).read_text().startswith("ours")


def replacing(target: Path, kind: str = "folder", *, force: bool = False):
    return KINDS[kind][0](target, force=force, replaceable=is_ours)


def write(target: Path, text: str = "ours", kind: str = "folder", *, force: bool = False) -> None:
    with replacing(target, kind, force=force) as partial:
        assert partial.parent == target.parent and partial.exists() == (kind == "folder")
        content(partial).write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@each_kind
def test_appears_complete(tmp_path, kind):
    write(tmp_path / "out", kind=kind)
    assert entries(tmp_path) == ["out"] and content(tmp_path / "out").read_text() == "ours"
    os.umask(mask := os.umask(0))
    most = 0o777 if kind == "folder" else 0o666
    assert (tmp_path / "out").stat().st_mode & 0o777 == most & ~mask


@each_kind
@pytest.mark.parametrize(("error", "existing"), [(ValueError, False), (KeyboardInterrupt, True)])
def test_failure_leaves_nothing(tmp_path, kind, error, existing):
    target = tmp_path / "out"
    if existing:
        write(target, "ours, old", kind)
    with pytest.raises(error), replacing(target, kind, force=True) as partial:
        content(partial).write_text("half")
        raise error
    assert entries(tmp_path) == (["out"] if existing else [])
    assert not existing or content(target).read_text() == "ours, old"


@pytest.mark.parametrize(
    ("kind", "exchange"), [("folder", True), ("folder", False), ("file", True)]
)
@pytest.mark.parametrize("link", [False, True])
def test_force_replaces_its_own_kind(tmp_path, monkeypatch, kind, exchange, link):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    real = target = tmp_path / "out"
    write(real, "ours, old", kind)
    if link:
        target = tmp_path / "link"
        target.symlink_to("out")
    if kind == "folder":
        (real / "left").touch()
    write(target, "ours, new", kind, force=True)
    assert entries(tmp_path) == (["link", "out"] if link else ["out"])
    assert target.is_symlink() == link and content(real).read_text() == "ours, new"
    assert kind == "file" or entries(real) == ["ours"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders in one step")
def test_there_is_a_folder_at_every_moment(tmp_path, monkeypatch):
    """Two renames would leave a moment without one, in which a reader or a kill may come."""
    target, rename, found = tmp_path / "out", os.rename, []

    def watched(*names):
        rename(*names)
        found.append((target / "ours").exists())

    write(target, "ours, old")
    monkeypatch.setattr(os, "rename", watched)
    write(target, force=True)
    assert all(found) and (target / "ours").read_text() == "ours"


def make_foreign(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").touch()


def make_link_to_foreign(target: Path) -> None:
    make_foreign(target.with_name("real"))
    target.symlink_to("real")


@pytest.mark.parametrize(
    ("kind", "make", "force", "complaint"),
    [
        ("folder", Path.mkdir, False, "out exists; pass --force"),
        ("folder", write, False, "out exists; pass --force"),
        ("folder", Path.touch, True, "out exists and is a file"),
        ("folder", make_foreign, True, "holds something else"),
        ("folder", make_link_to_foreign, True, "holds something else"),
        ("file", lambda target: write(target, kind="file"), False, "out exists; pass --force"),
        ("file", Path.touch, True, "out exists and is something else"),
        ("file", Path.mkdir, True, "out exists and is a folder"),
    ],
)
def test_refused_before_any_work(tmp_path, kind, make, force, complaint):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match=complaint):
        KINDS[kind][1](tmp_path / "out", force=force, replaceable=is_ours)
    with pytest.raises(RequestError, match=complaint):
        write(tmp_path / "out", kind=kind, force=force)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", [".", "../..", "link", "/"])
def test_the_current_folder_is_refused(tmp_path, monkeypatch, target):
    inside = tmp_path / "out" / "inside"
    inside.mkdir(parents=True)
    (inside / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(inside)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match="it is the current folder or holds it"):
        write(Path(target), force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(RequestError, match="out: it is a mount point; pass a folder in it"):
        check_target(tmp_path / "out", force=True, replaceable=is_ours)


@pytest.fixture
def unprivileged():
    """A folder of a user to whom permissions apply, who runs the test."""
    with tempfile.TemporaryDirectory() as folder:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere permissions work otherwise")
@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_what_is_read_only(unprivileged, monkeypatch, capsys, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = unprivileged / "out"
    write(target, "ours, old")
    (target / "below").mkdir()
    (target / "below" / "file").touch()
    for path in (target / "below" / "file", target / "below", target):
        path.chmod(0o444 if path.is_file() else 0o555)
    write(target, force=True)
    assert entries(unprivileged) == ["out"] and (target / "ours").read_text() == "ours"
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix", reason="elsewhere permissions work otherwise")
def test_read_only_parent(unprivileged):
    unprivileged.chmod(0o555)
    with pytest.raises(RequestError, match=r"cannot write .*out: Permission denied"):
        write(unprivileged / "out")


def test_what_cannot_be_removed_is_named(tmp_path, monkeypatch, capsys):
    write(tmp_path / "out")
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda folder, **options: None)
    write(tmp_path / "out", force=True)
    left = next(tmp_path.glob(".out.partial-*"))
    assert capsys.readouterr().err == f"Warning: {left} cannot be removed; remove it yourself\n"


def test_parent_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for below in ("missing/out", "file/out"):
        with pytest.raises(RequestError, match="there is no folder"):
            write(tmp_path / below)
    assert entries(tmp_path) == ["file"]


@each_kind
def test_a_target_that_appears_meanwhile_is_kept(tmp_path, kind):
    with (
        pytest.raises(RequestError, match=r"out exists and (holds|is) something else"),
        replacing(tmp_path / "out", kind, force=True) as partial,
    ):
        content(partial).write_text("ours")
        make_foreign(tmp_path / "out") if kind == "folder" else (tmp_path / "out").touch()
    assert entries(tmp_path) == ["out"] and not is_ours(tmp_path / "out")


def test_strange_names(tmp_path):
    for name in ["a[b]*?", ".hidden", "ünï cödé", "x.partial-00000000"]:
        write(tmp_path / name)
        write(tmp_path / name, force=True)
    assert len(entries(tmp_path)) == 4


WRITER = """
    import sys
    from pathlib import Path
    from tests.files.test_atomic import content, replacing
    with replacing(Path(sys.argv[1]), sys.argv[2], force=True) as partial:
        content(partial).write_text("half")
        print("writing", flush=True)
        sys.stdin.read()
        content(partial).write_text("ours, whole")
"""


def start_writer(target: Path, kind: str = "folder") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(target), kind],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@each_kind
def test_kill_leaves_the_target_and_the_next_run_cleans_up(tmp_path, kind):
    target = tmp_path / "out"
    write(target, "ours, old", kind)
    with start_writer(target, kind) as writer:
        writer.send_signal(signal.SIGKILL)
    assert content(target).read_text() == "ours, old" and len(entries(tmp_path)) == 3
    write(target, "ours, new", kind, force=True)
    assert entries(tmp_path) == ["out"] and content(target).read_text() == "ours, new"


def test_two_writers_of_one_target(tmp_path):
    target = tmp_path / "out"
    with start_writer(target) as writer:
        with pytest.raises(RequestError, match=r"another run is writing .*out"):
            write(target)
        write(tmp_path / "other")
        writer.communicate(input="")
    assert writer.returncode == 0
    assert entries(tmp_path) == ["other", "out"]
    assert content(target).read_text() == "ours, whole"


def test_neighbour_with_a_similar_name_is_not_swept(tmp_path):
    with start_writer(tmp_path / "out.partial-01234567") as writer:
        write(tmp_path / "out")
        writer.communicate(input="")
    assert entries(tmp_path) == ["out", "out.partial-01234567"]


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [(code, RequestError, "no space left") for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    + [(errno.ENOENT, FileNotFoundError, "No such file")],
)
def test_full_disk_is_one_line_and_other_errors_pass(tmp_path, code, kind, message):
    with pytest.raises(kind, match=message), replacing(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert entries(tmp_path) == []


def test_free_space(tmp_path):
    require_free_disk(tmp_path, 1)
    with pytest.raises(RequestError, match=r"not enough space .* needed, .* free"):
        require_free_disk(tmp_path / "not" / "there", 1 << 60)


def test_a_lock_file_that_is_removed_while_it_is_locked(tmp_path, monkeypatch):
    """An earlier run removes the file between open and flock: that lock excludes nobody."""
    lock, flock = tmp_path / ".out.lock", fcntl.flock

    def remove_and_lock(descriptor: int, operation: int) -> None:
        lock.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with pytest.raises(RequestError, match="another run is writing"):
        write(tmp_path / "out")
    assert entries(tmp_path) == []


def test_the_lock_file_of_the_next_run_stays(tmp_path, monkeypatch):
    lock = tmp_path / ".out.lock"

    class Slow(atomic.FileLock):
        def release(self, force: bool = False) -> None:
            if self.is_locked:
                lock.write_text("")  # the next run begins after the removal, before the release
            super().release(force)

    monkeypatch.setattr(atomic, "FileLock", Slow)
    write(tmp_path / "out")
    assert entries(tmp_path) == [".out.lock", "out"]
