"""Measures which small faults in the sources the tests notice.

    python -m bench.mutations --list
    nice python -m bench.mutations --tier full --output before.json [--quick]
    nice python -m bench.mutations --tier test --output after.json --same-as before.json
    python -m bench.mutations --output after.json --compare before.json

Draws forty mutations with a seed (`bench.mutants`) and makes each in a git worktree below
`build/mutations`, which is kept for its compiled objects; `git worktree prune` forgets it after
`make clean`. The native libraries and the page must be built here, by `make native page llama
llama-tools`. Tests that are likely to notice a mutation run first. A test that fails counts if it
passes without the mutation. The run goes on where an earlier one with the same output ended.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
import venv
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import unified_diff
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil

from bench.mutants import KINDS, TESTS, Mutation, draw, likely_tests
from bench.run import START

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "mutations"
SEED = 44
TIERS = {"test": ("full", "nightly"), "full": ("nightly",)}
"""Tier → the markers of tests that it leaves out, as `make test` and `make test-full` do."""
CAUGHT = "caught", "timeout"
NOT_QUICKLY = "not caught by its own folders"
NOT_MADE = "does not compile, or the line is gone"
_NONE_FAILED = 0, 5  # exit codes of pytest: all passed, or none was selected
_NO_SUCH_TEST = 4  # a test that only the mutation brings about, as one for an unknown processor
_LIMIT_SECONDS = 7200  # of a run of pytest; each test has a limit, too
_PRODUCTS = "rgexport/kernels/*/librgexport_*", "rgexport/page/page.zip"
_LLAMA = "out/llama"
_NATIVE = "-m", "rgexport.kernels.build", "--build-folder", "build/native"
_PAGE = "rgexport/page/build.py"
_RUNNING: set[subprocess.Popen[bytes]] = set()


def committed_texts(root: Path, revision: str) -> dict[str, str]:
    """Returns the files of the package and of the page."""
    archive = _git(root, "archive", revision, "rgexport", "page")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar.getmembers())
        return {name: file.read().decode(errors="replace") for name, file in files if file}


def _git(folder: Path, *arguments: str | Path) -> bytes:
    return subprocess.check_output(["git", *arguments], cwd=folder)


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
            _git(folder, "checkout", "-q", "--force", "--detach", revision)
            _git(folder, "clean", "-fdq")
        else:
            _git(built, "worktree", "add", "-f", "-q", "--detach", folder, revision)
        self._restore_products()

    def _restore_products(self) -> None:
        for pattern in _PRODUCTS:
            for product in self._built.glob(pattern):
                shutil.copy2(product, self.folder / product.relative_to(self._built))
        self._link_llama(self._built / _LLAMA)

    def _link_llama(self, target: Path) -> None:
        link = self.folder / _LLAMA
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
        changed = _git(self.folder, "diff", "--name-only").decode().split()
        _git(self.folder, "checkout", "-q", "--", ".")
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
        for archive in (self._built / _LLAMA).glob("*.tar.gz"):
            shutil.copy2(archive, llama)
        self._link_llama(llama)
        self._build("-c", START, "llama-cpp", "build", "-o", _LLAMA, "--tools", "--no-install")
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
    "rgexport/web/": lambda checkout: checkout._build(_PAGE),
    "page/": lambda checkout: checkout._build(_PAGE),
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


def _stop(number: int, frame: object) -> None:
    """Ends the run at once, because of a signal; results are complete up to here."""
    for process in list(_RUNNING):
        _kill(process)
    os._exit(128 + number)


@dataclass(frozen=True)
class Result:
    """A mutation, and whether the tests noticed it."""

    number: int
    mutation: Mutation
    outcome: str
    test: str = ""
    seconds: int = 0
    not_built: tuple[str, ...] = ()
    """Mutations drawn before this one that do not compile."""


class Measurement:
    """The results of a run, in a file that the next run goes on with."""

    def __init__(self, file: Path, header: dict[str, Any], *, quick: bool) -> None:
        """Reads the results of an earlier run, which must be of the same commit, seed and tier."""
        self._file, self._header, self._quick = file, header, quick
        self._lock = threading.Lock()
        self.results: dict[int, Result] = {}
        self._clean: dict[str, bool] = {}
        """Test → whether it passes without a mutation."""
        if file.is_file():
            data = json.loads(file.read_text())
            if data["header"] != header:
                sys.exit(f"{file} holds results of {data['header']}, not of {header}; name another")
            self.results, self._clean = read_results(file), data["clean"]

    def save(self, result: Result) -> None:
        """Adds a result to the file."""
        with self._lock:
            self.results[result.number] = result
            results = [asdict(self.results[number]) for number in sorted(self.results)]
            data = {"header": self._header, "clean": self._clean, "results": results}
            new = self._file.with_suffix(".new")
            new.write_text(json.dumps(data, indent=1, ensure_ascii=False))
            new.replace(self._file)

    def is_done(self, number: int) -> bool:
        """Returns whether the run can skip a mutation."""
        result = self.results.get(number)
        return result is not None and (self._quick or result.outcome != NOT_QUICKLY)

    def measure(self, number: int, candidates: Sequence[Mutation], checkout: Checkout) -> None:
        """Tests the first mutation that compiles, and saves the result."""
        began, not_built = time.monotonic(), []
        for mutation in candidates:
            try:
                outcome, test = self._judge(number, mutation, checkout)
            except NotMade:
                not_built.append(f"{mutation.file}:{mutation.line}: {mutation.after.strip()}")
                continue
            finally:
                checkout.undo()
            break
        else:
            mutation, outcome, test = candidates[0], NOT_MADE, ""
        seconds = round(time.monotonic() - began)
        result = Result(number, mutation, outcome, test, seconds, tuple(not_built))
        self.save(result)
        print(_row(result), flush=True)

    def _judge(self, number: int, mutation: Mutation, checkout: Checkout) -> tuple[str, str]:
        groups = likely_tests(checkout.folder, mutation.file)
        passed: list[str] = []
        if number in self.results:  # by its own folders
            passed, groups = [path for group in groups for path in group], []
        checkout.apply(mutation)
        for paths in [*groups, *([] if self._quick else [[TESTS]])]:
            try:
                inside = tuple(f"{path}/" for path in passed)
                new = [path for path in paths if not f"{path}/".startswith(inside)]
                if test := self._failing(new, passed, mutation, checkout):
                    return "caught", test
            except subprocess.TimeoutExpired:
                return "timeout", ""
            passed += paths
        return NOT_QUICKLY if self._quick else "survived", ""

    def _failing(
        self, paths: list[str], passed: list[str], mutation: Mutation, checkout: Checkout
    ) -> str:
        """Returns a test that fails because of the mutation; empty if there is none."""
        selection = checkout.selection(self._header["tier"])
        ignored = [f"--ignore={path}" for path in passed]
        while paths:
            bad = [f"--deselect={test}" for test, passes in self._clean.items() if not passes]
            arguments = *selection, *ignored, *bad, *paths
            code, failed = checkout.test(*arguments)
            if code in _NONE_FAILED:
                break
            test = failed[0] if failed else f"pytest, which ended with exit code {code}"
            trial = failed[:1] or ["--collect-only", *arguments]
            if test not in self._clean or not failed:
                checkout.undo()
                passes = checkout.test(*trial)[0] in (*_NONE_FAILED, _NO_SUCH_TEST)
                with self._lock:
                    self._clean[test] = passes
                checkout.apply(mutation)
            if self._clean[test]:
                return test
            if not failed:
                sys.exit(f"the tests do not start; see {checkout.folder}.log")
        return ""


def read_results(file: Path) -> dict[int, Result]:
    """Returns the results in a file by their numbers."""
    results = {}
    for row in json.loads(file.read_text())["results"]:
        row |= {"mutation": Mutation(**row["mutation"]), "not_built": tuple(row["not_built"])}
        results[row["number"]] = Result(**row)
    return results


def candidates(texts: dict[str, str], seed: int) -> dict[int, list[Mutation]]:
    """Returns the mutation of each number, followed by those that replace it if need be."""
    drawn = draw(texts, seed)
    rows = [drawn[kind.name][i :: kind.count] for kind in KINDS for i in range(kind.count)]
    return dict(enumerate(rows, 1))


def run(
    measurement: Measurement, rows: dict[int, list[Mutation]], checkouts: list[Checkout]
) -> None:
    """Measures the mutations that have no result yet, in each checkout one after the other."""
    numbers = [number for number in sorted(rows) if not measurement.is_done(number)]

    def measure(i: int) -> None:
        for number in numbers[i :: len(checkouts)]:
            measurement.measure(number, rows[number], checkouts[i])

    with ThreadPoolExecutor(len(checkouts)) as pool:
        list(pool.map(measure, range(len(checkouts))))


def _row(result: Result) -> str:
    mutation, test = result.mutation, f" by `{result.test}`" if result.test else ""
    return f"{_about(result.number, mutation)} {result.outcome}{test}, {result.seconds} s |"


def _about(number: int, mutation: Mutation) -> str:
    lines = (" ".join(line.split()) for line in (mutation.before, mutation.after))
    change = " → ".join(f"`` {line} ``" for line in lines).replace("|", "\\|")
    return f"| {number} | {mutation.operator} | {mutation.file}:{mutation.line} | {change} |"


def compare(before: dict[int, Result], after: dict[int, Result]) -> str:
    """Returns the outcomes of two runs as a Markdown table."""
    lines = ["| | operator | line | change | before | after |", "|---|---|---|---|---|---|"]
    by_mutation = {result.mutation: result.outcome for result in after.values()}
    for number, result in sorted(before.items()):
        outcome = by_mutation.get(result.mutation, "not measured")
        lines.append(f"{_about(number, result.mutation)} {result.outcome} | {outcome} |")
    totals = f"Caught: {_count(before)} before, {_count(after)} after."
    return "\n".join([*lines, "", totals])


def _count(results: dict[int, Result]) -> str:
    return f"{sum(r.outcome in CAUGHT for r in results.values())} of {len(results)}"


def survivors(results: dict[int, Result], texts: dict[str, str]) -> str:
    """Returns the mutations that no test noticed, with the lines around them."""
    shown = []
    for number, result in sorted(results.items()):
        mutation, text = result.mutation, texts.get(result.mutation.file, "")
        if result.outcome in ("survived", NOT_QUICKLY):
            lines = text.splitlines(), (mutation.apply(text) or text).splitlines()
            changed = list(unified_diff(*lines, n=4, lineterm=""))[2:]
            shown += [f"{number}: {mutation.file}: {result.outcome}", *changed, ""]
    return "\n".join(shown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the mutations only")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--revision", default="HEAD", help="the commit whose tests are measured")
    parser.add_argument("--tier", choices=TIERS, default="full")
    parser.add_argument("--quick", action="store_true", help="run only the likely tests")
    parser.add_argument("--only", help="numbers of mutations, such as 3,17")
    parser.add_argument("--jobs", type=int, default=1, help="worktrees that are used at once")
    parser.add_argument("--output", type=Path, help="the file of results")
    parser.add_argument("--same-as", type=Path, help="take the mutations from this file of results")
    parser.add_argument("--compare", type=Path, help="compare the output with this earlier one")
    asked = parser.parse_args()
    if not asked.list and asked.output is None:
        parser.error("name a file of results with --output, or use --list")
    return asked


def _prepare(tier: str) -> None:
    """Ends the program if something is not built, and lets a signal end the tests, too."""
    needed = _PRODUCTS[:1] if tier == "test" else (*_PRODUCTS, f"{_LLAMA}/bin")
    if missing := [pattern for pattern in needed if not any(ROOT.glob(pattern))]:
        sys.exit(f"not built: {', '.join(missing)}; run make native page llama llama-tools")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _share(job: int, jobs: int) -> list[int] | None:
    """Returns the processors of one job: with fewer than its threads it would take far longer."""
    if not hasattr(os, "sched_setaffinity"):  # Linux only
        return None
    return sorted(os.sched_getaffinity(0))[job::jobs] or None


def main() -> None:
    """Lists, measures or compares."""
    asked = _arguments()
    if asked.compare:
        print(compare(read_results(asked.compare), read_results(asked.output)))
        return
    revision = _git(ROOT, "rev-parse", f"{asked.revision}^{{commit}}").decode().strip()
    texts = committed_texts(ROOT, revision)
    if asked.same_as:
        rows = {n: [result.mutation] for n, result in read_results(asked.same_as).items()}
    else:
        rows = candidates(texts, asked.seed)
    if asked.only:
        rows = {number: rows[number] for number in map(int, asked.only.split(","))}
    if asked.list:
        print("| | operator | line | change |\n|---|---|---|---|")
        print(*(_about(number, row[0]) for number, row in rows.items()), sep="\n")
        return
    _prepare(asked.tier)
    header = {"seed": asked.seed, "revision": revision, "tier": asked.tier}
    measurement = Measurement(asked.output, header, quick=asked.quick)
    checkouts = [
        Checkout(FOLDER / f"tree-{i}", revision, processors=_share(i, asked.jobs))
        for i in range(asked.jobs)
    ]
    if checkouts[0].test("--collect-only")[0]:
        sys.exit(f"the tests cannot be collected; see {checkouts[0].folder}.log")
    run(measurement, rows, checkouts)
    print(f"\nCaught: {_count(measurement.results)}.\n\n{survivors(measurement.results, texts)}")


if __name__ == "__main__":
    main()
