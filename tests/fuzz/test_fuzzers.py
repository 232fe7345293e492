"""The fuzzer of readers: sound files pass, faults are found, what was found stays mended."""

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from fuzz.readers import targets, weights
from fuzz.readers.judge import Judge
from fuzz.readers.target import Target
from fuzz.readers.targets import load_target
from rgexport.files import safetensors
from tests.command_line import ROOT

FINDINGS = sorted((ROOT / "tests" / "fuzz_findings").glob("*/*"))
"""One folder for each target. An input says by its name what is wrong with it; `accepted_…` is read
all the same, without harm: a damaged ONNX model, for instance, which ONNX Runtime refuses."""


@pytest.mark.parametrize("name", targets.TARGETS)
def test_sound_files_are_accepted_as_the_oracle_reads_them(name, tmp_path):
    target = load_target(name)
    judge = Judge(target, tmp_path / "input")
    seeds = list(target.seeds(tmp_path / "making"))
    assert seeds and max(map(len, seeds)) <= target.max_bytes
    judge.begin(seeds)


@pytest.mark.parametrize("path", FINDINGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_what_was_found_stays_mended(path, tmp_path):
    name, began = path.parent.name, time.monotonic()
    outcome = Judge(load_target(name), tmp_path / "input")(path.read_bytes())
    assert outcome.kind == ("accepted" if path.name.startswith("accepted_") else "refused"), outcome
    assert time.monotonic() - began < 10


SOUND = weights.TARGETS["safetensors"]


def _believe(data, folder):
    """Believes what a header says of where its tensors lie."""
    with patch.object(safetensors, "_check_extents"):
        return SOUND.read(data, folder)


def _mutate_word(data, random):
    return bytes(random.choice((*data, random.randrange(256))) for _ in range(3))


def _on_word(act):
    """Does something when the input begins with one of two bytes."""

    def read(data, folder):
        if data[:1] in (b"\x07", b"\x08"):
            act()

    return Target("planted", lambda folder: [b"abc"], _mutate_word, read, lambda *_: None)


TARGETS = {
    "believes": Target("believes", SOUND.seeds, SOUND.mutate, _believe, SOUND.agree),
    "hangs": _on_word(lambda: time.sleep(60)),
    "swells": _on_word(lambda: bytearray(b"x") * (100 << 20)),
    "crashes": _on_word(lambda: {}["dtype"]),
}
"""Readers with a fault each, which the fuzzer finds by their names in this module."""


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
    asked = [*command, "--target", f"tests.fuzz.test_fuzzers:{fault}", "--json", tmp_path / "json"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    (share,) = json.loads((tmp_path / "json").read_text())
    assert any(said in message for message in share["found"])
    assert all(Path(finding["path"]).is_file() for finding in share["found"].values())
