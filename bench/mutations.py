"""Measures which small faults in the sources the tests notice.

    python -m bench.mutations --list
    nice python -m bench.mutations --tier full --output before.json [--quick]
    nice python -m bench.mutations --tier test --output after.json --same-as before.json
    python -m bench.mutations --output after.json --compare before.json

Draws forty mutations with a seed (`bench.mutants`) and makes each in a git worktree below
`build/mutations`, which is kept for its compiled objects; `git worktree prune` forgets it after
`make clean`. The native libraries and the page must be built here, by `make native page llama
llama-tools`. Tests that are likely to notice a mutation run first. A test that fails counts if it
passes, or does not exist, without the mutation. The run goes on where an earlier one with the same
output ended.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from difflib import unified_diff
from io import BytesIO
from pathlib import Path
from typing import Any

from bench.mutants import KINDS, TESTS, Mutation, draw, likely_tests
from bench.mutation_checkout import (
    LLAMA,
    PRODUCTS,
    ROOT,
    TIERS,
    Checkout,
    NotMade,
    end_at_once,
    git,
)

FOLDER = ROOT / "build" / "mutations"
SEED = 44
CAUGHT = "caught", "timeout"
NOT_QUICKLY = "not caught by its own folders"
NOT_MADE = "does not compile, or the line is gone"
_NONE_FAILED = 0, 5  # exit codes of pytest: all passed, or none was selected
_NO_SUCH_TEST = 4  # a test that only the mutation brings about, as one for an unknown processor


def committed_texts(root: Path, revision: str) -> dict[str, str]:
    """Returns the files of the package and of the page."""
    archive = git(root, "archive", revision, "rgexport", "page")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar.getmembers())
        return {name: file.read().decode(errors="replace") for name, file in files if file}


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
                passing = (*_NONE_FAILED, _NO_SUCH_TEST) if failed else _NONE_FAILED
                passes = checkout.test(*trial)[0] in passing
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
    needed = PRODUCTS[:1] if tier == "test" else (*PRODUCTS, f"{LLAMA}/bin")
    if missing := [pattern for pattern in needed if not any(ROOT.glob(pattern))]:
        sys.exit(f"not built: {', '.join(missing)}; run make native page llama llama-tools")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)


def _share(job: int, jobs: int) -> list[int] | None:
    """Returns processors for one job: the threads of two would wait for one another."""
    if not hasattr(os, "sched_setaffinity"):  # Linux only
        return None
    return sorted(os.sched_getaffinity(0))[job::jobs] or None


def main() -> None:
    """Lists, measures or compares."""
    asked = _arguments()
    if asked.compare:
        print(compare(read_results(asked.compare), read_results(asked.output)))
        return
    revision = git(ROOT, "rev-parse", f"{asked.revision}^{{commit}}").decode().strip()
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
