"""Folders and files appear complete or not at all, whatever happens meanwhile."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rgexport.errors import RequestError
from rgexport.files import atomic, targets
from rgexport.files.paths import report_os_errors
from tests.command_line import ROOT, tree

KINDS = {
    "folder": (targets.replace_folder, targets.check_target),
    "file": (targets.replace_file, targets.check_file_target),
}
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
def test_failure_leaves_nothing(tmp_path, kind):
    for left in ([], ["out"]):
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out", kind, force=True) as new:
            content(new).write_text("half")
            raise KeyboardInterrupt
        assert entries(tmp_path) == left
        write(tmp_path / "out", kind=kind, force=True)
    assert content(tmp_path / "out").read_text() == "ours"


@each_kind
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", ["out", "link"])
def test_force_replaces_its_own_kind(tmp_path, monkeypatch, kind, exchange, name):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    write(tmp_path / "out", "ours, old", kind)
    (tmp_path / "link").symlink_to("out")
    if kind == "folder":
        (tmp_path / "out" / "left").touch()
    write(tmp_path / name, "ours, new", kind, force=True)
    assert entries(tmp_path) == ["link", "out"] and (tmp_path / "link").is_symlink()
    assert content(tmp_path / "out").read_text() == "ours, new"
    assert kind == "file" or entries(tmp_path / "out") == ["ours"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders in one step")
def test_there_is_a_folder_at_every_moment(tmp_path, monkeypatch):
    """Two renames would leave a moment without one, in which a reader or a kill may come."""
    target, replace = tmp_path / "out", os.replace

    def watched(*names):
        replace(*names)
        assert (target / "ours").exists()

    write(target, "ours, old")
    monkeypatch.setattr(os, "replace", watched)
    write(target, force=True)
    assert (target / "ours").read_text() == "ours"


def make_foreign(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").touch()


@pytest.mark.parametrize(
    ("kind", "make", "force", "complaint"),
    [
        ("folder", write, False, "out exists; pass --force"),
        ("folder", Path.touch, True, "out exists and is a file"),
        ("folder", make_foreign, True, "holds something else"),
        ("file", lambda target: write(target, kind="file"), False, "out exists; pass --force"),
        ("file", Path.touch, True, "out exists and is something else"),
        ("file", Path.mkdir, True, "out exists and is a folder"),
    ],
)
def test_refused_before_any_work(tmp_path, kind, make, force, complaint):
    make(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(RequestError, match=complaint):
        KINDS[kind][1](tmp_path / "out", force=force, replaceable=is_ours)
    with pytest.raises(RequestError, match=complaint):
        write(tmp_path / "out", kind=kind, force=force)
    assert tree(tmp_path) == before


def test_the_current_folder_and_a_mount_point_are_refused(tmp_path, monkeypatch):
    inside = tmp_path / "out" / "inside"
    inside.mkdir(parents=True)
    (inside / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(inside)
    for target in (".", "../..", "link", "/"):
        with pytest.raises(RequestError, match="it holds the current folder"):
            write(Path(target), force=True)
    assert entries(tmp_path) == ["out"] and entries(inside) == ["link"]
    monkeypatch.setattr(os.path, "ismount", lambda path: path == inside / "disk")
    with pytest.raises(RequestError, match="disk: a mount point"):
        write(inside / "disk", force=True)


@pytest.fixture
def unprivileged():
    """A folder of a user to whom permissions apply, who runs the test."""
    if os.name != "posix":
        pytest.skip("elsewhere permissions work otherwise")
    with tempfile.TemporaryDirectory() as folder:
        user = os.geteuid()
        if user == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield Path(folder)
        os.seteuid(user)


def test_force_replaces_what_is_read_only(unprivileged, capsys):
    target = unprivileged / "out"
    write(target, "ours, old")
    (target / "below").mkdir()
    (target / "below" / "file").touch(0o444)
    for folder in (target / "below", target):
        folder.chmod(0o555)
    write(target, force=True)
    assert entries(unprivileged) == ["out"] and (target / "ours").read_text() == "ours"
    assert capsys.readouterr().err == ""


def test_parent_must_be_a_folder_that_can_be_written(unprivileged):
    (unprivileged / "file").touch()
    for below in ("missing/out", "file/out"):
        with pytest.raises(RequestError, match="there is no folder"):
            write(unprivileged / below)
    assert entries(unprivileged) == ["file"]
    unprivileged.chmod(0o555)
    with pytest.raises(RequestError, match=r"cannot write .*out: Permission denied"):
        write(unprivileged / "out")


@each_kind
def test_a_target_that_appears_meanwhile_is_kept(tmp_path, kind):
    with (
        pytest.raises(RequestError, match=r"out exists and (holds|is) something else"),
        replacing(tmp_path / "out", kind, force=True) as partial,
    ):
        content(partial).write_text("ours")
        make_foreign(tmp_path / "out") if kind == "folder" else (tmp_path / "out").touch()
    assert entries(tmp_path) == ["out"] and not is_ours(tmp_path / "out")


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
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(target), kind], cwd=ROOT, **pipes)
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
    """A neighbour of a similar name is left alone, and so are strange names."""
    target, strange = tmp_path / "out.partial-01234567", "ünï [b]*?"
    with start_writer(target) as writer:
        with pytest.raises(RequestError, match=r"another run is writing .*out"):
            write(target)
        write(tmp_path / "out")
        write(tmp_path / strange)
        write(tmp_path / strange, force=True)
        writer.communicate(input="")
    assert writer.returncode == 0
    assert entries(tmp_path) == ["out", target.name, strange]
    assert content(target).read_text() == "ours, whole"


def test_a_full_disk_is_one_line_and_other_errors_pass(tmp_path):
    with pytest.raises(RequestError, match="no space left"), replacing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out"):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    assert entries(tmp_path) == []
    targets.require_free_disk(tmp_path, 1)
    with pytest.raises(RequestError, match=r"not enough space .* needed, .* free"):
        targets.require_free_disk(tmp_path / "not" / "there", 1 << 60)
    for number, remedy in ((errno.ENOSPC, "free some space"), (errno.EROFS, "another folder")):
        expected = pytest.raises(RequestError, match=f"cannot write out: .*{remedy}")
        with expected, report_os_errors("out", "write"):
            raise OSError(number, os.strerror(number))
