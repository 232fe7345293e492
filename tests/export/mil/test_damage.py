"""Damaged packages are refused in one line that names what is wrong."""

import os
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.describe import describe
from tests.artifacts import export_random_coreml
from tests.export.mil.package_edits import (
    BLOCKWISE,
    GATE,
    MODEL,
    OTHER_UP,
    UP,
    WEIGHTS,
    Spoil,
    append_blob,
    content_hash,
    drop_write,
    edit,
    exchange_bytes,
    first_operation_last,
    flip_bit,
    forget_prefill,
    forget_state,
    in_both,
    in_header,
    move_blob,
    narrow_state,
    rename_argument,
    retype,
    set_dimension,
    set_dtype,
    set_type,
    state_dtype,
    swap_blobs,
    swap_reads,
    swap_uses,
    swap_writes,
    tell,
    truncate,
    truncate_to,
    twice,
    weights,
    write_twice,
)
from tests.models import make_config

CONFIG = make_config("ra", width=64, heads=2, vocab_size=64, window=8)


@dataclass(frozen=True)
class Damage:
    """What is done to a package, and patterns of what must be said of it; None: nothing.

    `named`: of an artifact. `adapted`: of one whose hashes were made to fit, by what runs it.
    `bare`: of the package without its manifest.
    """

    spoil: Spoil
    named: str
    adapted: str | None = None
    bare: str | None = None


def everywhere(spoil: Spoil, named: str) -> Damage:
    return Damage(spoil, named, named, named)


def not_alone(spoil: Spoil, named: str) -> Damage:
    """What only a manifest tells."""
    return Damage(spoil, named, named)


def by_the_engine(spoil: Spoil, adapted: str) -> Damage:
    """What is not executed, whoever asks for it."""
    return Damage(spoil, ALTERED, adapted)


def moved(function: str, name: str) -> str:
    return rf"{function}: {name} is at \d+ of weight.bin; expected at \d+"


SHORT = r"it has \d+ bytes; expected \d+ bytes of a weight at"
OUTSIDE = r"tensors\.\S+ lies outside of .*weight.bin"
ALTERED = r"model.mlmodel (was altered|has \d+ bytes instead of)"
MLP = "layers_0_mlp_block"
DAMAGES: dict[str, Damage] = {
    "dropped state write": everywhere(
        edit(drop_write("layers_1_key", "decode")), "decode: state layers_1_key is never written"
    ),
    "dropped state write in prefill": everywhere(
        edit(drop_write("layers_0_conv1d", "prefill")),
        "prefill: state layers_0_conv1d is never written",
    ),
    "dropped state write in both": everywhere(
        edit(drop_write("recurrent_state_lo", "decode", "prefill")),
        "decode: state recurrent_state_lo is never written.*prefill: state recurrent_state_lo",
    ),
    "swapped state writes": everywhere(
        edit(lambda model: swap_writes(model, "decode")),
        r"decode: write_state layers_1_key\S*: it writes the state layers_1_key with what does not",
    ),
    "swapped state reads": everywhere(
        edit(in_both(swap_reads)),
        r"decode: write_state layers_1_value\S*: it writes the state layers_1_value with what",
    ),
    "write to another state": everywhere(
        edit(retype(rename_argument("input", "layers_1_value"), "write_state", "layers_1_key")),
        "decode: state layers_1_key is never written",
    ),
    "state that is no float16": not_alone(
        edit(in_both(state_dtype)), "decode: state layers_1_key is float32 .*; the manifest has"
    ),
    "state of an odd width": not_alone(
        edit(in_both(narrow_state)), r"layers_1_key is float16 \[1, 1, 8, 20\]; the manifest has"
    ),
    "state of one function alone": not_alone(
        edit(forget_state), "prefill: state layers_1_key is missing; the manifest has float16"
    ),
    "no prefill": not_alone(edit(forget_prefill), "has the functions decode, by default decode;"),
    "swapped blobs": Damage(
        edit(swap_blobs("decode", "prefill")),
        moved("decode", f"{UP}.data"),
        moved("decode", f"{UP}.data"),
        f"{UP}.data was altered",
    ),
    "swapped blobs in one function": everywhere(
        edit(swap_blobs("prefill")), moved("prefill", f"{UP}.data")
    ),
    "swapped blobs of one layer": Damage(
        edit(swap_blobs("decode", "prefill", second=GATE)),
        moved("decode", f"{GATE}.data"),
        moved("decode", f"{GATE}.data"),
        f"{GATE}.data was altered",
    ),
    "a blob that was written twice": everywhere(write_twice, moved("prefill", f"{UP}.data")),
    "swapped contents": Damage(
        exchange_bytes,
        r"weight.bin was altered.*layers.0.mlp_block.up_proj.weight.data was altered.*"
        r"layers.1.mlp_block.up_proj.\S+ was",
        bare=f"{UP}.data was altered.*{OTHER_UP}.data was altered",
    ),
    "a flipped bit": Damage(
        flip_bit,
        "layers.0.mlp_block.up_proj.weight.scales was altered",
        bare=f"{UP}.scales was altered",
    ),
    "swapped uses": not_alone(
        edit(swap_uses("decode", "prefill")),
        f"decode: linear {MLP}_gate_proj: it takes {UP}, which belongs to "
        "layers.0.mlp_block.up_proj",
    ),
    "truncated weights": Damage(
        truncate(100),
        SHORT,
        OUTSIDE,
        SHORT,
    ),
    "empty weights": Damage(
        truncate_to(0),
        "weight.bin is truncated: it has 0 bytes",
        OUTSIDE,
        "weight.bin is truncated: it has 0 bytes",
    ),
    "no weights": everywhere(lambda package: (package / WEIGHTS).unlink(), "weight.bin is missing"),
    "weights that are something else": everywhere(
        weights(lambda data: data.__setitem__(slice(0, 64), b"weights " * 8)),
        "weight.bin is damaged: a weight file of version",
    ),
    "no sentinel": everywhere(in_header(0, b"\0\0\0\0"), r"there is no weight at offset \d+"),
    "blob of another dtype": everywhere(
        in_header(4, struct.pack("<I", 11)), r"bytes of uint4 at \d+; the program needs .* of int4"
    ),
    "blob of another size": everywhere(
        in_header(8, struct.pack("<Q", 1 << 40)), "tells of 1099511627776 bytes"
    ),
    "blob that begins elsewhere": everywhere(in_header(16, struct.pack("<Q", 640)), "at 640; the"),
    "offset outside": everywhere(
        edit(move_blob(lambda offset: 1 << 50)), rf"bytes of a weight at {(1 << 50) + 64}"
    ),
    "offset beside": everywhere(
        edit(move_blob(lambda offset: offset + 2)), "there is no weight at offset"
    ),
    "a blob that nothing uses": Damage(append_blob, r"weight.bin has \d+ bytes instead of"),
    "wrong shape": by_the_engine(
        edit(retype(set_dimension(2, 63), "gelu", MLP)),
        r"decode: gelu layers_0_mlp_block\S+ failed: it gave float16 \(1, 1, 96\)",
    ),
    "wrong dtype": by_the_engine(
        edit(retype(set_dtype(11), "linear", f"{MLP}_up_proj")),
        "decode: linear layers_0_mlp_block_up_proj cannot be executed: it gives float32 of float16",
    ),
    "wrong weight shape": by_the_engine(
        edit(retype(set_dimension(0, 95), BLOCKWISE, UP)),
        rf"decode: {BLOCKWISE} {UP} cannot be executed: .* shapes that fit",
    ),
    "custom layer": by_the_engine(
        edit(retype(set_type("custom_layer"), "gelu", MLP)),
        "decode: custom_layer layers_0_mlp_block.* it is no operation that",
    ),
    "undefined value": by_the_engine(
        edit(retype(rename_argument("x", "nowhere"), "gelu", MLP)),
        "decode: gelu layers_0_mlp_block.*: nothing computes nowhere before it",
    ),
    "value before it is given": by_the_engine(
        edit(first_operation_last), "prefill: cast .*: nothing computes embed_tokens_gather"
    ),
    "value given twice": by_the_engine(edit(twice), "decode: gelu .* is computed twice"),
    "hashes without end": Damage(
        tell("rgexport.weights", "[" * 100_000),
        ALTERED,
        bare="metadata are damaged: it is not JSON",
    ),
    "no hashes": Damage(
        edit(lambda model: model.description.metadata.userDefined.pop("rgexport.weights")),
        ALTERED,
        bare="metadata are damaged: there is no rgexport.weights",
    ),
    "half a model": everywhere(
        lambda package: os.truncate(package / MODEL, (package / MODEL).stat().st_size // 2),
        "model.mlmodel is damaged",
    ),
    "no model": everywhere(lambda package: (package / MODEL).unlink(), "model.mlmodel is missing"),
}
ADAPTED = {case: d.adapted for case, d in DAMAGES.items() if d.adapted}
BARE = {case: d.bare for case, d in DAMAGES.items() if d.bare}


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
    damage = DAMAGES[case]
    damage.spoil(package)
    code, text = complaint(capsys, "inspect", package.parent)
    assert code == 2 and re.search(damage.named, text), text
    assert text.count("Error:") == 1 and "Traceback" not in text


@pytest.mark.parametrize("case", ADAPTED)
def test_artifact_with_adapted_hashes_is_not_run(case, package, capsys):
    DAMAGES[case].spoil(package)
    if (package / MODEL).exists() and (package / WEIGHTS).exists():
        content_hash(package)
    code, text = complaint(capsys, "generate", package.parent, "--ids", "2 3 4 5 6", "-n", "1")
    assert code == 2 and re.search(ADAPTED[case], text), text
    assert text.count("Error:") == 1 and "Traceback" not in text


@pytest.mark.parametrize("case", BARE)
def test_bare_package_is_refused(case, package, tmp_path, capsys):
    bare = package.rename(tmp_path / "bare.mlpackage")
    DAMAGES[case].spoil(bare)
    code, text = complaint(capsys, "inspect", bare)
    assert code in (1, 2) and re.search(BARE[case], text), text
    assert "Traceback" not in text


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
    assert code == 2 and re.search(moved("decode", f"{UP}.{part}"), text), text
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
