"""Builds a patched `llama-cpp-python` wheel, and llama.cpp's own tools, with one CMake build.

The build's folder is kept, so that a change of the port costs seconds. The wheel includes the built
libraries (the bindings' option `LLAMA_BUILD=OFF`): the bindings' own build would also compile code
that only the tools use.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from rgexport import progress
from rgexport.errors import RequestError
from rgexport.files.hashing import hash_file
from rgexport.files.targets import replace_folder, require_free_disk
from rgexport.kernels.llama_cpp import port

ROOT = f"llama_cpp_python-{port.RELEASE}"
ARCHIVE = f"{ROOT}.tar.gz"
LLAMA_CPP = "vendor/llama.cpp"
_VERSION_FILE = "llama_cpp/__init__.py"

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
    **dict.fromkeys(("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP"), "OFF"),
    **dict.fromkeys(("LLAMA_OPENSSL", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI"), "OFF"),
}
"""Options of llama.cpp's build; all others keep llama.cpp's defaults, such as `GGML_NATIVE`."""

# The second, because .gitignore would exclude it.
_WHEEL_OPTIONS = "-C", "cmake.define.LLAMA_BUILD=OFF", "-C", "sdist.include=llama_cpp/lib/*"

_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
"""The begin of a line by ninja: the number of finished steps, and of all."""
_ERROR = re.compile(r"\berror[: ].*(?:(?<=:)\s+\S.*)?", re.IGNORECASE)
"""An error of a compiler, CMake or pip. CMake writes the place first, then the reason."""
_ERROR_LENGTH = 200


def build(folder: Path, *, tools: bool = False, install: bool = True) -> str:
    """Builds the patched wheel in `folder`, and installs it; `CMAKE_ARGS` adds options.

    Returns the products and the next command, as text for the user. Raises RequestError if a step
    failed, there is no pip, or another build runs in `folder`.
    """
    if find_spec("pip") is None:
        raise RequestError("this needs pip, which is not in this environment: python -m ensurepip")
    folder.mkdir(parents=True, exist_ok=True)
    require_free_disk(folder, _DISK_BYTES)
    try:
        with FileLock(folder / ".lock", timeout=0):
            wheel = _Build(Path(os.path.realpath(folder))).run(tools=tools, install=install)
    except Timeout:
        raise RequestError(f"another build is running in {folder}; wait for it") from None
    path = folder / wheel
    text = f"{folder / _TOOLS_FOLDER} holds {', '.join(TOOLS)}.\n" if tools else ""
    if install:
        return f"{text}{path} is installed. Use it: rgexport generate FILE.gguf -p PROMPT"
    return f"{text}{path} is complete. Install it: pip install {shlex.quote(str(path))}"


class _Build:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = folder / "env"
        self.tree = folder / f"src-{port.RELEASE}"
        self.objects = folder / f"build-{port.RELEASE}"
        scripts = self.environment / ("Scripts" if os.name == "nt" else "bin")
        path = os.pathsep.join([str(scripts), os.environ.get("PATH", os.defpath)])
        # llama.cpp asks git for its commit, and would get that of a repository around `folder`.
        self.variables = os.environ | {"PATH": path, "GIT_CEILING_DIRECTORIES": str(folder)}
        self.log = folder / "build.log"
        self.log.write_text("", "utf-8")

    def run(self, *, tools: bool, install: bool) -> str:
        self._make_environment()
        archive = fetch(self.folder, self._pip_inside)
        _unpack(archive, self.tree)
        _apply_port(archive, self.tree)
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
        self._command([sys.executable, "-m", "pip", *arguments], "pip")

    def _pip_inside(self, *arguments: str) -> None:
        """Runs this environment's pip, with the user's settings, on the build's environment."""
        self._pip("--python", str(self.environment), *arguments)

    def _make_environment(self) -> None:
        """Makes the build's own environment, which stays: CMake depends on its own path."""
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
        folders = ["-G", "Ninja", "-S", str(self.tree / LLAMA_CPP), "-B", str(self.objects)]
        # `--fresh` drops the options of an earlier build, and keeps compiled objects.
        self._command(["cmake", "--fresh", *folders, *options, *user_options], "cmake")

    def _compile(self, label: str, targets: Sequence[str]) -> None:
        command = ["cmake", "--build", str(self.objects), "--target", *targets]
        self._command(command, "the compiler", label)

    def _make_wheel(self) -> Path:
        libraries = self.tree / "llama_cpp" / "lib"
        shutil.rmtree(libraries, ignore_errors=True)
        libraries.mkdir()
        for library in self._built(*_LIBRARIES):
            shutil.copy2(library, libraries)
        with TemporaryDirectory(dir=self.folder, prefix=".wheel-") as name:
            options = "--no-deps", "--no-build-isolation", *_WHEEL_OPTIONS
            self._pip_inside("wheel", *options, "-w", name, str(self.tree))
            (wheel,) = Path(name).glob("*.whl")
            for earlier in self.folder.glob(f"llama_cpp_python-{port.RELEASE}+rgexport.*.whl"):
                earlier.unlink()
            return wheel.replace(self.folder / wheel.name)

    def _built(self, *patterns: str) -> list[Path]:
        paths = {path for pattern in patterns for path in (self.objects / "bin").glob(pattern)}
        return sorted(path for path in paths if path.suffix in _SUFFIXES)

    def _install(self, wheel: Path) -> None:
        self._pip("install", "-q", "--no-deps", "--force-reinstall", str(wheel))
        self._pip("install", "-q", str(wheel))
        program = [sys.executable, "-P", "-c", "import llama_cpp"]
        self._command(program, "loading the new library")

    def _gather_tools(self) -> None:
        target, ending = self.folder / _TOOLS_FOLDER, ".exe" if os.name == "nt" else ""
        programs = [self.objects / "bin" / f"{name}{ending}" for name in TOOLS]

        def holds_tools(folder: Path) -> bool:
            return any(folder.glob(f"{TOOLS[0]}*"))

        with replace_folder(target, force=True, replaceable=holds_tools) as partial:
            for path in [*programs, *self._built("*")]:
                shutil.copy2(path, partial)

    def _command(self, command: Sequence[str], who: str, label: str | None = None) -> None:
        """Runs a command; an error names `who` failed, and ninja's progress is titled `label`."""
        program = shutil.which(command[0], path=self.variables.get("PATH"))
        if program is None:
            raise RequestError(f"{command[0]} is not installed; install it and run this again")
        line = shlex.join([program, *command[1:]])
        progress.detail(f"$ {line}")
        with ExitStack() as stack:
            log = stack.enter_context(self.log.open("a", 1, encoding="utf-8", errors="replace"))
            print("$", line, file=log)
            start = log.tell()
            process = subprocess.Popen(
                [program, *command[1:]],
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
            stack.enter_context(process)
            assert process.stdout is not None
            advance, done = None, 0
            for line in process.stdout:
                log.write(line)
                if label and (step := _STEP.match(line)):
                    if advance is None:
                        advance = stack.enter_context(progress.task(label, int(step[2]), "steps"))
                    advance(int(step[1]) - done)
                    done = int(step[1])
        if process.returncode:
            output = self.log.read_bytes()[start:].decode("utf-8", "replace")
            match = _ERROR.search(output)
            error = f": {' '.join(match[0].split())}" if match else ""
            raise RequestError(f"{who} failed{error[:_ERROR_LENGTH]} (its output is in {self.log})")


def fetch(folder: Path, pip: Callable[..., None]) -> Path:
    """Returns the release's archive in `folder`; pip downloads it from the user's index."""
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


def _unpack(archive: Path, tree: Path) -> None:
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


def _apply_port(archive: Path, tree: Path) -> None:
    """Writes those patched files into `tree` that change, so that only they are compiled."""
    originals = read_files(archive, [*port.registration(), _VERSION_FILE])
    texts = {}
    for path, hunks in port.registration().items():
        patched = port.apply_hunks(hunks, originals[path])
        assert patched is not None, f"the patch of {path} does not fit the pinned release"
        texts[f"{LLAMA_CPP}/{path}"] = patched
    texts[f"{LLAMA_CPP}/{port.MODEL_FILE}"] = port.model_source()
    texts[_VERSION_FILE], count = re.subn(
        r'^__version__ = ".*"$',
        f'__version__ = "{port.port_version()}"',
        originals[_VERSION_FILE],
        flags=re.MULTILINE,
    )
    assert count == 1, f"{_VERSION_FILE} holds {count} versions"
    for path, text in texts.items():
        file, content = tree / path, text.encode()
        if not file.is_file() or file.read_bytes() != content:
            file.write_bytes(content)


def read_files(archive: Path, paths: Iterable[str]) -> dict[str, str]:
    names = {
        f"{ROOT}/{path if path == _VERSION_FILE else f'{LLAMA_CPP}/{path}'}": path for path in paths
    }
    texts: dict[str, str] = {}
    with tarfile.open(archive) as source:
        for member in source:
            if member.name in names and (file := source.extractfile(member)):
                texts[names[member.name]] = file.read().decode("utf-8")
    return texts
