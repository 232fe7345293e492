"""A model in several packages computes what it does in one."""

import json
from collections import Counter

import numpy as np
import pytest

from rgexport.artifacts.coreml.package import weight_file
from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.coreml.storage import MOST_PADDING
from rgexport.runtimes.coreml.session import CoreMLSession
from tests.artifacts import export_random_coreml
from tests.models import ODD_CONFIGS, make_config

FOUR = make_config("rrar", width=64, heads=2, lru_width=96, window=8)


def both(config, folder, **options):
    whole, _ = export_random_coreml(config, folder / "whole", **options)
    sizes = Counter()
    for name, tensor in whole.manifest.tensors.items():
        layer = name.split(".")[1] if name.startswith("layers.") else "ends"
        sizes[layer] += sum(part.nbytes + MOST_PADDING for part in tensor.parts.values())
    largest = max(sizes.values())
    split, _ = export_random_coreml(config, folder / "split", **options, split=largest)
    assert len(split.manifest.packages) > 2
    return whole, split


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (FOUR, {"precision": "int4", "recurrent_state": "hilo", "all_logits": True}),
        (ODD_CONFIGS["attention_only"], {"precision": "pal4", "compute": "fp32"}),
    ],
)
def test_logits_and_states_are_those_of_one_package(config, options, tmp_path):
    """A prompt beyond the window, single tokens, and a batch that goes on from a state."""
    one, several = map(CoreMLSession, both(config, tmp_path, prefill_length=5, **options))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 2 * config.window + 7))
    one.reset(2)
    several.reset(2)
    np.testing.assert_array_equal(one.prefill(ids), several.prefill(ids))
    np.testing.assert_array_equal(one.step(ids[:, 1]), several.step(ids[:, 1]))
    states = several.get_state()
    for name, state in one.get_state().items():
        np.testing.assert_array_equal(state, states[name])
    several.set_state(one.get_state())
    np.testing.assert_array_equal(one.step(ids[:, 0]), several.step(ids[:, 0]))


@pytest.mark.full
def test_the_demo_in_packages_of_3_mb(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert run(["coreml", "--size", "demo", "--split", "3MB", "-o", str(folder)]) == 0
    assert "verified" in capsys.readouterr().out
    artifact = open_artifact(folder, verify=True)
    names = [plan.name for plan in artifact.manifest.packages]
    sizes = [artifact.file(weight_file(name)).stat().st_size for name in names]
    assert names[0] == "ends.mlpackage" and max(sizes) <= 3e6
    assert all(name in (folder / "README.md").read_text() for name in names)
    assert run(["validate", str(folder), "-m", "demo/model", "--tokens", "300"]) in (0, 1)
    shown = capsys.readouterr().out
    assert "PASS" in shown and "FAIL" not in shown


def test_exchanged_packages_and_another_split_are_refused(tmp_path):
    config = make_config("rrr", width=32, heads=2, vocab_size=64)
    _, split = both(config, tmp_path, precision="int8")
    path = split.path / "rgexport.json"
    text = path.read_text()
    for wrong in ([1, 1], [3, 0], [4, -1]):
        fields = json.loads(text)
        fields["coreml"]["split"] = wrong
        path.write_text(json.dumps(fields))
        with pytest.raises(RequestError, match=r"coreml.split"):
            open_artifact(split.path)
    path.write_text(text)
    first, second = (split.path / plan.name for plan in split.manifest.packages[1:3])
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    with pytest.raises(RequestError, match="is damaged"):
        open_artifact(split.path)
    with pytest.raises(RequestError, match="the embedding takes"):
        export_random_coreml(config, tmp_path, "int8", split=100)
