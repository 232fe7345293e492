"""In continuous integration, a test may only be skipped for a reason that is on a list.

`--expected-skips FILE` names the list: one regular expression a line, `#` before comments. A skip
for any other reason fails the run, so that a test that stops running is noticed.
"""

import re
from pathlib import Path

import pytest


class ExpectedSkips:
    """A plugin that ends the run with a failure if a test was skipped for an unlisted reason."""

    def __init__(self, file: Path) -> None:
        lines = (line.strip() for line in file.read_text("utf-8").splitlines())
        self._file = file
        self._expected = [re.compile(line) for line in lines if line and not line.startswith("#")]
        self._unexpected: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped:
            self._take(report.nodeid, report.longrepr)

    pytest_collectreport = pytest_runtest_logreport

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for nodeid, reason in self._unexpected.items():
            terminalreporter.write_line(
                f"FAILED {nodeid}: skipped, and {self._file} does not list the reason: {reason}"
            )

    def _take(self, nodeid: str, longrepr: object) -> None:
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(pattern.search(reason) for pattern in self._expected):
            self._unexpected[nodeid] = reason
