"""Programs that take long: their output in a log, their progress on the terminal."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rgexport import progress
from rgexport.errors import RequestError

_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
"""How ninja begins a line: the steps that are done, and all."""
_COMPLAINT = re.compile(r"\berror[: ].*(?:(?<=:)\s+\S.*)?", re.IGNORECASE)
"""How compilers, CMake and pip report an error. CMake gives the place first, then the reason."""
_LONGEST = 200


class Commands:
    """Runs commands one after the other, with one log."""

    def __init__(self, log: Path, variables: Mapping[str, str]) -> None:
        """Empties the log; `variables` are the environment of the commands."""
        self._log, self._variables = log, dict(variables)
        log.write_text("", "utf-8")

    def run(self, command: Sequence[str], who: str, label: str | None = None) -> None:
        """Runs a command to its end.

        Args:
            command: the program and its arguments.
            who: what to call it when it fails.
            label: of a progress display, where the command is a build by ninja.

        Raises:
            RequestError: it failed or does not exist; with its first complaint, and the log.
        """
        program = shutil.which(command[0], path=self._variables.get("PATH"))
        if program is None:
            raise RequestError(f"{command[0]} is not installed; install it and run this again")
        shown = shlex.join([program, *command[1:]])
        progress.detail(f"$ {shown}")
        with self._log.open("a", 1, encoding="utf-8", errors="replace") as log:
            print("$", shown, file=log)
            start = log.tell()
            code = self._logged([program, *command[1:]], log.write, label)
        if code:
            said = self._log.read_bytes()[start:].decode("utf-8", "replace")
            found = _COMPLAINT.search(said)
            complaint = f": {' '.join(found[0].split())}" if found else ""
            raise RequestError(f"{who} failed{complaint[:_LONGEST]} (its output is in {self._log})")

    def _logged(self, command: list[str], write: Callable[[str], object], label: str | None) -> int:
        """Passes a command's output to `write`, and shows its progress; its exit code."""
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
