"""The native libraries: CMake builds them, for `pip install` and `make native`; ctypes loads them.

Imports the standard library and modules that import nothing else: dependencies come later.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rgexport.files.atomic import TargetInUse, replacing

PROJECTS = tuple(Path(__file__).parent / name for name in ("onnx", "rounding"))
NOT_BUILT = "not-built.txt"
"""File in the folder of a library that could not be built; it has the reason."""
_SUFFIXES = {".so", ".dylib", ".dll"}
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_MAX_LINES = 20

Signature = tuple[Any, Sequence[Any]]
"""Result type of a C function (None for `void`), and the types of its arguments."""


class BuildFailed(Exception):
    """A native library or the web page could not be built; the message has the reason."""


def build(project: Path, target: Path, build_folder: Path | None = None, *options: str) -> Path:
    """Compiles a library with CMake's `options`, copies it into `target`, returns its path.

    `project` is the folder of the sources, such as one of `PROJECTS`. A `build_folder` is kept, to
    make the next build faster. Raises BuildFailed: CMake, Ninja and Make, or a C++17 compiler is
    missing, one of them fails, or the library is in use.
    """
    if build_folder is None:
        with TemporaryDirectory(prefix="rgexport-") as scratch:
            return build(project, target, Path(scratch), *options)
    cmake = find_program("cmake")
    if cmake is None:
        raise BuildFailed("CMake is not installed")
    configure = cmake, "-S", project, "-B", build_folder, *_generator_options(), *options
    try:
        run(*configure)
    except BuildFailed:  # perhaps the folder was configured with another generator or path
        shutil.rmtree(build_folder, ignore_errors=True)
        run(*configure)
    run(cmake, "--build", build_folder, "--config", "Release", "--parallel")
    libraries = [p for p in build_folder.rglob("librgexport_*") if p.suffix in _SUFFIXES]
    if len(libraries) != 1:
        raise BuildFailed(f"expected one library in {build_folder}, found {len(libraries)}")
    return copy(libraries[0], target)


def copy(built: Path, folder: Path) -> Path:
    """Copies a library into a folder, and returns its path; BuildFailed if that one is in use."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / built.name
    try:
        with replacing(library) as partial:
            shutil.copyfile(built, partial)
            partial.chmod(0o755)
    except TargetInUse as error:
        raise BuildFailed(f"{library} is in use: {error.strerror}") from None
    return library


def _generator_options() -> list[str]:
    """Returns CMake's options for Ninja if it is installed, else none, which means Make.

    On Windows, Ninja would use any compiler in PATH, such as a GCC whose libraries users lack.
    """
    if sys.platform == "win32" and not os.environ.get("CXX"):
        return [] if os.environ.get("CMAKE_GENERATOR") else ["-T", "ClangCL"]
    if ninja := find_program("ninja"):
        return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if find_program("make") is None and sys.platform != "win32":
        raise BuildFailed("neither Ninja nor Make is installed")
    return []


def find_program(name: str) -> str | None:
    """Returns the path of a program that runs, from Python's environment or PATH; or None."""
    folders = (str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep))
    for folder in filter(None, folders):
        if path := shutil.which(name, path=folder):
            with suppress(BuildFailed):
                run(path, "--version")
                return path
    return None


def run(*command: object, folder: Path | None = None) -> None:
    """Runs a command; a failure has its output from the first "error" on, or the last lines."""
    arguments = [str(argument) for argument in command]
    try:
        result = subprocess.run(
            arguments, cwd=folder, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildFailed(f"{arguments[0]} cannot be run: {error}") from None
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines()
        errors = [i for i, line in enumerate(lines) if "error" in line.lower()]
        start = errors[0] if errors else -_MAX_LINES
        reason = "\n".join(lines[start:][:_MAX_LINES])
        raise BuildFailed(f"{' '.join(arguments)} failed:\n{reason}")


def library_path(project: Path) -> Path:
    return project / f"librgexport_{project.name}{_SUFFIX}"


def why_missing(project: Path) -> str:
    reason = project / NOT_BUILT
    if reason.is_file():
        return f"it could not be built when rgexport was installed; {reason} says why"
    return "it is not built; run `python -m rgexport.kernels.build`"


def load_library(path: Path, signatures: Mapping[str, Signature]) -> ctypes.CDLL | str:
    """Loads a library and declares its functions `rgexport_…`; returns a reason if it fails."""
    if not path.is_file():
        return why_missing(path.parent)
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, f"rgexport_{name}")
            function.restype, function.argtypes = result, list(arguments)
    except (OSError, AttributeError) as error:
        return f"the library cannot be loaded: {error}"
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the native libraries in place.")
    parser.add_argument("--build-folder", type=Path, help="keep objects here for the next build")
    parser.add_argument("options", nargs="*", help="for CMake, after --")
    arguments = parser.parse_args()
    for project in PROJECTS:
        objects = arguments.build_folder and arguments.build_folder / project.name
        try:
            print(build(project, project, objects, *arguments.options))
        except BuildFailed as failed:
            sys.exit(f"The library of {project} cannot be built: {failed}")
        (project / NOT_BUILT).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
