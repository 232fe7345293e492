"""Problems that only the values show, and hashes of files."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.files.hashing import FileRecord
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.checks import check_checkpoint, require_sound
from rgexport.griffin.huggingface import SINGLE
from rgexport.griffin.inventory import summarize
from rgexport.griffin.tensor import DTYPES
from tests.models import ODD_CONFIGS, Weights, random_weights, write_hugging_face

CONFIG = ODD_CONFIGS["not_by_32"]
LINEAR = "layers.2.mlp_block.down_proj.weight"
NORM = "layers.0.temporal_pre_norm.weight"


@pytest.fixture
def weights() -> Weights:
    return random_weights(CONFIG)


def test_a_sound_checkpoint_gives_the_hashes_of_its_files(tmp_path: Path, weights: Weights) -> None:
    write_hugging_face(CONFIG, weights, tmp_path, shard_bytes=30_000)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.weight_files) > 2
    assert require_sound(checkpoint) == {
        path.name: FileRecord(
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size
        )
        for path in checkpoint.weight_files.values()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_finds_what_is_not_finite(
    tmp_path: Path, weights: Weights, dtype: str, value: float
) -> None:
    weights[LINEAR][5, 3] = weights[LINEAR][7, 0] = value
    weights[NORM][-1] = value
    write_hugging_face(CONFIG, weights, tmp_path, dtype=dtype)
    assert check_checkpoint(open_checkpoint(tmp_path)).problems == (
        f"NaN/Inf: {NORM} (1 value, the first in row {CONFIG.width - 1})",
        f"NaN/Inf: {LINEAR} (2 values, the first in row 5)",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_values_pass(tmp_path: Path, weights: Weights, dtype: str) -> None:
    largest = {"float32": np.finfo(np.float32).max, "float16": 65504.0, "bfloat16": 3.3895e38}
    weights[NORM][:2] = largest[dtype], -largest[dtype]
    write_hugging_face(CONFIG, weights, tmp_path, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert np.isfinite(checkpoint.weights[NORM].whole().astype(np.float64)).all()
    assert check_checkpoint(checkpoint).problems == ()


def test_the_head_must_equal_the_embedding(tmp_path: Path, weights: Weights) -> None:
    head = weights["embed_tokens.weight"].copy()
    write_hugging_face(CONFIG, weights, tmp_path, head=head)
    assert check_checkpoint(open_checkpoint(tmp_path)).problems == ()
    head[[3, 9]] += 1e-3
    write_hugging_face(CONFIG, weights, tmp_path, head=head)
    assert check_checkpoint(open_checkpoint(tmp_path)).problems == (
        "untied head: lm_head.weight differs from embed_tokens.weight in 2 of 101 rows "
        "(expected a copy)",
    )


def test_a_head_of_another_dtype_is_compared_by_value(tmp_path: Path, weights: Weights) -> None:
    coarse = weights["embed_tokens.weight"].astype(np.float16)
    weights["embed_tokens.weight"] = coarse.astype(np.float32)
    write_hugging_face(CONFIG, weights, tmp_path, head=coarse)
    assert check_checkpoint(open_checkpoint(tmp_path)).problems == ()


def test_one_message_names_all_problems(tmp_path: Path, weights: Weights) -> None:
    weights[LINEAR][0, 0] = np.nan
    del weights[NORM]
    weights["layers.0.extra"] = np.zeros(3, np.float32)
    weights["final_norm.weight"] = np.zeros(3, np.float32)
    write_hugging_face(CONFIG, weights, tmp_path)
    with pytest.raises(RequestError) as caught:
        require_sound(open_checkpoint(tmp_path))
    message = str(caught.value)
    assert message == (
        f"{tmp_path} cannot be used, it has 4 problems: missing: {NORM}; "
        "wrong shape: final_norm.weight is [3] (expected [40]); unexpected: layers.0.extra; "
        f"NaN/Inf: {LINEAR} (1 value, the first in row 0)"
    )


def test_long_lists_are_shortened() -> None:
    problems = [f"missing: t{i}" for i in range(10)] + ["unexpected: u"]
    assert summarize(problems, 3) == "missing: t0, t1, t2 and 7 more; unexpected: u"


def test_a_file_that_vanishes_is_one_line(tmp_path: Path, weights: Weights) -> None:
    write_hugging_face(CONFIG, weights, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        check_checkpoint(checkpoint)
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        check_checkpoint(checkpoint)


MEMORY = """
import resource, sys
from pathlib import Path
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.checks import check_checkpoint
from rgexport.files.hashing import FileRecord
checkpoint = open_checkpoint(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
check_checkpoint(checkpoint)
for tensor in checkpoint.weights.values():
    for _, rows in tensor.slabs(8 << 20):
        rows.sum()
print((peak() - before) // 1024)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("layout", ["hf", "pt"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, layout: str) -> None:
    """A model of 340 MB is read within 60 MB."""
    from tests.deepmind import write_deepmind
    from tests.models import make_config

    config = make_config("ra", width=1024, heads=4, mlp_width=16_384, vocab_size=20_000)
    weights = random_weights(config)
    assert sum(array.nbytes for array in weights.values()) > 300 << 20
    if layout == "hf":
        write_hugging_face(config, weights, tmp_path)
    else:
        write_deepmind(weights, tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 60
