"""Builds the chat page with npm into `page.zip`: `make page`, and the build of a wheel.

It imports only the standard library, because the build hook loads this file before anything is
installed.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

SOURCES = Path(__file__).parents[2] / "page"
LIBRARY = Path(__file__).parents[1] / "npm"
"""The npm package that the page includes."""
BUILT = Path(__file__).with_name("page.zip")
_INSTALL = "ci --ignore-scripts --no-audit --no-fund".split()
"""Installs exactly what `package-lock.json` lists, so that each build has the same bytes."""
_SHOWN_LINES = 20
_UNIX = 3
"""The system that an archive names as its maker, whichever system packs it."""


class BuildFailed(Exception):
    """The page cannot be built; with the reason."""


def build(target: Path = BUILT, sources: Path = SOURCES) -> Path:
    """Installs what the page is made of, builds it, and packs it into `target`.

    Raises:
        BuildFailed: npm is missing, or fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise BuildFailed("Node and npm are not installed")
    for arguments in (_INSTALL, ["run", "build"]):
        done = subprocess.run([npm, *arguments], cwd=sources, capture_output=True, text=True)
        if done.returncode:
            raise BuildFailed(f"npm {arguments[0]} failed:\n{_reason(done.stdout + done.stderr)}")
    _pack(sources / "dist", target)
    return target


def _reason(output: str) -> str:
    """Returns the lines from the first error on, or the last lines if none is called an error."""
    lines = output.strip().splitlines()
    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), -_SHOWN_LINES)
    return "\n".join(lines[first:][:_SHOWN_LINES])


def is_current() -> bool:
    """Whether the page is built, and its sources have not changed since."""
    if not BUILT.is_file():
        return False
    folders = SOURCES, SOURCES / "src", SOURCES / "public", LIBRARY
    sources = [path for folder in folders for path in folder.glob("*.*")]
    return all(path.stat().st_mtime <= BUILT.stat().st_mtime for path in sources)


def _pack(folder: Path, target: Path) -> None:
    """Writes an archive that depends only on the names and bytes of the files."""
    new = target.with_suffix(".new")
    with ZipFile(new, "w") as packed:
        files = (path for path in folder.rglob("*") if path.is_file())
        for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
            entry = ZipInfo(name)
            entry.create_system = _UNIX
            packed.writestr(entry, path.read_bytes(), ZIP_DEFLATED, compresslevel=9)
    new.replace(target)


if __name__ == "__main__":
    try:
        build()
    except BuildFailed as failed:
        sys.exit(str(failed))
