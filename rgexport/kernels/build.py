"""Builds the native libraries with CMake: when the package is installed, and by `make native`.

Imports the standard library alone, because the build hook uses it before anything is installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from rgexport.files.atomic import TargetInUse, replacing

PROJECTS = tuple(Path(__file__).parent / name for name in ("onnx", "rounding"))
"""Folders with a `CMakeLists.txt`; the library of each is built into its folder."""
NOT_BUILT = "not-built.txt"
"""The file in a project's folder that says why an installation has no library."""
_SUFFIXES = {".so", ".dylib", ".dll"}
_SHOWN_LINES = 20


class BuildFailed(Exception):
    """A library or the page cannot be built; the message has the reason."""


def build(project: Path, target: Path, build_folder: Path | None = None, *options: str) -> Path:
    """Compiles a library and moves it into a folder.

    Args:
        project: the folder of its sources, such as one of `PROJECTS`.
        target: the folder for the library.
        build_folder: for objects, which make a second build faster; temporary by default.
        options: for CMake, such as `-DSANITIZE=ON`.

    Returns:
        The library.

    Raises:
        BuildFailed: CMake, a build program or a C++17 compiler is missing, or fails.
    """
    if build_folder is None:
        with TemporaryDirectory(prefix="rgexport-") as scratch:
            return build(project, target, Path(scratch), *options)
    cmake = program("cmake")
    if cmake is None:
        raise BuildFailed("CMake is not installed")
    configure = cmake, "-S", project, "-B", build_folder, *_generator(), *options
    try:
        run(*configure)
    except BuildFailed:  # the folder was configured with another generator or path
        shutil.rmtree(build_folder, ignore_errors=True)
        run(*configure)
    run(cmake, "--build", build_folder, "--config", "Release", "--parallel")
    built = [p for p in build_folder.rglob("librgexport_*") if p.suffix in _SUFFIXES]
    if len(built) != 1:
        raise BuildFailed(f"expected one library in {build_folder}, found {len(built)}")
    target.mkdir(parents=True, exist_ok=True)
    library = target / built[0].name
    try:
        with replacing(library) as new:
            shutil.copyfile(built[0], new)
            new.chmod(0o755)
    except TargetInUse as error:
        raise BuildFailed(f"{library} is in use: {error.strerror}") from None
    return library


def _generator() -> list[str]:
    """Returns CMake's options for Clang in Visual Studio; elsewhere for Ninja, or none for Make.

    On Windows, Ninja would take the first compiler of the path, such as a GCC whose own libraries
    users do not have. `CXX` or `CMAKE_GENERATOR` chooses another one.
    """
    if sys.platform == "win32" and not os.environ.get("CXX"):
        return [] if os.environ.get("CMAKE_GENERATOR") else ["-T", "ClangCL"]
    ninja = program("ninja")
    if ninja is not None:
        return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if program("make") is None and sys.platform != "win32":
        raise BuildFailed("neither Ninja nor Make is installed")
    return []


def program(name: str) -> str | None:
    """Returns a program of this environment or the system that can run.

    In pip's isolated builds, scripts of the outer environment exist but are broken.
    """
    folders = (str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep))
    for folder in filter(None, folders):
        if path := shutil.which(name, path=folder):
            with suppress(BuildFailed):
                run(path, "--version")
                return path
    return None


def run(*command: object, folder: Path | None = None) -> None:
    """Runs a program.

    Raises:
        BuildFailed: it cannot be run, or fails; with the lines from its first error on, or else
            with its last lines.
    """
    arguments = [str(argument) for argument in command]
    try:
        done = subprocess.run(
            arguments, cwd=folder, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildFailed(f"{arguments[0]} cannot be run: {error}") from None
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        first = next((i for i, line in enumerate(lines) if "error" in line.lower()), -_SHOWN_LINES)
        reason = "\n".join(lines[first:][:_SHOWN_LINES])
        raise BuildFailed(f"{' '.join(arguments)} failed:\n{reason}")


def main() -> None:
    """`python -m rgexport.kernels.build`."""
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
