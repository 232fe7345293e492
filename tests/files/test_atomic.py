"""Folders appear complete or not at all, whatever happens meanwhile."""

import errno
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
from rgexport.files.atomic import check_target, replace_folder, require_free_disk


def is_ours(folder: Path) -> bool:
    return (folder / "ours").exists()


def write(target: Path, text: str = "new", *, force: bool = False) -> None:
    with replace_folder(target, force=force, replaceable=is_ours) as partial:
        assert partial.parent == target.parent
        (partial / "ours").write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_appears_complete(tmp_path):
    write(tmp_path / "out")
    assert entries(tmp_path) == ["out"] and entries(tmp_path / "out") == ["ours"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_nothing(tmp_path, error, existing):
    target = tmp_path / "out"
    if existing:
        write(target, "old")
    with pytest.raises(error), replace_folder(target, force=True, replaceable=is_ours) as partial:
        (partial / "ours").write_text("half")
        raise error
    assert entries(tmp_path) == (["out"] if existing else [])
    assert not existing or (target / "ours").read_text() == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_its_own_kind(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "left").touch()
    write(tmp_path / "out", force=True)
    assert entries(tmp_path) == ["out"] and entries(tmp_path / "out") == ["ours"]
    assert (tmp_path / "out" / "ours").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders in one step")
def test_there_is_a_folder_at_every_moment(tmp_path, monkeypatch):
    """Two renames would leave a moment without one, in which a reader or a kill may come."""
    target, rename, found = tmp_path / "out", os.rename, []

    def watched(*names):
        rename(*names)
        found.append((target / "ours").exists())

    write(target, "old")
    monkeypatch.setattr(os, "rename", watched)
    write(target, force=True)
    assert all(found) and (target / "ours").read_text() == "new"


def make_foreign(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").touch()


def make_link_to_foreign(target: Path) -> None:
    make_foreign(target.with_name("real"))
    target.symlink_to("real")


@pytest.mark.parametrize(
    ("make", "force", "complaint"),
    [
        (Path.mkdir, False, "out exists; pass --force"),
        (write, False, "out exists; pass --force"),
        (Path.touch, True, "out exists and is a file"),
        (make_foreign, True, "holds something else"),
        (make_link_to_foreign, True, "holds something else"),
    ],
)
def test_refused_before_any_work(tmp_path, make, force, complaint):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match=complaint):
        check_target(tmp_path / "out", force=force, replaceable=is_ours)
    with pytest.raises(RequestError, match=complaint):
        write(tmp_path / "out", force=force)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", [".", "..", "../..", "link", "/"])
def test_the_folder_one_stands_in_is_refused(tmp_path, monkeypatch, target):
    inside = tmp_path / "out" / "inside"
    inside.mkdir(parents=True)
    (inside / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(inside)
    before = sorted(tmp_path.rglob("*"))
    for refuse in (check_target, lambda *a, **o: replace_folder(*a, **o).__enter__()):
        with pytest.raises(RequestError, match="it is the current folder or holds it"):
            refuse(Path(target), force=True, replaceable=lambda _: True)
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
    write(target, "old")
    (target / "below").mkdir()
    (target / "below" / "file").touch()
    for path in (target / "below" / "file", target / "below", target):
        path.chmod(0o444 if path.is_file() else 0o555)
    write(target, force=True)
    assert entries(unprivileged) == ["out"] and (target / "ours").read_text() == "new"
    assert capsys.readouterr().err == ""


def test_what_cannot_be_removed_is_named(tmp_path, monkeypatch, capsys):
    write(tmp_path / "out", "old")
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda folder, ignore_errors: None)
    write(tmp_path / "out", force=True)
    left = next(tmp_path.glob(".out.partial-*"))
    assert capsys.readouterr().err == f"Warning: {left} cannot be removed; remove it yourself\n"


def test_force_takes_an_empty_folder_and_follows_a_link(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and entries(tmp_path / "empty") == ["ours"]


@pytest.mark.parametrize("below", ["missing/out", "file/out"])
def test_parent_must_be_a_folder(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="there is no folder"):
        write(tmp_path / below)
    assert entries(tmp_path) == ["file"]


def test_target_that_appears_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(RequestError, match="out exists"),
        replace_folder(tmp_path / "out", force=False, replaceable=is_ours),
    ):
        make_foreign(tmp_path / "out")
    assert entries(tmp_path) == ["out"] and entries(tmp_path / "out") == ["thesis.tex"]


def test_strange_names(tmp_path):
    for name in ["a[b]*?", ".hidden", "ünï cödé", "x.partial-00000000"]:
        write(tmp_path / name)
        write(tmp_path / name, force=True)
    assert len(entries(tmp_path)) == 4


WRITER = """
    import sys, time
    from pathlib import Path
    from rgexport.files.atomic import replace_folder
    with replace_folder(Path(sys.argv[1]), force=True, replaceable=lambda _: True) as partial:
        (partial / "ours").write_text("half")
        print("writing", flush=True)
        sys.stdin.read()
"""


def start_writer(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("existing", [False, True])
def test_kill_leaves_the_target_and_the_next_run_cleans_up(tmp_path, existing):
    target = tmp_path / "out"
    if existing:
        write(target, "old")
    with start_writer(target) as writer:
        writer.send_signal(signal.SIGKILL)
    assert target.exists() == existing and len(entries(tmp_path)) == 2 + existing
    assert not existing or (target / "ours").read_text() == "old"
    write(target, force=existing)
    assert entries(tmp_path) == ["out"] and (target / "ours").read_text() == "new"


def test_two_writers_of_one_target(tmp_path):
    target = tmp_path / "out"
    with start_writer(target) as writer:
        with pytest.raises(RequestError, match="another run is writing .*out"):
            write(target)
        write(tmp_path / "other")
        writer.communicate(input="")
    assert writer.returncode == 0
    assert entries(tmp_path) == ["other", "out"] and (target / "ours").read_text() == "half"


def test_neighbour_with_a_similar_name_is_not_swept(tmp_path):
    with start_writer(tmp_path / "out.partial-01234567") as writer:
        write(tmp_path / "out")
        writer.communicate(input="")
    assert entries(tmp_path) == ["out", "out.partial-01234567"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_one_line(tmp_path, code):
    with (
        pytest.raises(RequestError, match="no space left while writing .*out"),
        replace_folder(tmp_path / "out", force=False, replaceable=is_ours),
    ):
        raise OSError(code, os.strerror(code))
    assert entries(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root on Linux can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_really_full_disk(tiny_disk):
    with (
        pytest.raises(RequestError, match="no space left while writing"),
        replace_folder(tiny_disk / "out", force=False, replaceable=is_ours) as partial,
    ):
        (partial / "big").write_bytes(bytes(1 << 20))
    assert entries(tiny_disk) == []
    with pytest.raises(RequestError, match="not enough space .* 1.00 MB needed, 65.5 kB free"):
        require_free_disk(tiny_disk / "not" / "there", 10**6)


def test_read_only_parent(tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(RequestError, match="cannot write .*out: Read-only file system"):
        write(tiny_disk / "out")


def test_other_system_errors_pass(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="elsewhere"),
        replace_folder(tmp_path / "out", force=False, replaceable=is_ours),
    ):
        open("/elsewhere")


def test_enough_space(tmp_path):
    require_free_disk(tmp_path, 1)
