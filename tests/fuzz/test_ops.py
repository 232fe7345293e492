"""The fuzzer of native ops says in a line why it cannot be built, and what it has found."""

import os
import subprocess
import sys

import pytest

from fuzz.ops.__main__ import _summary
from tests.command_line import ROOT

STATS = "#900\tNEW    cov: 70 ft: 9 corp: 1/1b exec/s: 4 rss: 90Mb\nCOUNT GeluMul 800 200\n"


def run(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fuzz.ops", *arguments]
    environment = os.environ | {"PATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_clang(tmp_path):
    done = run("--runs", "1", path=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "clang++ is missing" in done.stderr


def test_with_a_clang_that_has_no_fuzzer(tmp_path):
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho 'clang++: error: no libclang_rt.fuzzer' >&2\nexit 1\n")
    clang.chmod(0o755)
    done = run("--runs", "1", path=f"{tmp_path}:/bin")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no libclang_rt.fuzzer" in done.stderr


@pytest.mark.parametrize(
    ("log", "code", "words"),
    [
        (f"{STATS}stat::number_of_executed_units: 1000\n", 0, ["1,000 exec", "Findings: none"]),
        (f"FINDING GeluMul on avx2: y [0] is 1\n{STATS}", 77, ["900 exec", "GeluMul on avx2"]),
        ("SUMMARY: AddressSanitizer: heap-buffer-overflow", 1, ["heap-buffer-overflow"]),
        ("==1== ERROR: libFuzzer: timeout after 10 seconds", 70, ["timeout after 10"]),
        ("nothing that is known", 9, ["exit code 9"]),
    ],
)
def test_the_summary(log, code, words):
    found = _summary(log, 2.0, code)
    assert "\n" not in found and all(word in found for word in words), found
