"""Builds the chat page with npm into `page.zip`: `make page`, and the build of a wheel.

Imports the standard library and modules that import nothing else.
"""

import shutil
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from rgexport.files.atomic import replacing
from rgexport.kernels.build import BuildFailed, run

SOURCES = Path(__file__).parents[2] / "page"
LIBRARY = Path(__file__).parents[1] / "npm"
BUILT = Path(__file__).with_name("page.zip")
_INSTALL = "ci --ignore-scripts --no-audit --no-fund".split()
_UNIX = 3


def build(target: Path = BUILT, sources: Path = SOURCES) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise BuildFailed("Node and npm are not installed")
    run(npm, *_INSTALL, folder=sources)
    run(npm, "run", "build", folder=sources)
    _pack(sources / "dist", target)
    return target


def is_current() -> bool:
    if not BUILT.is_file():
        return False
    folders = SOURCES, SOURCES / "src", SOURCES / "public", LIBRARY
    sources = [path for folder in folders for path in folder.glob("*.*")]
    return all(path.stat().st_mtime <= BUILT.stat().st_mtime for path in sources)


def _pack(folder: Path, target: Path) -> None:
    """Writes an archive that depends only on the names and bytes of the files."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    with replacing(target) as new, ZipFile(new, "w") as archive:
        for name in sorted(name for name, path in files.items() if path.is_file()):
            entry = ZipInfo(name)
            entry.create_system = _UNIX
            archive.writestr(entry, files[name].read_bytes(), ZIP_DEFLATED, compresslevel=9)


if __name__ == "__main__":
    try:
        build()
    except BuildFailed as failed:
        sys.exit(str(failed))
