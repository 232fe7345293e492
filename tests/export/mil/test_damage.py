"""Damaged packages are refused, with the name of what is wrong, also if all hashes were adapted."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.describe import describe
from tests.artifacts import export_random_coreml
from tests.export.mil.damage import DAMAGES
from tests.export.mil.package_edits import (
    BLOCKWISE,
    MODEL,
    UP,
    WEIGHTS,
    content_hash,
    edit,
    exchange_bytes,
    swap_blobs,
)
from tests.models import make_config

CONFIG = make_config("ra", width=64, heads=2, vocab_size=64, window=8)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound artifact whose RG-LRU states are kept as pairs."""
    folder = tmp_path_factory.mktemp("sound")
    options = {"prefill_length": 4, "recurrent_state": "hilo"}
    return export_random_coreml(CONFIG, folder, "int4", **options)[0].path


@pytest.fixture
def package(sound: Path, tmp_path: Path) -> Path:
    """The package of a copy of it."""
    shutil.copytree(sound, tmp_path / "artifact")
    return tmp_path / "artifact" / "model.mlpackage"


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The exit code, and all that was said in one line."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def test_sound(package, capsys):
    assert complaint(capsys, "inspect", package.parent)[0] == 0
    code, text = complaint(capsys, "inspect", package)
    assert code == 0 and "No problems." in text


@pytest.mark.parametrize("case", DAMAGES)
def test_artifact_is_refused(case, package, capsys):
    """By the command that looks at it, and by one that would run it."""
    damage = DAMAGES[case]
    damage.spoil(package)
    for command in ("inspect", "validate"):
        code, text = complaint(capsys, command, package.parent)
        assert code == 2 and re.search(damage.named, text), text
        assert text.count("Error:") == 1 and "Traceback" not in text


@pytest.mark.parametrize("case", DAMAGES)
def test_artifact_with_adapted_hashes_is_refused(case, package, capsys):
    """The first time, and the second, when all files were seen before."""
    damage = DAMAGES[case]
    damage.spoil(package)
    if (package / MODEL).exists() and (package / WEIGHTS).exists():
        content_hash(package)
    for _ in range(2):
        code, text = complaint(capsys, "validate", package.parent)
        assert code == 2 and re.search(damage.adapted or damage.named, text), text


@pytest.mark.parametrize("case", DAMAGES)
def test_bare_package_is_refused(case, package, tmp_path, capsys):
    damage = DAMAGES[case]
    bare = package.rename(tmp_path / "bare.mlpackage")
    damage.spoil(bare)
    code, text = complaint(capsys, "inspect", bare)
    assert code in (1, 2) and re.search(damage.bare or damage.named, text), text
    assert "Traceback" not in text


def test_altered_weights_are_named_until_they_are_mended(package, tmp_path, capsys):
    bare = package.rename(tmp_path / "bare.mlpackage")
    for _ in range(2):
        assert complaint(capsys, "inspect", bare)[0] == 0
    exchange_bytes(bare)
    for _ in range(2):
        code, text = complaint(capsys, "inspect", bare)
        assert code == 1 and f"{UP}.data was altered" in text
    exchange_bytes(bare)
    assert complaint(capsys, "inspect", bare)[0] == 0


def test_hashes_of_weights_must_agree(package, capsys):
    """Those of the manifest may be made to fit the weights; the package has them, too."""
    exchange_bytes(package)
    content_hash(package)
    path = package.parent / "rgexport.json"
    manifest = json.loads(path.read_text())
    names = [f"layers.{i}.mlp_block.up_proj.weight.data" for i in (0, 1)]
    hashes = manifest["coreml"]["blobs"]
    hashes |= {names[0]: hashes[names[1]], names[1]: hashes[names[0]]}
    path.write_text(json.dumps(manifest))
    code, text = complaint(capsys, "inspect", package.parent)
    assert code == 2 and f"{UP}.data: its hash in the manifest is not the one in" in text


@pytest.mark.parametrize(
    ("precision", "options", "kind", "parameter", "part"),
    [
        ("fp32", {}, "const", "val", "data"),
        ("fp16", {"compute": "fp32"}, BLOCKWISE, "data", "data"),
        ("int8", {}, BLOCKWISE, "scale", "scales"),
        ("int4", {"symmetric": False}, BLOCKWISE, "offset", "zero_points"),
        ("pal4", {}, "constexpr_lut_to_dense", "indices", "data"),
        ("pal4", {}, "constexpr_lut_to_dense", "lut", "lut"),
    ],
)
def test_swapped_blobs_of_any_kind(precision, options, kind, parameter, part, tmp_path, capsys):
    artifact, _ = export_random_coreml(CONFIG, tmp_path, precision, prefill_length=4, **options)
    package = artifact.path / "model.mlpackage"
    edit(swap_blobs("decode", "prefill", kind=kind, part=parameter))(package)
    code, text = complaint(capsys, "inspect", artifact.path)
    assert code == 2
    assert f"it is layers.1.mlp_block.up_proj.weight.{part}; expected layers.0" in text
    code, text = complaint(capsys, "inspect", package.rename(tmp_path / "bare.mlpackage"))
    assert code == 1 and f"{UP}.{part} was altered" in text


def test_package_of_an_artifact_stands_for_it(package, capsys):
    assert complaint(capsys, "generate", package, "--ids", "2", "-n", "2")[0] == 0


BYTES = st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=0, max_size=4), st.integers(0, 4)),
    min_size=1,
    max_size=4,
)
"""Where, as a share of the file, what to put there, and how many bytes to take away."""


@pytest.mark.parametrize("file", [MODEL, WEIGHTS, Path("Manifest.json")], ids=lambda p: p.name)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=BYTES)
def test_any_bytes(sound, tmp_path_factory, file, changes):
    """A package with wrong bytes is refused, has complaints or is read: nothing else happens."""
    package = tmp_path_factory.mktemp("any") / "any.mlpackage"
    shutil.copytree(sound / "model.mlpackage", package)
    data = bytearray((package / file).read_bytes())
    for place, content, count in changes:
        at = int(place * len(data))
        data[at : at + count] = content
    (package / file).write_bytes(data)
    try:
        complaints = describe(str(package))["problems"]
    except RequestError as error:
        complaints = [str(error)]
    assert all(len(text.splitlines()) == 1 for text in complaints)
