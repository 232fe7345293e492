"""Damaged packages are refused in one line that names what is wrong."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

from tests.artifacts import export_random_coreml
from tests.command_line import rgexport
from tests.export.mil import package_edits as edits
from tests.export.mil.package_edits import BLOCKWISE, OTHER_UP, UP, edit
from tests.models import make_config
from tests.validate.conftest import claim

CONFIG = make_config("ra", width=64, heads=2, vocab_size=64, window=8)


@dataclass(frozen=True)
class Damage:
    """What is done to a package, and patterns of the complaints.

    `named`: about an artifact; `adapted`: by a command that runs it, if its hashes were made to fit
    too; `bare`: about the package without its manifest. None: the same as `named`; "": none.
    """

    spoil: edits.Spoil
    named: str
    adapted: str | None = None
    bare: str | None = None


def moved(name: str) -> str:
    return rf"decode: {name} is at \d+ of weight.bin; expected at \d+"


MLP = "layers_0_mlp_block"
DAMAGES: dict[str, Damage] = {
    "dropped state write": Damage(edit(edits.drop_write), "state layers_1_key is never written"),
    "swapped state writes": Damage(
        edit(edits.swap_writes),
        r"decode: write_state layers_1_key\S*: the new value of the state layers_1_key does not",
    ),
    "state of one function alone": Damage(
        edit(edits.forget_state), "prefill: state layers_1_key is missing; expected", bare=""
    ),
    "no prefill": Damage(
        edit(lambda model: model.mlProgram.functions.pop("prefill")),
        "has decode, by default decode;",
        bare="",
    ),
    "swapped blobs": Damage(
        edit(edits.swap_blobs()), moved(f"{UP}.data"), bare=f"{UP}.data was altered"
    ),
    "swapped contents": Damage(
        edits.exchange_bytes,
        r"weight.bin was altered.*layers.0.mlp_block.up_proj.weight.data was altered.*"
        r"layers.1.mlp_block.up_proj.\S+ was",
        adapted="",
        bare=f"{UP}.data was altered.*{OTHER_UP}.data was altered",
    ),
    "another weight": Damage(
        edit(edits.in_both(edits.use_another_weight)),
        f"decode: linear {MLP}_gate_proj: it takes {UP}, which belongs to "
        rf"layers.0.mlp_block.up_proj.*decode: nothing uses {MLP}_gate_proj_weight",
        bare="",
    ),
    "truncated weights": Damage(
        lambda package: os.truncate(package / edits.WEIGHTS, 5000),
        r"it has \d+ bytes; expected \d+ bytes of a weight at",
        adapted=r"tensors\.\S+ lies outside of .*weight.bin",
    ),
    "no hashes": Damage(
        edit(lambda model: model.description.metadata.userDefined.pop("rgexport.weights")),
        "model.mlmodel has .* bytes instead of",
        adapted="",
        bare="metadata are damaged: rgexport.weights",
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
    shutil.copytree(sound, tmp_path / "artifact")
    return tmp_path / "artifact" / "model.mlpackage"


def complaint(*arguments: str | Path) -> tuple[int, str]:
    """The exit code, and all that was said in one line."""
    done = rgexport(*arguments, folder=Path())
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_sound(package):
    """The package of an artifact stands for it."""
    code, text = complaint("inspect", package)
    assert code == 0 and "No problems." in text
    assert complaint("generate", package, "--ids", "2", "-n", "2")[0] == 0


@pytest.mark.parametrize(
    ("case", "form"),
    [
        (case, form)
        for case, damage in DAMAGES.items()
        for form in ("named", "adapted", "bare")
        if getattr(damage, form) != ""
    ],
)
def test_damage_is_named(case, form, package, tmp_path):
    damage = DAMAGES[case]
    if form == "bare":
        package = package.rename(tmp_path / "bare.mlpackage")
    damage.spoil(package)
    command = ["inspect", package if form == "bare" else package.parent]
    if form == "adapted":
        claim(package.parent)
        command = ["generate", package.parent, "--ids", "2 3 4 5 6", "-n", "1"]
    code, text = complaint(*command)
    assert code == 2 or (code == 1 and form == "bare")
    assert re.search(getattr(damage, form) or damage.named, text), text
    assert "Traceback" not in text and (form == "bare" or text.count("Error:") == 1)


@pytest.mark.parametrize(
    ("precision", "options", "kind", "parameter", "part"),
    [
        ("fp32", {}, "const", "val", "data"),
        ("int4", {"symmetric": False}, BLOCKWISE, "offset", "zero_points"),
        ("pal4", {}, "constexpr_lut_to_dense", "lut", "lut"),
    ],
)
def test_swapped_blobs_of_any_kind(precision, options, kind, parameter, part, tmp_path):
    artifact, _ = export_random_coreml(CONFIG, tmp_path, precision, prefill_length=4, **options)
    package = artifact.path / "model.mlpackage"
    edit(edits.swap_blobs(parameter, kind))(package)
    code, text = complaint("inspect", artifact.path)
    assert code == 2 and re.search(moved(f"{UP}.{part}"), text), text
    code, text = complaint("inspect", package.rename(tmp_path / "bare.mlpackage"))
    assert code == 1 and f"{UP}.{part} was altered" in text
