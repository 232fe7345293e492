"""Calibration files, sound and damaged, and H as algorithms use it: shrunk, damped and positive."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from rgexport.errors import RequestError
from rgexport.griffin.layout import EMBEDDING
from rgexport.quantize.algorithms.calibration_file import (
    METADATA,
    Calibration,
    Provenance,
    arrays_of,
    is_calibration,
    linears,
    open_calibration,
    pack,
)
from rgexport.quantize.algorithms.statistics import statistics_of
from tests.models import ODD_CONFIGS

CONFIG = ODD_CONFIGS["regular"]
PROVENANCE = Provenance(
    **{"model": "toy", "files": {"model.safetensors": "ab" * 32}, "text": "»quoted« 🎒"},
    **{"tokens": 6, "gradient_tokens": 6, "tokens_sha256": "cd" * 32, "seed": 0, "tool": "test"},
)
DOWN, HESSIAN = "layers.0.mlp_block.down_proj.weight", "layers.0.mlp_block.mul.hessian.0"


def contents():
    """Positive arrays, which are sound, of the shapes that a model has."""
    rng = np.random.default_rng(0)
    texts = {
        **{"tokens": np.arange(6), "lengths": np.array([2, 4])},
        **{"held_out.tokens": np.array([9, 8, 7]), "held_out.lengths": np.array([2, 1])},
    }
    arrays = {
        name: rng.random(shape).astype(dtype)
        for name, (dtype, shape) in arrays_of(CONFIG, texts).items()
    }
    return arrays | {name: array.astype(np.int32) for name, array in texts.items()}


def write(path, arrays):
    save_file(arrays, path, PROVENANCE.as_metadata())
    return path


def test_every_matrix_has_statistics(tmp_path):
    stored = contents()
    sound = open_calibration(write(tmp_path / "sound", stored))
    assert sound.provenance == PROVENANCE and is_calibration(sound.path)
    for name, (_, columns) in linears(CONFIG).items():
        (hessian,) = sound.hessian(name)
        assert hessian.shape == (columns, columns) and (hessian == hessian.T).all()
        np.testing.assert_array_equal(sound.importance(name), np.diag(hessian))
        gradient = stored[name.replace(".weight", ".gradient")]
        np.testing.assert_array_equal(sound.output_sensitivity(name), gradient)
    shared = [f"layers.0.temporal_block.linear_{x}.weight" for x in "xy"]
    sites = dict.fromkeys(shared, "layers.0.temporal_pre_norm") | {EMBEDDING: "final_norm"}
    for name, array in sites.items():
        np.testing.assert_array_equal(pack(sound.hessian(name)[0]), stored[f"{array}.hessian.0"])
    np.testing.assert_array_equal(sound.output_sensitivity(EMBEDDING), stored["lm_head.fisher"])
    np.testing.assert_array_equal(sound.row_probability, stored["lm_head.probability"])
    np.testing.assert_array_equal(sound.token_frequency, stored["embed_tokens.frequency"])
    shares = sound.token_share, sound.row_sensitivity
    for smoothed, seen in zip(shares, (sound.row_probability, sound.row_fisher), strict=True):
        np.testing.assert_allclose(smoothed, 0.9 * seen + 0.1 * seen.mean(), rtol=1e-5)
    assert [s.tolist() for s in sound.sequences] == [[0, 1], [2, 3, 4, 5]]
    assert [s.tolist() for s in sound.held_out] == [[9, 8], [7]]
    assert sound.hessian("final_norm.weight") is sound.output_sensitivity("nothing") is None
    del stored["held_out.tokens"], stored["held_out.lengths"]
    assert open_calibration(write(tmp_path / "file", stored)).held_out == []
    sound.require_for(["ab" * 32])
    for hashes in ([], ["00" * 32], ["ab" * 32, "00" * 32]):
        with pytest.raises(RequestError, match=r"made from other weights \(toy\)"):
            sound.require_for(hashes)


def put(name, index, value):
    return lambda arrays: arrays[name].__setitem__(index, value)


def change(name, function):
    return lambda arrays: arrays.update({name: function(arrays[name])})


DAMAGED = {
    "no text": (lambda a: a.pop("tokens"), "it has no tokens"),
    "a sequence is missing": (
        lambda a: a.update(tokens=a["tokens"][:2], lengths=a["lengths"][:1]),
        "does not fit its header",
    ),
    "large lengths": (put("lengths", slice(None), 2**31 - 1), "no sequences of tokens"),
    "held-out token": (put("held_out.tokens", 0, 256), "not in the vocabulary"),
    "negative": (put("lm_head.probability", 3, -1), "negative values"),
    "short head": (change("lm_head.fisher", lambda x: x[:9]), "differ in length"),
    "NaN": (put("lm_head.fisher", 3, np.nan), "has NaN"),
    "dtype": (change("lm_head.fisher", lambda x: x.astype(np.float16)), "F16 .256.; expected F32"),
    # triangles are checked when they are read
    "NaN in a triangle": (put(HESSIAN, 7, np.nan), "has NaN"),
    "no triangle": (change(HESSIAN, lambda x: x[:-1]), "no triangle of a Hessian"),
    "negative diagonal": (put(HESSIAN, 0, -1), "no triangle of a Hessian"),
    "too wide": (change(HESSIAN, lambda x: np.zeros(4097 * 4098 // 2, np.float32)), "one axis of"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_in_one_line(case, tmp_path):
    damage, message = DAMAGED[case]
    arrays = contents()
    damage(arrays)
    path = write(tmp_path / "damaged", arrays)
    for read in (Calibration.hessian, Calibration.importance):
        with pytest.raises(RequestError, match=message) as caught:
            read(open_calibration(path), DOWN)
        assert "\n" not in str(caught.value) and "damaged" in str(caught.value)


def test_metadata_that_are_wrong(tmp_path):
    for changes, message in (
        ({"format_version": 2}, "format version 2; this rgexport reads 1: update"),
        ({"format_version": 0}, "reads 1: make it again"),
        ({"files": {"a": 1}}, "files.a is 1"),
    ):
        fields = json.loads(PROVENANCE.as_metadata()[METADATA]) | changes
        save_file(contents(), tmp_path / "file", {METADATA: json.dumps(fields)})
        with pytest.raises(RequestError, match=message):
            open_calibration(tmp_path / "file")


def test_other_files_are_no_calibration(tmp_path):
    save_file(contents(), tmp_path / "weights", {"format": "pt"})
    (tmp_path / "text").write_text("Call me Ishmael.")
    for name, message in (
        ("weights", "is a file; expected a calibration of"),
        ("text", "is not a safetensors file"),
        ("nothing", "No such file"),
        (".", "it is a folder"),
    ):
        with pytest.raises(RequestError, match=message):
            open_calibration(tmp_path / name)
        assert not is_calibration(tmp_path / name)


def inputs(tokens, k):
    return np.random.default_rng(0).standard_normal((tokens, k)).astype(np.float32)


def test_shrinks_towards_the_diagonal_by_how_few_tokens_there_are():
    x = inputs(100, 100)
    h = x.T @ x / 100
    off, parts = ~np.eye(100, dtype=bool), {}
    for tokens, share in ((100, 0.5), (10**6, 0.7), (1, 0.4)):
        (parts[tokens],) = statistics_of([h], tokens).hessians
        np.testing.assert_allclose(parts[tokens].matrix[off], share * h[off], rtol=1e-5)
    damped = np.diagonal(h) + 0.01 * np.diagonal(h).mean()
    np.testing.assert_allclose(np.diagonal(parts[100].matrix), damped, rtol=1e-5)
    small = np.diag(np.arange(1, 5, dtype=np.float32))
    identity = statistics_of([small], 100, identity=2.0)  # in units of the diagonal's mean
    np.testing.assert_allclose(identity.importance, np.arange(1, 5) + 2.01 * 2.5, rtol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_dead_inputs_have_factors(tokens):
    x = inputs(tokens, 70)
    x[:, 3] = x[:, 40:] = 0
    h = x.T @ x / max(tokens, 1)
    known = statistics_of([h[:50, :50], h[50:, 50:]], tokens)
    assert [(part.start, part.stop) for part in known.hessians] == [(0, 50), (50, 70)]
    assert (known.importance > 0).all() and len(known.importance) == 70
    for part in known.hessians:
        m = np.eye(len(part.matrix)) + part.factors.m
        np.testing.assert_allclose((m * part.factors.d) @ m.T, part.matrix, atol=1e-5)


def test_what_is_not_finite_is_refused():
    h = np.eye(8, dtype=np.float32)
    h[2, 5] = h[5, 2] = np.nan
    with pytest.raises(RequestError, match="NaN or infinite values; make them again"):
        statistics_of([np.eye(3, dtype=np.float32), h], 100)
