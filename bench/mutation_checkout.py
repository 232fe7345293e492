"""Copies of the sources in which mutations are made, built and tested."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from bench.mutants import Mutation
from bench.run import START

ROOT = Path(__file__).parents[1]
TIERS = {"test": ("full", "nightly"), "full": ("nightly",)}
"""Tier → the markers of tests that it leaves out, as `make test` and `make test-full` do."""
_LIMIT_SECONDS = 7200  # of a run of pytest; each test has a limit, too
PRODUCTS = "rgexport/kernels/*/librgexport_*", "rgexport/web_page/page.zip"
LLAMA = "out/llama"
_NATIVE = "-m", "rgexport.kernels.build", "--build-folder", "build/native"
_PAGE = "-m", "rgexport.web_page.build"
_RUNNING: set[subprocess.Popen[bytes]] = set()


class NotMade(Exception):
    """Raised for a mutation that does not compile, or whose line is gone."""


class Checkout:
    """A git worktree in which one mutation after the other is tested."""

    def __init__(
        self,
        folder: Path,
        revision: str,
        built: Path = ROOT,
        processors: Iterable[int] | None = None,
    ) -> None:
        """Checks out the revision; `built` has the native libraries, the page and llama.cpp.

        Its programs run on `processors`, all of them by default.
        """
        self.folder, self._built, self._python = folder, built, sys.executable
        self._processors = processors
        if (folder / ".git").is_file():  # else git would change the repository around it
            git(folder, "checkout", "-q", "--force", "--detach", revision)
            git(folder, "clean", "-fdq")
        else:
            git(built, "worktree", "add", "-f", "-q", "--detach", folder, revision)
        self._restore_products()

    def _restore_products(self) -> None:
        for pattern in PRODUCTS:
            for product in self._built.glob(pattern):
                shutil.copy2(product, self.folder / product.relative_to(self._built))
        self._link_llama(self._built / LLAMA)

    def _link_llama(self, target: Path) -> None:
        link = self.folder / LLAMA
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)

    def apply(self, mutation: Mutation) -> None:
        """Writes the mutated line, and builds what it is compiled into.

        Raises:
            NotMade: the compiler refuses it, or the line is no longer there.
        """
        path = self.folder / mutation.file
        mutated = mutation.apply(path.read_text("utf-8")) if path.is_file() else None
        if mutated is None:
            raise NotMade
        path.write_text(mutated, "utf-8")
        _forget_bytecode(path)
        for prefix, build in _BUILDS.items():
            if mutation.file.startswith(prefix) and path.suffix not in (".py", ".j2"):
                build(self)
                break

    def undo(self) -> None:
        """Restores the sources and what is built from them."""
        changed = git(self.folder, "diff", "--name-only").decode().split()
        git(self.folder, "checkout", "-q", "--", ".")
        for path in changed:
            _forget_bytecode(self.folder / path)
        self._restore_products()
        self._python = sys.executable

    def _build_llama(self) -> None:
        """Builds llama.cpp beside the worktree, and installs it in an environment there.

        That environment sees the packages of this one, but its llama.cpp comes first.
        """
        llama, environment = (Path(f"{self.folder}-{name}") for name in ("llama", "env"))
        llama.mkdir(exist_ok=True)
        for archive in (self._built / LLAMA).glob("*.tar.gz"):
            shutil.copy2(archive, llama)
        self._link_llama(llama)
        self._build("-c", START, "llama-cpp", "build", "-o", LLAMA, "--tools", "--no-install")
        venv.create(environment, clear=True, with_pip=False)
        (site,) = environment.glob("lib/python*/site-packages")
        packages = [path for path in sys.path if path.endswith("-packages")]
        (site / "outer.pth").write_text("\n".join(packages))
        (wheel,) = llama.glob("*.whl")
        self._build("-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
        self._python = str(environment / "bin" / "python")

    def selection(self, tier: str) -> list[str]:
        """Returns pytest's options for a tier, as far as the revision has its markers."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text("utf-8"))
        rows = project["tool"]["pytest"]["ini_options"]["markers"]
        known = {row.partition(":")[0] for row in rows}
        left_out = [f"not {marker}" for marker in TIERS[tier] if marker in known]
        return ["-m", " and ".join(left_out)] if left_out else []

    def test(self, *arguments: str) -> tuple[int, list[str]]:
        """Runs tests until one fails; returns pytest's exit code, and the tests that failed."""
        failed = self.folder / ".pytest_cache" / "v" / "cache" / "lastfailed"
        failed.unlink(missing_ok=True)
        code = self._run("-m", "pytest", "-x", "-q", "--tb=no", *arguments, limit=_LIMIT_SECONDS)
        return code, list(json.loads(failed.read_text())) if failed.is_file() else []

    def _build(self, *arguments: str) -> None:
        if self._run(*arguments):
            raise NotMade

    def _run(self, *arguments: str, limit: float | None = None) -> int:
        """Runs Python in the worktree; returns its exit code."""
        scripts = str(Path(sys.executable).parent)
        variables = {"PYTHONPATH": str(self.folder), "PATH": f"{scripts}:{os.environ['PATH']}"}
        with Path(f"{self.folder}.log").open("a") as log:
            print("$", *arguments, file=log, flush=True)
            process = subprocess.Popen(
                [self._python, *arguments],
                cwd=self.folder,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if self._processors:
                os.sched_setaffinity(process.pid, self._processors)
            _RUNNING.add(process)
            try:
                return process.wait(limit)
            finally:
                _RUNNING.remove(process)
                _kill(process)
                process.wait()


_BUILDS: dict[str, Callable[[Checkout], None]] = {
    "rgexport/kernels/llama_cpp/": Checkout._build_llama,
    "rgexport/kernels/": lambda checkout: checkout._build(*_NATIVE),
    "rgexport/npm/": lambda checkout: checkout._build(*_PAGE),
    "page/": lambda checkout: checkout._build(*_PAGE),
}


def _forget_bytecode(path: Path) -> None:
    """Removes compiled code that looks current if the source changed within a second."""
    for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
        cached.unlink()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it has started; compilers that Ninja runs are in other groups."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_at_once(number: int, frame: object) -> None:
    """Ends this program and what it has started, because of a signal."""
    for process in list(_RUNNING):
        _kill(process)
    os._exit(128 + number)


def git(folder: Path, *arguments: str | Path) -> bytes:
    return subprocess.check_output(["git", *arguments], cwd=folder)
