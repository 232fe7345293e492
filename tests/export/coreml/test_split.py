"""A model in several packages computes what it does in one."""

import json
from pathlib import Path

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.coreml.package import weight_file
from rgexport.export.coreml.segments import packages, split_by_size
from rgexport.export.coreml.storage import MOST_PADDING
from rgexport.export.opening import open_artifact
from rgexport.runtimes.coreml.session import CoreMLSession
from tests.artifacts import export_random_coreml
from tests.models import ODD_CONFIGS, make_config

FOUR = make_config("rrar", width=64, heads=2, lru_width=96, window=8)


def both(config, folder: Path, **options) -> tuple[Artifact, Artifact]:
    """An artifact of one package, and one in which each layer has its own."""
    whole, _ = export_random_coreml(config, folder / "whole", **options)
    sizes = [part_bytes(whole, name) for name in whole.manifest.tensors if "layers" not in name]
    largest = max(sum(sizes), *(layer_bytes(whole, i) for i in range(config.num_layers)))
    split, _ = export_random_coreml(config, folder / "split", **options, split=largest)
    assert len(split.manifest.packages) > 2
    return whole, split


def part_bytes(artifact: Artifact, name: str) -> int:
    parts = artifact.manifest.tensors[name].parts.values()
    return sum(part.nbytes + MOST_PADDING for part in parts)


def layer_bytes(artifact: Artifact, layer: int) -> int:
    names = (n for n in artifact.manifest.tensors if n.startswith(f"layers.{layer}."))
    return sum(part_bytes(artifact, name) for name in names)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (FOUR, {"precision": "fp32"}),
        (FOUR, {"precision": "int4", "recurrent_state": "hilo", "all_logits": True}),
        (ODD_CONFIGS["hawk"], {"precision": "fp16"}),
        (ODD_CONFIGS["attention_only"], {"precision": "int8"}),
        (ODD_CONFIGS["narrow_lru"], {"precision": "pal4", "compute": "fp32"}),
    ],
)
def test_logits_and_states_are_those_of_one_package(config, options, tmp_path: Path) -> None:
    """A prompt beyond the window, single tokens, and a batch that goes on from a state."""
    sessions = [CoreMLSession(each) for each in both(config, tmp_path, prefill_length=5, **options)]
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 2 * config.window + 7))
    for session in sessions:
        session.reset(2)
    one, several = (session.prefill(ids) for session in sessions)
    np.testing.assert_array_equal(one, several)
    for token in ids.T[:3]:
        one, several = (session.step(token) for session in sessions)
        np.testing.assert_array_equal(one, several)
    states = [session.get_state() for session in sessions]
    for name, state in states[0].items():
        np.testing.assert_array_equal(state, states[1][name])
    sessions[1].set_state(states[0])
    one, several = (session.step(ids[:, 0]) for session in sessions)
    np.testing.assert_array_equal(one, several)


@pytest.mark.full
def test_the_demo_in_packages_of_3_mb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert run(["coreml", "--size", "demo", "--split", "3MB", "-o", str(folder)]) == 0
    assert "verified" in capsys.readouterr().out
    artifact = open_artifact(folder, verify=True)
    names = [plan.name for plan in artifact.manifest.packages]
    sizes = [artifact.file(weight_file(name)).stat().st_size for name in names]
    assert names[0] == "ends.mlpackage" and max(sizes) <= 3e6
    card = (folder / "README.md").read_text()
    assert all(name in card for name in names)
    assert run(["validate", str(folder), "-m", "demo/model", "--tokens", "300"]) in (0, 1)
    shown = capsys.readouterr().out
    assert "PASS" in shown and "FAIL" not in shown
    for name in names:
        assert run(["inspect", str(folder / name), "--json"]) == 0
        capsys.readouterr()


def test_packages_that_were_exchanged_are_found(tmp_path: Path) -> None:
    _, split = both(
        make_config("rrrr", width=64, heads=2, lru_width=64), tmp_path, precision="int8"
    )
    first, second = (split.path / plan.name for plan in split.manifest.packages[1:3])
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    with pytest.raises(RequestError, match="is damaged"):
        open_artifact(split.path)


def test_a_manifest_with_another_split_is_refused(tmp_path: Path) -> None:
    _, split = both(FOUR, tmp_path, precision="int8")
    path = split.path / "rgexport.json"
    fields = json.loads(path.read_text())
    for wrong in ([1, 1], [4, 0], [5, -1]):
        fields["coreml"]["split"] = wrong
        path.write_text(json.dumps(fields))
        with pytest.raises(RequestError, match=r"coreml.split"):
            open_artifact(split.path)


def test_packages_are_few_and_equal() -> None:
    sizes = {f"layers.{i}.x": 10 for i in range(10)} | {"embed_tokens.weight": 25}
    assert split_by_size(10, sizes, 200) == ()
    assert split_by_size(10, sizes, 60) == (5, 5)
    assert split_by_size(10, sizes, 45) == (4, 4, 2)
    assert [plan.name for plan in packages(10, (4, 4, 2))] == [
        *("ends.mlpackage", "layers-0-3.mlpackage", "layers-4-7.mlpackage"),
        "layers-8-9.mlpackage",
    ]
    for limit, what in ((24, "the embedding takes 25 bytes"), (5, "the embedding takes")):
        with pytest.raises(RequestError, match=what):
            split_by_size(10, sizes, limit)
    with pytest.raises(RequestError, match="a layer takes 10 bytes"):
        split_by_size(10, {**sizes, "embed_tokens.weight": 1}, 9)


@pytest.mark.parametrize("size", ["much", "-1", "0.0001kB"])
def test_what_is_no_size(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x"
    assert run(["coreml", "--size", "demo", "--split", size, "-o", str(target)]) == 2
    assert "--split is" in capsys.readouterr().err and not target.exists()
