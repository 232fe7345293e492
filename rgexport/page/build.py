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
BUILT = Path(__file__).with_name("page.zip")
_INSTALL = "install --ignore-scripts --no-audit --no-fund --no-package-lock".split()


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
            last = (done.stdout + done.stderr).strip().splitlines()[-20:]
            raise BuildFailed("\n".join([f"npm {arguments[0]} failed:", *last]))
    _pack(sources / "dist", target)
    return target


def is_current() -> bool:
    """Whether the page is built, and its sources have not changed since."""
    if not BUILT.is_file():
        return False
    sources = [*SOURCES.glob("*.*"), *SOURCES.glob("src/*"), *SOURCES.glob("public/*")]
    return all(path.stat().st_mtime <= BUILT.stat().st_mtime for path in sources)


def _pack(folder: Path, target: Path) -> None:
    """The same files give the same archive."""
    new = target.with_suffix(".new")
    with ZipFile(new, "w") as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = ZipInfo(path.relative_to(folder).as_posix())
                packed.writestr(name, path.read_bytes(), ZIP_DEFLATED, compresslevel=9)
    new.replace(target)


if __name__ == "__main__":
    try:
        build()
    except BuildFailed as failed:
        sys.exit(str(failed))
