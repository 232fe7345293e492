"""Programs that take long: their output in a log, their progress on the terminal."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rgexport import progress
from rgexport.errors import RequestError

_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
"""How ninja begins a line: steps done, of all."""
_COMPLAINT = re.compile(r"\berror[: ].*", re.IGNORECASE)
"""What compilers, CMake and pip say first when something is wrong."""
_LONGEST = 200


class Commands:
    """Runs commands one after the other, into one log."""

    def __init__(self, log: Path, variables: Mapping[str, str]) -> None:
        """Begins the log anew with the first command; `variables` are their environment."""
        self._log, self._variables = log, dict(variables)
        self._mode = "w"

    def run(self, command: Sequence[str], who: str, label: str | None = None) -> None:
        """Runs a command to its end.

        Args:
            command: the program and its arguments.
            who: what to call it when it fails.
            label: of a progress display, where the command is a build by ninja.

        Raises:
            RequestError: it failed or is not there; what it complained of first, and the log.
        """
        program = shutil.which(command[0], path=self._variables.get("PATH"))
        if program is None:
            raise RequestError(f"{command[0]} is not installed; install it and run this again")
        complaint = _first_complaint(self._logged([program, *command[1:]], label))
        if self._code:
            raise RequestError(f"{who} failed{complaint} (all that it said is in {self._log})")

    def _logged(self, command: list[str], label: str | None) -> Iterator[str]:
        """Gives the lines of a command's output, after they were logged; sets the exit code."""
        progress.detail(f"$ {shlex.join(command)}")
        with self._log.open(self._mode, 1, encoding="utf-8", errors="replace") as log:
            self._mode = "a"
            print("$", shlex.join(command), file=log)
            with subprocess.Popen(
                command,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            ) as process:
                assert process.stdout is not None
                for line in _shown(process.stdout, label) if label else process.stdout:
                    log.write(line)
                    yield line
            self._code = process.returncode


def _first_complaint(lines: Iterable[str]) -> str:
    """Reads all lines, and gives the first that is about an error: up to where it says which."""
    complaint = ""
    for line in lines:
        if not complaint:
            found = _COMPLAINT.search(line)
            complaint = f": {found[0].strip()}" if found else ""
        elif complaint.endswith(":"):  # CMake tells the place first
            complaint += f" {line.strip()}" if line.strip() else ""
    return complaint[:_LONGEST]


def _shown(lines: Iterable[str], label: str) -> Iterator[str]:
    """Passes on the lines of a build, and shows how far it has come."""
    with ExitStack() as stack:
        advance, done = None, 0
        for line in lines:
            if step := _STEP.match(line):
                if advance is None:
                    advance = stack.enter_context(progress.task(label, int(step[2]), "steps"))
                advance(int(step[1]) - done)
                done = int(step[1])
            yield line
