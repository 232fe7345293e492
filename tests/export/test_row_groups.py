"""Tensors in row groups, in the files of all formats that have them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export import storage
from rgexport.export.manifest import MANIFEST
from rgexport.export.manifest_reader import read_manifest
from rgexport.export.row_groups import groups_of
from rgexport.griffin.layout import EMBEDDING
from rgexport.quantize.scheme import Affine, Mixed, RowGroup
from tests.artifacts import Made, export_planned
from tests.models import ODD_CONFIGS
from tests.row_groups import BIASED, INT4, decoded, split_plan

CONFIG = ODD_CONFIGS["not_by_32"]
PLAN = split_plan(CONFIG)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Written in slabs of a few rows, some of which have no row of a group."""
    monkeypatch.setattr(storage, "SLAB_BYTES", 3 * 4 * CONFIG.width)
    return export_planned(CONFIG, tmp_path, PLAN)


@pytest.mark.parametrize("name", [EMBEDDING, BIASED])
def test_weights_come_back_in_their_order(name: str, made: Made) -> None:
    artifact, weights = made
    scheme, tensor = PLAN[name], artifact.tensor(name)
    assert isinstance(scheme, Mixed)
    expected = decoded(weights[name], scheme)
    np.testing.assert_array_equal(tensor.whole(), expected)
    for start, stop in [(0, 1), (4, 5), (2, 9), (17, 17), (40, len(expected))]:
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


def test_a_tensor_takes_the_bytes_of_its_groups(made: Made) -> None:
    """And the manifest, which comes back, names the parts of each."""
    manifest = made[0].manifest
    stored = manifest.tensors[EMBEDDING]
    sizes = [group.stored.shape[0] for group in groups_of(stored)]
    assert sizes == [20, 30, 51] and stored.shape[0] == 101
    shapes = {label: part.shape for label, part in stored.parts.items()}
    assert shapes == {
        **{"0.data": (20, 64), "0.scales": (20, 2)},
        **{"1.data": (30, 32), "1.scales": (30, 2), "1.zero_points": (30, 1)},
        **{"2.data": (51, 32), "2.scales": (51, 2)},
    }
    assert read_manifest(made[0].path) == manifest
    assert manifest.rounds_activations and manifest.precision == "int4"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s["groups"][0].update(rows="0-100"), "two row groups"),
        (lambda s: s["groups"][0].update(rows="101"), "row 101; expected rows below 101"),
        (lambda s: s["groups"][2]["scheme"].update(block=None), "does not have"),
        (lambda s: s["groups"][2]["scheme"].update(bits=8), r"parts are .*; expected"),
        (lambda s: s["groups"].pop(1), "parts are"),
    ],
)
def test_manifests_that_contradict_themselves(change: Any, complaint: str, made: Made) -> None:
    path = made[0].path / MANIFEST
    fields = json.loads(path.read_text())
    for scheme in (fields["plan"][EMBEDDING], fields["tensors"][EMBEDDING]["scheme"]):
        change(scheme)
    path.write_text(json.dumps(fields))
    with pytest.raises(RequestError, match=complaint):
        read_manifest(made[0].path)


def test_row_groups_where_they_cannot_be(made: Made) -> None:
    path, text = made[0].path / MANIFEST, (made[0].path / MANIFEST).read_text()
    fields, name = json.loads(text), "final_norm.weight"
    fields["plan"][name] = fields["tensors"][name]["scheme"] = fields["plan"][EMBEDDING]
    path.write_text(json.dumps(fields))
    with pytest.raises(RequestError, match="only matrices are quantized"):
        read_manifest(made[0].path)
    fields = json.loads(text)
    fields["tensors"][EMBEDDING]["parts"]["1.data"]["offset"] = 1 << 40
    path.write_text(json.dumps(fields))
    with pytest.raises(RequestError, match=r"parts.1.data lies outside"):
        read_manifest(made[0].path)


def test_onnx_has_the_blocks_that_it_has_elsewhere(tmp_path: Path) -> None:
    rows = Affine(8, None, symmetric=True)
    plan = PLAN | {EMBEDDING: Mixed((RowGroup("0-9", rows), RowGroup(None, INT4)))}
    for profile in ("cpu", "wasm"):
        with pytest.raises(
            RequestError, match=r"int8/row \(10 rows\) \+ int4/32, which the profile"
        ):
            export_planned(CONFIG, tmp_path, plan, profile=profile)
