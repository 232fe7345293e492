"""Compiles the native libraries into wheels and editable installs, and the chat page into wheels.

What cannot be built is left out, each part for itself, with a warning and a file in its place that
says why. A wheel with any library is for this platform; one without is for all.

Compiling takes minutes: the kernels have a variant for each instruction set. So a library is kept
in the user's cache folder, and later installations of the same sources take it from there.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from platformdirs import user_cache_dir

sys.path.insert(0, str(Path(__file__).parent))
from rgexport.kernels import build as native
from rgexport.web_page import build as web_page

WITHOUT = {
    "onnx": "models run on ONNX Runtime's own kernels, slower",
    "rounding": "weights are rounded to nearest, and calibrations cannot be used",
}
"""Project → what an installation without its library does."""
CMAKE, NINJA = "cmake>=3.18,<5", "ninja>=1.10,<2"
SKIP = "RGEXPORT_NO_BUILD"
"""Variable that, if set, leaves the native libraries out."""
_SETTINGS = "CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_GENERATOR", "CMAKE_TOOLCHAIN_FILE", "ARCHFLAGS"


class BuiltParts(BuildHookInterface):
    """Runs CMake and npm before a wheel is written."""

    def dependencies(self) -> list[str]:
        """What a build needs and the system lacks."""
        missing = [] if native.find_program("cmake") else [CMAKE]
        find = native.find_program
        has_runner = find("ninja") or find("make") or sys.platform == "win32"
        return missing if has_runner else [*missing, NINJA]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds in place for an editable install, else into a scratch folder."""
        root = Path(self.root)
        self._scratch = Path(mkdtemp(prefix="rgexport-"))
        products = [self._build(project, version == "editable") for project in native.PROJECTS]
        if any(path.name != native.NOT_BUILT for path in products):  # one binary is enough
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
        if version != "editable":
            for path, project in zip(products, native.PROJECTS, strict=True):
                inside = project.relative_to(root) / path.name
                build_data["force_include"][str(path)] = str(inside)
            self._add_page(build_data)

    def _build(self, project: Path, editable: bool) -> Path:
        """Returns the library of a project, or the file that says why there is none."""
        folder = project if editable else self._scratch / project.name
        folder.mkdir(exist_ok=True)
        (project / native.NOT_BUILT).unlink(missing_ok=True)
        objects = Path(self.root) / "build" / "native" / project.name if editable else None
        kept = _kept(project)
        try:
            if os.environ.get(SKIP):
                raise native.BuildFailed(f"{SKIP} was set")
            if kept.is_file():
                return native.copy(kept, folder)
            library = native.build(project, folder, objects)
        except native.BuildFailed as failed:
            self.app.display_warning(
                f"rgexport lacks the library of {project.name}: {WITHOUT[project.name]}; "
                f"`rgexport --version` says so, too: {failed}"
            )
            reason = folder / native.NOT_BUILT
            reason.write_text(f"{failed}\n", "utf-8")
            return reason
        with suppress(OSError):  # the next installation compiles again
            native.copy(library, kept.parent)
        return library

    def _add_page(self, build_data: dict[str, Any]) -> None:
        """Builds the page, unless that was done already, as in a source distribution."""
        page = web_page.BUILT
        try:
            if not web_page.is_current():
                page = web_page.build(self._scratch / page.name)
        except native.BuildFailed as failed:
            self.app.display_warning(f"rgexport is installed without its web page: {failed}")
            return
        build_data["force_include"][str(page)] = f"rgexport/web_page/{page.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the scratch folder."""
        shutil.rmtree(self._scratch)


def _kept(project: Path) -> Path:
    """Returns the path in the user's cache of the library that these sources and compiler make."""
    digest = hashlib.sha256(_platform().encode())
    for name in _SETTINGS:
        digest.update(f"{name}={os.environ.get(name)}\n".encode())
    compiler = native.find_program(os.environ.get("CXX") or "c++")
    if compiler:
        digest.update(subprocess.run([compiler, "--version"], capture_output=True).stdout)
    for folder in native.PROJECTS:  # they share headers
        for path in (folder / "CMakeLists.txt", *sorted((folder / "src").rglob("*.*"))):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    cache = Path(os.environ.get("RGEXPORT_CACHE") or user_cache_dir("rgexport"))
    name = native.library_path(project).name
    return cache / "native" / digest.hexdigest()[:16] / name


def _platform() -> str:
    """Returns the platform in a wheel's name, as pip of this interpreter accepts it."""
    name = sysconfig.get_platform()
    if name.startswith("macosx"):  # the interpreter may be for two processors, the library is not
        name = f"{name.rsplit('-', 1)[0]}-{platform.machine()}"
    return name.replace("-", "_").replace(".", "_")
