"""The fuzzer of readers: sound files pass, faults are found, and what was found stays mended."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuzz.readers.judge import Judge
from fuzz.readers.targets import TARGETS, load_target

FOUND = Path(__file__).parents[1] / "fuzz_findings"
"""One folder for each target. An input says by its name what is wrong with it; `accepted_…` is read
all the same, without harm: a damaged ONNX model, for instance, which ONNX Runtime refuses."""
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TARGETS)
def test_sound_files_are_accepted_as_the_oracle_reads_them(name, tmp_path):
    target = load_target(name)
    judge = Judge(target, tmp_path / "input")
    seeds = list(target.seeds(tmp_path / "making"))
    assert seeds and max(map(len, seeds)) <= target.max_bytes
    judge.begin(seeds)


@pytest.mark.parametrize(
    "path", sorted(FOUND.glob("*/*")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_what_was_found_stays_mended(path, tmp_path):
    name, began = path.parent.name, time.monotonic()
    outcome = Judge(load_target(name), tmp_path / "input")(path.read_bytes())
    assert outcome.kind == ("accepted" if path.name.startswith("accepted_") else "refused"), outcome
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("believes", "wrong accept"),
        ("hangs", "took longer than 10 s"),
        ("swells", "memory grew"),
        ("crashes", "KeyError"),
    ],
)
def test_a_planted_fault_is_found(fault, said, tmp_path):
    command = [sys.executable, "-m", "fuzz.readers", "--minutes", "0.1", "--out", str(tmp_path)]
    asked = [*command, "--target", f"tests.fuzz.planted:{fault}", "--json", str(tmp_path / "json")]
    result = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stdout + result.stderr
    (share,) = json.loads((tmp_path / "json").read_text())
    assert any(said in found for found in share["found"])
    for found in share["found"].values():
        assert Path(found["path"]).is_file()
