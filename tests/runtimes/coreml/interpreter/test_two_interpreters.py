"""The interpreter against the tests' own, which shares nothing with it, on the same packages."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from rgexport.export.coreml.package import PACKAGE
from rgexport.export.mil.package import open_package
from rgexport.runtimes.coreml.interpreter.runner import InterpreterRunner
from tests.artifacts import export_random_coreml
from tests.mil_oracle import Oracle
from tests.models import ODD_CONFIGS
from tests.sessions import distance

SAME, ROUNDED = 1e-5, 5e-3
"""Largest difference of logits and states, as a share of the largest: the order of a sum, and
what it does where its result is rounded to float16."""


@pytest.mark.parametrize("recurrent_state", ["io", "hilo"])
@pytest.mark.parametrize(
    ("precision", "compute", "limit"),
    [
        *[("fp32", "fp32", SAME), ("int4", "fp32", SAME), ("pal4", "fp32", SAME)],
        *[("fp16", "fp16", ROUNDED), ("int4", "fp16", ROUNDED), ("pal4", "fp16", ROUNDED)],
    ],
)
def test_both_compute_the_same(
    precision: str, compute: str, limit: float, recurrent_state: Any, tmp_path: Path
) -> None:
    config = ODD_CONFIGS["one_head"]
    artifact, _ = export_random_coreml(
        config,
        tmp_path,
        precision,
        compute=compute,
        prefill_length=7,
        recurrent_state=recurrent_state,
    )
    path = artifact.file(PACKAGE)
    ours, oracle = InterpreterRunner(open_package(path)), Oracle(path)
    states, theirs = ours.make_state(), oracle.new_state()
    assert states.keys() == theirs.keys()
    carried = {}
    if recurrent_state == "io":
        carried["recurrent_state"] = np.zeros((3, config.lru_width), np.float32)
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (1, 40)).astype(np.int32)
    start = 0
    for count in (7, 7, 1, 7, 1, 1, 7, 7):
        positions = np.arange(start, start + count, dtype=np.int32)[None]
        inputs = {"input_ids": tokens[:, start : start + count], "position_ids": positions}
        function = "prefill" if count > 1 else "decode"
        found = ours.predict(function, inputs | carried, states)
        expected = oracle.run(function, inputs | carried, theirs)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert distance(array, expected[name].numpy()) <= limit
        if carried:
            carried = {"recurrent_state": found["recurrent_state_out"]}
        start += count
    theirs_whole = _whole({name: array.numpy() for name, array in theirs.items()})
    for name, array in _whole(states).items():
        assert distance(array, theirs_whole[name]) <= limit


def _whole(states: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """States with the sums of pairs instead of their halves, of which `hi` may be rounded away."""
    wide = {name: array.astype(np.float64) for name, array in states.items()}
    pairs = {name.removesuffix("_hi") for name in wide if name.endswith("_hi")}
    sums = {name: wide.pop(f"{name}_hi") + wide.pop(f"{name}_lo") / 2048 for name in pairs}
    return wide | sums
