"""Builds the native libraries with CMake: when the package is installed, and by `make native`.

It imports only the standard library, because the build hook loads this file before anything is
installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PROJECTS = tuple(Path(__file__).parent / name for name in ("onnx", "rounding"))
"""Folders with a `CMakeLists.txt`, each of one library, which is put there."""
NOT_BUILT = "not-built.txt"
"""The file in a project's folder that says why an installation has no library."""
_SUFFIXES = {".so", ".dylib", ".dll"}
_LINES_OF_AN_ERROR = 20


class BuildFailed(Exception):
    """The library cannot be built; with the reason."""


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
        _run(*configure)
    except BuildFailed:  # the folder was configured with another generator or path
        shutil.rmtree(build_folder, ignore_errors=True)
        _run(*configure)
    _run(cmake, "--build", build_folder, "--config", "Release", "--parallel")
    built = [p for p in build_folder.rglob("librgexport_*") if p.suffix in _SUFFIXES]
    if len(built) != 1:
        raise BuildFailed(f"expected one library in {build_folder}, found {len(built)}")
    return _replace(built[0], target / built[0].name)


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
    """A program of this environment or the system that can run.

    In pip's isolated builds, scripts of the outer environment exist but are broken.
    """
    places = (str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep))
    found = (shutil.which(name, path=place) for place in places if place)
    return next((path for path in found if path and _runs(path)), None)


def _runs(path: str) -> bool:
    try:
        return subprocess.run([path, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def _run(*command: object) -> None:
    arguments = [str(argument) for argument in command]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildFailed(f"{arguments[0]} cannot be run: {error}") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise BuildFailed("\n".join((" ".join(arguments), *said[-_LINES_OF_AN_ERROR:])))


def _replace(built: Path, target: Path) -> Path:
    """Replaces a file that other processes may have loaded."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(built, new)
    new.chmod(0o755)
    try:
        os.replace(new, target)
    except OSError as error:  # Windows, where the old one is loaded
        new.unlink()
        raise BuildFailed(f"{target} is in use: {error}") from None
    return target


def main() -> None:
    """`python -m rgexport.kernels.build`."""
    parser = argparse.ArgumentParser(description="Build the native libraries in place.")
    parser.add_argument("--build-folder", type=Path, help="keep objects here for the next build")
    parser.add_argument("options", nargs="*", help="for CMake, after --")
    asked = parser.parse_args()
    for project in PROJECTS:
        objects = asked.build_folder and asked.build_folder / project.name
        try:
            print(build(project, project, objects, *asked.options))
        except BuildFailed as failed:
            sys.exit(f"The library of {project} cannot be built: {failed}")
        (project / NOT_BUILT).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
