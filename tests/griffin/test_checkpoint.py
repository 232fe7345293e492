"""Opening checkpoints, and the problems that their headers and values show."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.files.hashing import FileRecord
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.checks import check_checkpoint, require_sound
from rgexport.griffin.huggingface import INDEX, SINGLE
from tests.deepmind import write_deepmind
from tests.models import ODD_CONFIGS, edit_header, make_config, random_weights, write_hugging_face

CONFIG = ODD_CONFIGS["wide_lru"]
SHARD = 60_000
LINEAR = "layers.2.mlp_block.down_proj.weight"
NORM = "layers.0.temporal_pre_norm.weight"


@pytest.fixture
def weights():
    return random_weights(CONFIG)


@pytest.mark.parametrize("shard_bytes", [SHARD, 10**9])
@pytest.mark.parametrize("dialect", ["_block_types", "block_types"])
def test_opens_a_folder(tmp_path, weights, shard_bytes, dialect):
    folder = tmp_path / "my-model"
    write_hugging_face(CONFIG, weights, folder, shard_bytes=shard_bytes, dialect=dialect)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.name, checkpoint.layout) == ("my-model", "hugging-face")
    assert (checkpoint.config, checkpoint.problems) == (CONFIG, ())
    assert (len(checkpoint.weight_files) > 1) == (shard_bytes == SHARD)
    assert (checkpoint.head, checkpoint.tokenizer_files) == (None, ())
    assert checkpoint.instruction_tuned is None
    for template in ("{{ x }}", None):
        settings = json.dumps({"chat_template": template} if template else {})
        (folder / "tokenizer_config.json").write_text(settings)
        assert open_checkpoint(folder).instruction_tuned is bool(template)
    assert checkpoint.weights.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(checkpoint.weights[name].whole(), array, err_msg=name)
    contents = {path.name: path.read_bytes() for path in checkpoint.weight_files.values()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    records = {n: FileRecord(sha256=hashes[n], size=len(data)) for n, data in contents.items()}
    assert require_sound(checkpoint) == records


def test_index_problems(tmp_path, weights):
    folder = write_hugging_face(CONFIG, weights, tmp_path, shard_bytes=SHARD)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    name, last = f"model.{NORM}", max(places.values())

    def problems(weight_map):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return open_checkpoint(folder).problems

    assert problems(places | {name: last}) == (
        f"missing: {NORM}",
        f"unexpected: {name} in {places[name]}, where {INDEX} does not place it",
    )
    rest = {n: file for n, file in places.items() if file != last}
    assert f"unexpected: {last}, which {INDEX} does not name" in problems(rest)
    for wrong in ("../secret", "/etc/passwd", "a\\b", "", "..", 7, None):
        with pytest.raises(RequestError, match="expected a file name in the folder"):
            problems(places | {name: wrong})
    with pytest.raises(RequestError, match="has no weight_map"):
        problems({})


def test_links_such_as_the_hub_cache_has_are_followed(tmp_path, weights):
    blobs = write_hugging_face(CONFIG, weights, tmp_path / "blobs")
    snapshot = tmp_path / "models--google--recurrentgemma-2b-it" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    for path in (snapshot, snapshot / "config.json", snapshot / SINGLE):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.name, checkpoint.problems) == ("recurrentgemma-2b-it", ())
        assert checkpoint.instruction_tuned is True


def test_deepmind_folder_and_file(tmp_path, weights):
    file = write_deepmind(weights, tmp_path / "2b-it")
    (file.parent / "tokenizer.model").write_bytes(b"")
    for path, name in ((file.parent, "2b-it"), (file, "model")):
        checkpoint = open_checkpoint(path, window=16)
        assert (checkpoint.name, checkpoint.layout, checkpoint.path) == (name, "deepmind", file)
        assert (checkpoint.config, checkpoint.problems) == (CONFIG, ())
        assert checkpoint.tokenizer_files == (file.parent / "tokenizer.model",)
    assert open_checkpoint(file.parent).instruction_tuned is True
    assert open_checkpoint(file).config.window == 2048
    (file.parent / "other.pt").write_bytes(b"")
    with pytest.raises(RequestError, match=r"holds 2 \.pt files"):
        open_checkpoint(file.parent)


@pytest.mark.parametrize("model", ["~nobody-at-all/x", "nul\0byte", "long" * 1000])
def test_names_of_no_folder(model):
    with pytest.raises(RequestError, match=r"there is no folder|File name too long"):
        open_checkpoint(model)


def test_files_that_are_missing_or_vanish(tmp_path, weights):
    checkpoint = open_checkpoint(write_hugging_face(CONFIG, weights, tmp_path))
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        check_checkpoint(checkpoint)
    with pytest.raises(RequestError, match=r"has no weights, only pytorch_model\.bin"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [("float32", np.finfo(np.float32).max), ("float16", 65504.0), ("bfloat16", 3.3895e38)],
)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_finds_what_is_not_finite(tmp_path, weights, dtype, largest, value):
    weights[LINEAR][5, 3] = weights[LINEAR][7, 0] = value
    weights[NORM][:2], weights[NORM][-1] = (largest, -largest), value
    write_hugging_face(CONFIG, weights, tmp_path, dtype=dtype)
    assert check_checkpoint(open_checkpoint(tmp_path)).problems == (
        f"NaN/Inf: {NORM} (1 value, the first in row {CONFIG.width - 1})",
        f"NaN/Inf: {LINEAR} (2 values, the first in row 5)",
    )


def test_the_head_must_equal_the_embedding(tmp_path, weights):
    coarse = weights["embed_tokens.weight"].astype(np.float16)
    embedding = weights["embed_tokens.weight"] = coarse.astype(np.float32)
    changed = embedding.copy()
    changed[[3, 9]] += 1e-3

    def problems(head):
        checkpoint = open_checkpoint(write_hugging_face(CONFIG, weights, tmp_path, head=head))
        assert "lm_head.weight" not in checkpoint.weights
        return check_checkpoint(checkpoint).problems

    assert problems(embedding) == problems(coarse) == ()
    assert problems(changed) == (
        "untied head: lm_head.weight differs from embed_tokens.weight in 2 of 256 rows "
        "(expected a copy)",
    )
    (problem,) = problems(embedding[:-1])
    assert problem.startswith("wrong shape: lm_head.weight does")


def test_one_message_names_all_problems(tmp_path, weights):
    weights[LINEAR][0, 0] = np.nan
    del weights[NORM]
    weights["layers.0.extra"] = np.zeros(3, np.float32)
    weights["final_norm.weight"] = np.zeros(3, np.float32)
    write_hugging_face(CONFIG, weights, tmp_path)
    name = "layers.1.temporal_pre_norm.weight"  # which may lack its prefix
    half = {"dtype": "I16", "shape": [2, CONFIG.width]}
    edit_header(tmp_path, lambda h: h.update({name: h.pop(f"model.{name}") | half}))
    with pytest.raises(RequestError) as caught:
        require_sound(open_checkpoint(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path} cannot be used, it has 5 problems: missing: {NORM}; "
        "wrong dtype: layers.1.temporal_pre_norm.weight is I16 (expected float32, float16, "
        "bfloat16); wrong shape: final_norm.weight is [3] (expected [64]); "
        f"unexpected: layers.0.extra; NaN/Inf: {LINEAR} (1 value, the first in row 0)"
    )


MEMORY = """
import resource, sys
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.checks import check_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
check_checkpoint(checkpoint)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A `.pt` of 340 MB is read within 60 MB; `tests/export` shows it of the other layout."""
    config = make_config("ra", width=1024, heads=4, mlp_width=16_384, vocab_size=20_000)
    file = write_deepmind(random_weights(config), tmp_path)
    assert file.stat().st_size > 300 << 20
    command = [sys.executable, "-c", MEMORY, str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 60
