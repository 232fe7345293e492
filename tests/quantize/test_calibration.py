"""The calibration file: its triangles and blocks, and files that are not what they seem."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rgexport.errors import RequestError
from rgexport.griffin.layout import EMBEDDING
from rgexport.quantize.calibration import Calibration, is_calibration, open_calibration
from rgexport.quantize.calibration_format import (
    METADATA,
    Provenance,
    arrays_of,
    column_blocks,
    diagonal,
    linears,
    pack,
    triangle_size,
    triangle_width,
    unpack,
)
from tests.models import ODD_CONFIGS

CONFIG = ODD_CONFIGS["regular"]
PROVENANCE = Provenance(
    model="toy",
    files={"model.safetensors": "ab" * 32},
    tokens=6,
    gradient_tokens=6,
    text="»quoted« 🎒",
    tokens_sha256="cd" * 32,
    seed=0,
    tool="test",
)
DOWN = "layers.0.mlp_block.down_proj.weight"
MIXING_INPUT = "layers.0.temporal_pre_norm"

Contents = dict[str, np.ndarray]


def contents() -> Contents:
    """Positive arrays, which are sound, of the shapes that a model has."""
    rng = np.random.default_rng(0)
    arrays: Contents = {}
    texts = {
        "tokens": np.arange(6),
        "lengths": np.array([2, 4]),
        "held_out.tokens": np.array([9, 8, 7]),
        "held_out.lengths": np.array([2, 1]),
    }
    for name, (dtype, shape) in arrays_of(CONFIG, texts).items():
        arrays[name] = rng.random(shape).astype(dtype)
    return arrays | {name: array.astype(np.int32) for name, array in texts.items()}


def write(path: Path, arrays: Contents, provenance: Provenance = PROVENANCE) -> Path:
    save_file(arrays, path, provenance.as_metadata())
    return path


@pytest.fixture
def sound(tmp_path: Path) -> Calibration:
    return open_calibration(write(tmp_path / "sound", contents()))


@given(st.integers(1, 40))
def test_a_triangle_is_the_whole_matrix(width: int) -> None:
    half = np.random.default_rng(width).standard_normal((width, width)).astype(np.float32)
    matrix = half + half.T
    packed = pack(matrix)
    np.testing.assert_array_equal(packed, matrix[np.tril_indices(width)])
    assert len(packed) == triangle_size(width) and triangle_width(len(packed)) == width
    np.testing.assert_array_equal(unpack(packed, width), matrix)
    np.testing.assert_array_equal(diagonal(packed, width), np.diag(matrix))


@given(st.integers(1, 40_000))
def test_blocks_cover_the_columns_and_cut_no_quantization_block(columns: int) -> None:
    bounds = column_blocks(columns)
    assert [0, *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), columns]
    widths = [stop - start for start, stop in bounds]
    assert max(widths) <= 4096 and (columns > 4096) == (len(bounds) > 1)
    assert all(start % 128 == 0 for start, _ in bounds)
    assert max(widths[:-1], default=widths[0]) - widths[-1] <= 128 * len(widths)


def test_every_matrix_has_statistics(sound: Calibration) -> None:
    stored = contents()
    assert sound.provenance == PROVENANCE and is_calibration(sound.path)
    for name, (rows, columns) in linears(CONFIG).items():
        (hessian,) = sound.hessian(name) or []
        assert hessian.shape == (columns, columns) and (hessian == hessian.T).all()
        np.testing.assert_array_equal(sound.importance(name), np.diag(hessian))
        sensitivity = sound.output_sensitivity(name)
        assert sensitivity is not None and sensitivity.shape == (rows,)
        np.testing.assert_array_equal(sensitivity, stored[name.replace(".weight", ".gradient")])
        assert sound.sensitivity(name) == pytest.approx(float(sensitivity.mean()))
    for letter in "xy":  # they share an input
        (shared,) = sound.hessian(f"layers.0.temporal_block.linear_{letter}.weight") or []
        np.testing.assert_array_equal(pack(shared), stored[f"{MIXING_INPUT}.hessian.0"])
    (head,) = sound.hessian(EMBEDDING) or []
    np.testing.assert_array_equal(pack(head), stored["final_norm.hessian.0"])
    np.testing.assert_array_equal(sound.output_sensitivity(EMBEDDING), stored["lm_head.fisher"])
    np.testing.assert_array_equal(sound.row_probability, stored["lm_head.probability"])
    np.testing.assert_array_equal(sound.token_frequency, stored["embed_tokens.frequency"])
    for found, seen in (
        (sound.token_share, sound.row_probability),
        (sound.row_sensitivity, sound.row_fisher),
    ):
        assert found.sum() == pytest.approx(seen.sum(), rel=1e-5)
        np.testing.assert_allclose(found, 0.9 * seen + 0.1 * seen.mean(), rtol=1e-5)
    assert [s.tolist() for s in sound.sequences] == [[0, 1], [2, 3, 4, 5]]
    assert [s.tolist() for s in sound.held_out] == [[9, 8], [7]]


def test_nothing_need_be_held_out(tmp_path: Path) -> None:
    arrays = contents()
    del arrays["held_out.tokens"], arrays["held_out.lengths"]
    assert open_calibration(write(tmp_path / "file", arrays)).held_out == []


@pytest.mark.parametrize("name", ["final_norm.weight", "layers.0.temporal_block.conv_1d.weight",
                                  "layers.99.mlp_block.up_proj.weight", "nothing"])  # fmt: skip
def test_other_tensors_have_none(sound: Calibration, name: str) -> None:
    assert sound.hessian(name) is None and sound.importance(name) is None
    assert sound.sensitivity(name) is None


def test_only_the_model_it_was_made_from_is_accepted(sound: Calibration) -> None:
    sound.require_for(["ab" * 32])
    for hashes in ([], ["00" * 32], ["ab" * 32, "00" * 32]):
        with pytest.raises(RequestError, match=r"made from other weights \(toy\)"):
            sound.require_for(hashes)


HESSIAN = "layers.0.mlp_block.mul.hessian.0"
Damage = Callable[[Contents], object]
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no text": (lambda a: a.pop("tokens"), "it has no tokens"),
    "text is cut": (lambda a: a.update(tokens=a["tokens"][:5]), "do not add up"),
    "a sequence is missing": (
        lambda a: a.update(tokens=a["tokens"][:2], lengths=a["lengths"][:1]),
        "does not fit its header",
    ),
    "negative token": (lambda a: a["tokens"].__setitem__(0, -1), "tokens has negative ids"),
    "lengths": (lambda a: a["lengths"].__setitem__(0, 3), "do not add up"),
    "held out": (lambda a: a["held_out.lengths"].__setitem__(0, 0), "do not add up"),
    "no lengths": (lambda a: a.pop("held_out.lengths"), "it has no held_out.lengths"),
    "held-out token": (lambda a: a["held_out.tokens"].__setitem__(0, 256), "not in the vocab"),
    "large lengths": (lambda a: a["lengths"].__setitem__(slice(None), 2**31 - 1), "do not add up"),
    "token": (lambda a: a["tokens"].__setitem__(0, 256), "not in the vocabulary"),
    "no head": (lambda a: a.pop("lm_head.fisher"), "it has no lm_head.fisher"),
    "NaN": (lambda a: a["lm_head.fisher"].__setitem__(3, np.nan), "NaN or infinite"),
    "negative": (lambda a: a["lm_head.probability"].__setitem__(3, -1), "negative values"),
    "short head": (lambda a: a.update({"lm_head.fisher": a["lm_head.fisher"][:9]}), "in length"),
    "dtype": (
        lambda a: a.update({"lm_head.fisher": a["lm_head.fisher"].astype(np.float16)}),
        "is F16 .256.; expected F32",
    ),
    "axes": (lambda a: a.update({"lm_head.fisher": a["lm_head.fisher"][None]}), "and one axis"),
    # triangles are checked when they are read
    "NaN in a triangle": (lambda a: a[HESSIAN].__setitem__(7, np.nan), "NaN or infinite"),
    "no triangle": (lambda a: a.update({HESSIAN: a[HESSIAN][:-1]}), "no triangle of a Hessian"),
    "negative diagonal": (lambda a: a[HESSIAN].__setitem__(0, -1), "no triangle of a Hessian"),
    "too wide": (
        lambda a: a.update({HESSIAN: np.zeros(triangle_size(4097), np.float32)}),
        "one axis of at most",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[case]
    arrays = contents()
    damage(arrays)
    path = write(tmp_path / "damaged", arrays)
    for read in (Calibration.hessian, Calibration.importance):
        with pytest.raises(RequestError, match=message) as caught:
            read(open_calibration(path), DOWN)
        assert "\n" not in str(caught.value) and "damaged" in str(caught.value)


METADATA_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "newer": ({"format_version": 2}, "format version 2; this rgexport reads 1: update"),
    "older": ({"format_version": 0}, "reads 1: make it again"),
    "tokens": ({"tokens": "6"}, "no valid tokens"),
    "bool": ({"seed": True}, "no valid seed"),
    "files": ({"files": {"a": 1}}, "no valid files"),
    "no model": ({"model": None}, "no valid model"),
}


@pytest.mark.parametrize("case", METADATA_CASES)
def test_metadata_that_are_wrong(case: str, tmp_path: Path) -> None:
    change, message = METADATA_CASES[case]
    fields = json.loads(PROVENANCE.as_metadata()[METADATA]) | change
    save_file(contents(), tmp_path / "file", {METADATA: json.dumps(fields)})
    with pytest.raises(RequestError, match=message):
        open_calibration(tmp_path / "file")


def test_other_files_are_no_calibration(tmp_path: Path) -> None:
    save_file(contents(), tmp_path / "weights", {"format": "pt"})
    (tmp_path / "text").write_text("Call me Ishmael.")
    for name, message in (
        ("weights", "is not a calibration; expected a file that"),
        ("text", "is not a safetensors file"),
        ("nothing", "there is no such file"),
        (".", "it is a folder"),
    ):
        with pytest.raises(RequestError, match=message):
            open_calibration(tmp_path / name)
        assert not is_calibration(tmp_path / name)


@settings(deadline=None)
@given(st.data())
def test_changed_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.mktemp("changed") / "file", contents())
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header + 200))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(RequestError):
        found = open_calibration(path)
        for name in [*linears(CONFIG), EMBEDDING]:
            for read in (found.hessian, found.importance, found.sensitivity):
                read(name)
