"""The source of the pinned release: fetched by pip, checked, unpacked, and patched."""

import re
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from rgexport import progress
from rgexport.errors import RequestError
from rgexport.files.hashing import hash_file
from rgexport.files.targets import replace_folder
from rgexport.kernels.llama_cpp import port

ROOT = f"llama_cpp_python-{port.RELEASE}"
"""The folder that the archive holds."""
ARCHIVE = f"{ROOT}.tar.gz"
LLAMA_CPP = "vendor/llama.cpp"
_VERSION_FILE = "llama_cpp/__init__.py"

Pip = Callable[..., None]
"""Runs pip with these arguments."""


def fetch(folder: Path, pip: Pip) -> Path:
    """Returns the release's archive in `folder`; pip downloads it from the user's index.

    Raises:
        RequestError: pip did not find the pinned release.
    """
    archive = folder / ARCHIVE
    if archive.is_file() and hash_file(archive).sha256 == port.SHA256:
        return archive
    progress.note(f"Downloading the source of {port.DISTRIBUTION} {port.RELEASE}")
    with TemporaryDirectory(dir=folder, prefix=".download-") as name:
        requirements = Path(name) / "requirements.txt"
        pin = f"{port.DISTRIBUTION}=={port.RELEASE}"
        requirements.write_text(f"{pin} --hash=sha256:{port.SHA256}\n", "utf-8")
        options = "--require-hashes", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"
        pip("download", *options, "-r", str(requirements), "-d", name)
        download = Path(name) / ARCHIVE
        if not download.is_file():
            raise RequestError(f"pip gave no {ARCHIVE} with the SHA-256 {port.SHA256}")
        download.replace(archive)
    return archive


def unpack(archive: Path, tree: Path) -> None:
    """Unpacks the archive without its git history into `tree`, unless that exists."""
    if tree.is_dir():
        return
    with (
        replace_folder(tree, force=False, replaceable=lambda _: False) as partial,
        tarfile.open(archive) as source,
    ):
        # Python before 3.11.4 lacks the filter; the archive's hash was checked anyway.
        source.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        for member in source:
            inner = PurePosixPath(member.name).parts[1:]
            if inner and ".git" not in inner:
                source.extract(member.replace(name="/".join(inner)), partial)


def apply_port(archive: Path, tree: Path) -> None:
    """Applies the port to `tree`, and writes only the files that change.

    Each patched file is made from the archive's, so that a later port replaces an earlier one and
    only what differs between them is compiled again.
    """
    originals = read_files(archive, [*port.registration(), _VERSION_FILE])
    texts = {}
    for path, hunks in port.registration().items():
        patched = port.apply_hunks(hunks, originals[path])
        assert patched is not None, f"the patch of {path} does not fit the pinned release"
        texts[f"{LLAMA_CPP}/{path}"] = patched
    texts[f"{LLAMA_CPP}/{port.MODEL_FILE}"] = port.model_source()
    texts[_VERSION_FILE] = _with_version(originals[_VERSION_FILE])
    for path, text in texts.items():
        file, content = tree / path, text.encode()
        if not file.is_file() or file.read_bytes() != content:
            file.write_bytes(content)


def read_files(archive: Path, paths: Iterable[str]) -> dict[str, str]:
    """Reads files of llama.cpp, or the version file of the bindings, from the archive."""
    names = {
        f"{ROOT}/{path if path == _VERSION_FILE else f'{LLAMA_CPP}/{path}'}": path for path in paths
    }
    texts: dict[str, str] = {}
    with tarfile.open(archive) as source:
        for member in source:
            if member.name in names and (file := source.extractfile(member)):
                texts[names[member.name]] = file.read().decode("utf-8")
    return texts


def _with_version(text: str) -> str:
    marked, count = re.subn(
        r'^__version__ = ".*"$', f'__version__ = "{port.port_version()}"', text, flags=re.MULTILINE
    )
    assert count == 1, f"{_VERSION_FILE} holds {count} versions"
    return marked
