"""Compiles the native libraries into wheels and editable installs, and the chat page into wheels.

What cannot be built is left out, each part for itself, with a warning and a file in its place that
says why. A wheel with any library is for this platform; one without is for all.
"""

import importlib.util
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILDER = Path("rgexport/kernels/build.py")
PAGE_BUILDER = Path("rgexport/web_page/build.py")
WITHOUT = {
    "onnx": "models run on ONNX Runtime's own kernels, slower",
    "rounding": "weights are rounded to nearest, and calibrations cannot be used",
}
"""Project → what an installation without its library does."""
CMAKE, NINJA = "cmake>=3.18,<5", "ninja>=1.10,<2"


class BuiltParts(BuildHookInterface):
    """Runs CMake and npm before a wheel is written."""

    def dependencies(self) -> list[str]:
        """What a build needs and the system lacks."""
        program = _load(Path(self.root) / BUILDER).program
        missing = [] if program("cmake") else [CMAKE]
        has_runner = program("ninja") or program("make") or sys.platform == "win32"
        return missing if has_runner else [*missing, NINJA]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds in place for an editable install, else into a scratch folder."""
        root = Path(self.root)
        builder = _load(root / BUILDER)
        self._scratch = Path(mkdtemp(prefix="rgexport-"))
        made = [
            self._build(builder, project, version == "editable") for project in builder.PROJECTS
        ]
        if any(path.name != builder.NOT_BUILT for path in made):  # one binary is enough
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
        if version != "editable":
            for path, project in zip(made, builder.PROJECTS, strict=True):
                inside = project.relative_to(root) / path.name
                build_data["force_include"][str(path)] = str(inside)
            self._add_page(build_data)

    def _build(self, builder: ModuleType, project: Path, editable: bool) -> Path:
        """The library of a project, or the file that says why there is none."""
        folder = project if editable else self._scratch / project.name
        folder.mkdir(exist_ok=True)
        (project / builder.NOT_BUILT).unlink(missing_ok=True)
        objects = Path(self.root) / "build" / "native" / project.name if editable else None
        try:
            return builder.build(project, folder, objects)
        except builder.BuildFailed as failed:
            self.app.display_warning(
                f"rgexport lacks the library of {project.name}: {WITHOUT[project.name]}; "
                f"`rgexport --version` says so, too: {failed}"
            )
            made = folder / builder.NOT_BUILT
            made.write_text(f"{failed}\n", "utf-8")
            return made

    def _add_page(self, build_data: dict[str, Any]) -> None:
        """Builds the page, unless that was done already, as in a source distribution."""
        builder = _load(Path(self.root) / PAGE_BUILDER)
        page = builder.BUILT
        try:
            if not builder.is_current():
                page = builder.build(self._scratch / page.name)
        except builder.BuildFailed as failed:
            self.app.display_warning(f"rgexport is installed without its web page: {failed}")
            return
        build_data["force_include"][str(page)] = f"rgexport/web_page/{page.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the scratch folder."""
        shutil.rmtree(self._scratch)


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """The platform in a wheel's name, as pip of this interpreter accepts it."""
    name = sysconfig.get_platform()
    if name.startswith("macosx"):  # the interpreter may be for two processors, the library is not
        name = f"{name.rsplit('-', 1)[0]}-{platform.machine()}"
    return name.replace("-", "_").replace(".", "_")
