"""Builds a patched `llama-cpp-python` wheel, and llama.cpp's own tools, with one CMake build.

CMake builds llama.cpp in a folder that is kept, so that a change of the port costs seconds. The
wheel then includes the built libraries (the bindings' option `LLAMA_BUILD=OFF`): the bindings' own
build would also compile code that only the tools use, and could not share its objects with them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from rgexport import progress
from rgexport.errors import RequestError
from rgexport.files.targets import replace_folder, require_free_disk
from rgexport.kernels.llama_cpp import port, sources

TOOLS = tuple(
    f"llama-{name}" for name in ("quantize", "perplexity", "bench", "imatrix", "server", "cli")
)
_TOOLS_FOLDER = "bin"
_BUILD_REQUIREMENTS = "scikit-build-core>=0.9.2,<2", "cmake>=3.24,<5", "ninja"
_DISK_BYTES = 1_000_000_000
_LIBRARIES = "*llama.*", "*ggml*.*"
_SUFFIXES = {".so", ".dylib", ".dll", ".metallib"}
_ORIGIN = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"

_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    # Libraries find each other in their own folder: in the wheel and beside the tools.
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": _ORIGIN,
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",  # a wheel holds no links, only copies
    "LLAMA_BUILD_COMMIT": port.COMMIT[:7],
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # it would be downloaded
}
"""Options of llama.cpp's build; all others keep llama.cpp's defaults, such as `GGML_NATIVE`."""

_WHEEL_OPTIONS = (
    *("-C", "cmake.define.LLAMA_BUILD=OFF"),
    *("-C", "sdist.include=llama_cpp/lib/*"),  # .gitignore would exclude it
)

_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
"""The begin of a line by ninja: the number of finished steps, and of all."""
_ERROR = re.compile(r"\berror[: ].*(?:(?<=:)\s+\S.*)?", re.IGNORECASE)
"""An error of a compiler, CMake or pip. CMake writes the place first, then the reason."""
_ERROR_LENGTH = 200


def build(folder: Path, *, tools: bool = False, install: bool = True) -> str:
    """Builds the patched wheel in `folder`, and installs it in this environment.

    The environment variable `CMAKE_ARGS` adds options, as it does for `llama-cpp-python`:
    `-DGGML_CUDA=on`. The next build in the same `folder` is faster.

    Returns:
        The products and the next command, as text for the user.

    Raises:
        RequestError: a step failed, with a hint at the log; there is no pip; or another build runs
            in `folder`.
    """
    if find_spec("pip") is None:
        raise RequestError("this needs pip, which is not in this environment: python -m ensurepip")
    folder.mkdir(parents=True, exist_ok=True)
    require_free_disk(folder, _DISK_BYTES)
    build = _Build(Path(os.path.realpath(folder)))
    try:
        with FileLock(build.folder / ".lock", timeout=0):
            wheel = build.run(tools=tools, install=install)
    except Timeout:
        raise RequestError(f"another build is running in {folder}; wait for it") from None
    path = folder / wheel
    text = f"{folder / _TOOLS_FOLDER} holds {', '.join(TOOLS)}.\n" if tools else ""
    if install:
        return f"{text}{path} is installed. Use it: rgexport generate FILE.gguf -p PROMPT"
    return f"{text}{path} is complete. Install it: pip install {shlex.quote(str(path))}"


class _Build:
    """The steps of a build in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = folder / "env"
        self.tree = folder / f"src-{port.RELEASE}"
        self.objects = folder / f"build-{port.RELEASE}"
        self.commands = _Commands(folder / "build.log", self._variables())

    def _variables(self) -> dict[str, str]:
        scripts = self.environment / ("Scripts" if os.name == "nt" else "bin")
        path = os.pathsep.join([str(scripts), os.environ.get("PATH", os.defpath)])
        # llama.cpp asks git for its commit, and would get that of a repository around `folder`.
        return os.environ | {"PATH": path, "GIT_CEILING_DIRECTORIES": str(self.folder)}

    def run(self, *, tools: bool, install: bool) -> str:
        """Runs all steps; returns the wheel's name."""
        self._make_environment()
        archive = sources.fetch(self.folder, self._pip_inside)
        sources.unpack(archive, self.tree)
        sources.apply_port(archive, self.tree)
        self._configure()
        self._compile("Building llama.cpp", ["llama"])
        wheel = self._make_wheel()
        if install:
            self._install(wheel)
        if tools:
            self._compile("Building llama.cpp's tools", TOOLS)
            self._gather_tools()
        return wheel.name

    def _pip(self, *arguments: str) -> None:
        self.commands.run([sys.executable, "-m", "pip", *arguments], "pip")

    def _pip_inside(self, *arguments: str) -> None:
        """Runs this environment's pip, with the user's settings, on the build's environment."""
        self._pip("--python", str(self.environment), *arguments)

    def _make_environment(self) -> None:
        """Makes a virtual environment for the build's own tools, as pip does for each wheel.

        It is kept, because CMake compiles everything again if its own path changes.
        """
        complete = self.environment / ".complete"
        contents = "\n".join([str(self.environment), sys.version, *_BUILD_REQUIREMENTS])
        if complete.is_file() and complete.read_text("utf-8") == contents:
            return
        venv.create(self.environment, clear=True, symlinks=os.name != "nt", with_pip=False)
        self._pip_inside("install", "-q", *_BUILD_REQUIREMENTS)
        complete.write_text(contents, "utf-8")

    def _configure(self) -> None:
        options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
        user_options = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        folders = ["-G", "Ninja", "-S", str(self.tree / sources.LLAMA_CPP), "-B", str(self.objects)]
        # `--fresh` drops the options of an earlier build, and keeps compiled objects.
        self.commands.run(["cmake", "--fresh", *folders, *options, *user_options], "cmake")

    def _compile(self, label: str, targets: Sequence[str]) -> None:
        command = ["cmake", "--build", str(self.objects), "--target", *targets]
        self.commands.run(command, "the compiler", label)

    def _make_wheel(self) -> Path:
        libraries = self.tree / "llama_cpp" / "lib"
        shutil.rmtree(libraries, ignore_errors=True)
        libraries.mkdir()
        for library in self._built(_LIBRARIES):
            shutil.copy2(library, libraries)
        with TemporaryDirectory(dir=self.folder, prefix=".wheel-") as name:
            options = "--no-deps", "--no-build-isolation", *_WHEEL_OPTIONS
            self._pip_inside("wheel", *options, "-w", name, str(self.tree))
            (wheel,) = Path(name).glob("*.whl")
            for earlier in self.folder.glob(f"llama_cpp_python-{port.RELEASE}+rgexport.*.whl"):
                earlier.unlink()
            return wheel.replace(self.folder / wheel.name)

    def _built(self, patterns: Sequence[str]) -> list[Path]:
        binaries = self.objects / "bin"
        paths = {path for pattern in patterns for path in binaries.glob(pattern)}
        return sorted(path for path in paths if path.suffix in _SUFFIXES)

    def _install(self, wheel: Path) -> None:
        """Replaces an installed llama.cpp, adds its dependencies, and loads it once as a test."""
        self._pip("install", "-q", "--no-deps", "--force-reinstall", str(wheel))
        self._pip("install", "-q", str(wheel))
        trial = [sys.executable, "-P", "-c", "import llama_cpp"]
        self.commands.run(trial, "loading the new library")

    def _gather_tools(self) -> None:
        binaries, target = self.objects / "bin", self.folder / _TOOLS_FOLDER
        ending = ".exe" if os.name == "nt" else ""
        programs = [binaries / f"{name}{ending}" for name in TOOLS]
        with replace_folder(target, force=True, replaceable=_holds_tools) as partial:
            for path in [*programs, *self._built(["*"])]:
                shutil.copy2(path, partial)


def _holds_tools(folder: Path) -> bool:
    return any(folder.glob(f"{TOOLS[0]}*"))


class _Commands:
    """Runs commands one after the other, with their output in one log."""

    def __init__(self, log: Path, variables: Mapping[str, str]) -> None:
        self._log, self._variables = log, dict(variables)
        log.write_text("", "utf-8")

    def run(self, command: Sequence[str], who: str, label: str | None = None) -> None:
        """Runs a command to its end.

        Args:
            command: the program and its arguments.
            who: its name in errors.
            label: a title for the progress of a build by ninja.

        Raises:
            RequestError: it failed or does not exist; with its first error, and the log.
        """
        program = shutil.which(command[0], path=self._variables.get("PATH"))
        if program is None:
            raise RequestError(f"{command[0]} is not installed; install it and run this again")
        line = shlex.join([program, *command[1:]])
        progress.detail(f"$ {line}")
        with self._log.open("a", 1, encoding="utf-8", errors="replace") as log:
            print("$", line, file=log)
            start = log.tell()
            code = self._logged([program, *command[1:]], log.write, label)
        if code:
            output = self._log.read_bytes()[start:].decode("utf-8", "replace")
            match = _ERROR.search(output)
            error = f": {' '.join(match[0].split())}" if match else ""
            raise RequestError(
                f"{who} failed{error[:_ERROR_LENGTH]} (its output is in {self._log})"
            )

    def _logged(self, command: list[str], write: Callable[[str], object], label: str | None) -> int:
        """Passes a command's output to `write`, and shows its progress; returns its exit code."""
        with ExitStack() as stack:
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=self._variables,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    encoding="utf-8",
                    errors="replace",
                )
            )
            assert process.stdout is not None
            advance, done = None, 0
            for line in process.stdout:
                write(line)
                if label and (step := _STEP.match(line)):
                    if advance is None:
                        advance = stack.enter_context(progress.task(label, int(step[2]), "steps"))
                    advance(int(step[1]) - done)
                    done = int(step[1])
        return process.returncode
