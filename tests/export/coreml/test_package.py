"""The package on the disk is one that coremltools could have written."""

import json

import numpy as np
import pytest

from rgexport.export.coreml.package import PACKAGE, manifest_file, model_file, write_package
from tests.artifacts import export_random_coreml
from tests.models import ODD_CONFIGS

ct = pytest.importorskip("coremltools")


@pytest.fixture
def theirs(tmp_path):
    """A package of one linear, saved by coremltools."""
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec((1, 64))], opset_version=ct.target.iOS18)
    def program(x):
        return mb.linear(x=x, weight=np.ones((64, 64), np.float32))

    target = ct.target.iOS18
    model = ct.convert(program, minimum_deployment_target=target, skip_model_load=True)
    model.save(str(tmp_path / "theirs" / PACKAGE))
    return model


def layout(folder):
    """Names of the files, and the package's manifest without its random identifiers."""
    manifest = json.loads((folder / manifest_file()).read_text())
    root = manifest.pop("rootModelIdentifier")
    entries = manifest.pop("itemInfoEntries")
    items = sorted(json.dumps(item, sort_keys=True) for item in entries.values())
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return files, manifest, items, entries[root]["name"]


def test_layout_is_coremltools_own(theirs, tmp_path):
    ours = tmp_path / "ours"
    write_package(ours, theirs.get_spec())
    weights = f"{PACKAGE}/Data/com.apple.CoreML/weights"
    (ours / weights).mkdir()
    (ours / weights / "weight.bin").touch()
    assert layout(ours) == layout(tmp_path / "theirs")
    assert (ours / model_file()).stat().st_size == len(theirs.get_spec().SerializeToString())


def test_coremltools_loads_what_was_exported(tmp_path):
    artifact, _ = export_random_coreml(ODD_CONFIGS["regular"], tmp_path, "int4")
    model = ct.models.MLModel(str(artifact.path / PACKAGE), skip_model_load=True)
    assert model.get_spec().specificationVersion == 9
    description = model.get_spec().description
    assert description.defaultFunctionName == "decode"
    assert [function.name for function in description.functions] == ["decode", "prefill"]
