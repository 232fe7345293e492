"""Damaged packages are refused in one line that names what is wrong."""

import re
import shutil
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
    MODEL,
    OTHER_UP,
    UP,
    WEIGHTS,
    Spoil,
    content_hash,
    drop_write,
    edit,
    exchange_bytes,
    forget_prefill,
    forget_state,
    in_both,
    retype,
    set_dimension,
    set_dtype,
    swap_blobs,
    swap_writes,
    tell,
    truncate,
    use_another_weight,
)
from tests.models import make_config

CONFIG = make_config("ra", width=64, heads=2, vocab_size=64, window=8)


@dataclass(frozen=True)
class Damage:
    """What is done to a package, and patterns of the complaints.

    `named`: about an artifact; `adapted`: by a command that runs it, if its hashes were made to fit
    too; `bare`: about the package without its manifest. None: the same as `named`; "": none.
    """

    spoil: Spoil
    named: str
    adapted: str | None = None
    bare: str | None = None


def moved(function: str, name: str) -> str:
    return rf"{function}: {name} is at \d+ of weight.bin; expected at \d+"


ALTERED = r"model.mlmodel (was altered|has \d+ bytes instead of)"
MLP = "layers_0_mlp_block"
DAMAGES: dict[str, Damage] = {
    "dropped state write": Damage(
        edit(drop_write("layers_1_key", "decode")), "decode: state layers_1_key is never written"
    ),
    "swapped state writes": Damage(
        edit(lambda model: swap_writes(model, "decode")),
        r"decode: write_state layers_1_key\S*: it writes the state layers_1_key with what does not",
    ),
    "state of one function alone": Damage(
        edit(forget_state),
        "prefill: state layers_1_key is missing; the manifest has float16",
        bare="",
    ),
    "no prefill": Damage(
        edit(forget_prefill), "has the functions decode, by default decode;", bare=""
    ),
    "swapped blobs": Damage(
        edit(swap_blobs("decode", "prefill")),
        moved("decode", f"{UP}.data"),
        bare=f"{UP}.data was altered",
    ),
    "swapped blobs in one function": Damage(
        edit(swap_blobs("prefill")), moved("prefill", f"{UP}.data")
    ),
    "swapped contents": Damage(
        exchange_bytes,
        r"weight.bin was altered.*layers.0.mlp_block.up_proj.weight.data was altered.*"
        r"layers.1.mlp_block.up_proj.\S+ was",
        adapted="",
        bare=f"{UP}.data was altered.*{OTHER_UP}.data was altered",
    ),
    "another weight": Damage(
        edit(in_both(use_another_weight)),
        f"decode: linear {MLP}_gate_proj: it takes {UP}, which belongs to "
        rf"layers.0.mlp_block.up_proj.*decode: nothing uses {MLP}_gate_proj_weight",
        bare="",
    ),
    "truncated weights": Damage(
        truncate(100),
        r"it has \d+ bytes; expected \d+ bytes of a weight at",
        adapted=r"tensors\.\S+ lies outside of .*weight.bin",
    ),
    "wrong shape": Damage(
        edit(retype(set_dimension(2, 63), "gelu", MLP)),
        ALTERED,
        r"decode: gelu layers_0_mlp_block\S+ failed: it gave float16 \(1, 1, 96\)",
        bare="",
    ),
    "wrong dtype": Damage(
        edit(retype(set_dtype(11), "linear", f"{MLP}_up_proj")),
        ALTERED,
        "decode: linear layers_0_mlp_block_up_proj cannot be executed: it gives float32 of float16",
        bare="",
    ),
    "hashes without end": Damage(
        tell("rgexport.weights", "[" * 100_000),
        ALTERED,
        adapted="",
        bare="metadata are damaged: it is not JSON",
    ),
    "no hashes": Damage(
        edit(lambda model: model.description.metadata.userDefined.pop("rgexport.weights")),
        ALTERED,
        adapted="",
        bare="metadata are damaged: there is no rgexport.weights",
    ),
}


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


@pytest.mark.parametrize(
    ("case", "form"),
    [
        (case, form)
        for case, damage in DAMAGES.items()
        for form in ("named", "adapted", "bare")
        if getattr(damage, form) != ""
    ],
)
def test_damage_is_named(case, form, package, tmp_path, capsys):
    damage = DAMAGES[case]
    if form == "bare":
        package = package.rename(tmp_path / "bare.mlpackage")
    damage.spoil(package)
    command = ["inspect", package if form == "bare" else package.parent]
    if form == "adapted":
        content_hash(package)
        command = ["generate", package.parent, "--ids", "2 3 4 5 6", "-n", "1"]
    code, text = complaint(capsys, *command)
    assert code == 2 or (code == 1 and form == "bare")
    assert re.search(getattr(damage, form) or damage.named, text), text
    assert "Traceback" not in text and (form == "bare" or text.count("Error:") == 1)


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


@pytest.mark.full
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
