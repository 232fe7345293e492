"""Opening checkpoints: places, names and problems."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.griffin import checkpoint as module
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.huggingface import INDEX, SINGLE
from rgexport.griffin.safetensors_writer import write_weights
from tests.deepmind import write_deepmind
from tests.models import (
    ODD_CONFIGS,
    Weights,
    edit_header,
    random_weights,
    weight_source,
    write_hugging_face,
)

CONFIG = ODD_CONFIGS["wide_lru"]
SHARD = 60_000


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(CONFIG)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shard_bytes", [SHARD, 10**9])
@pytest.mark.parametrize("dialect", ["_block_types", "block_types"])
def test_opens_a_folder(tmp_path: Path, weights: Weights, shard_bytes: int, dialect: Any) -> None:
    folder = tmp_path / "my-model"
    write_hugging_face(CONFIG, weights, folder, shard_bytes=shard_bytes, dialect=dialect)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.name, checkpoint.layout) == ("my-model", "hugging-face")
    assert (checkpoint.config, checkpoint.problems) == (CONFIG, ())
    assert (len(checkpoint.weight_files) > 1) == (shard_bytes == SHARD)
    assert (checkpoint.head, checkpoint.tokenizer_files) == (None, ())
    assert checkpoint.instruction_tuned is None
    assert checkpoint.weights.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(checkpoint.weights[name].whole(), array, err_msg=name)


def test_names_may_lack_the_prefix(tmp_path: Path, weights: Weights) -> None:
    folder = write_hugging_face(CONFIG, weights, tmp_path)
    edit_header(folder, lambda h: [h.update({n.removeprefix("model."): h.pop(n)}) for n in [*h]])
    assert open_checkpoint(folder).problems == ()


def test_all_problems_are_listed(tmp_path: Path, weights: Weights) -> None:
    folder = write_hugging_face(CONFIG, weights, tmp_path)
    broken = dict(weights)
    del broken["layers.0.temporal_pre_norm.weight"]
    broken["layers.1.mlp_block.up_proj.bias"] = np.zeros(95, np.float32)
    broken["layers.9.extra"] = np.zeros(1, np.float32)
    write_weights(folder, weight_source(broken))
    half = {"dtype": "I16", "shape": [2, CONFIG.width]}
    edit_header(folder, lambda h: h["model.final_norm.weight"].update(half))
    assert open_checkpoint(folder).problems == (
        "missing: layers.0.temporal_pre_norm.weight",
        "wrong shape: layers.1.mlp_block.up_proj.bias is [95] (expected [96])",
        "wrong dtype: final_norm.weight is I16 (expected float32, float16, bfloat16)",
        "unexpected: layers.9.extra",
    )


def test_a_saved_head_is_set_apart(tmp_path: Path, weights: Weights) -> None:
    head = weights["embed_tokens.weight"]
    for array, problems in ((head, ()), (head[:-1], ("wrong shape: lm_head.weight",))):
        checkpoint = open_checkpoint(write_hugging_face(CONFIG, weights, tmp_path, head=array))
        assert "lm_head.weight" not in checkpoint.weights
        assert [p.partition(" does")[0] for p in checkpoint.problems] == list(problems)
        assert (checkpoint.head is None) == bool(problems)


def test_index_problems(tmp_path: Path, weights: Weights) -> None:
    folder = write_hugging_face(CONFIG, weights, tmp_path, shard_bytes=SHARD)
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    name = "model.layers.0.temporal_pre_norm.weight"
    shards = sorted(set(places.values()))

    def problems(weight_map: Any) -> tuple[str, ...]:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return open_checkpoint(folder).problems

    assert problems(places) == ()
    assert problems(places | {name: shards[-1]}) == (
        f"unexpected: {name} in {places[name]}, where {INDEX} does not place it",
        "missing: layers.0.temporal_pre_norm.weight",
    )
    rest = {n: file for n, file in places.items() if file != shards[0]}
    assert f"unexpected: {shards[0]}, which {INDEX} does not name" in problems(rest)
    for wrong in ("../secret", "/etc/passwd", "a\\b", "", "..", 7, None):
        with pytest.raises(RequestError, match="expected a file name in the folder"):
            problems(places | {name: wrong})
    with pytest.raises(RequestError, match=r"has no model-9.safetensors, which"):
        problems(places | {name: "model-9.safetensors"})
    with pytest.raises(RequestError, match="has no weight_map"):
        problems({})
    (folder / INDEX).write_text("no JSON")
    with pytest.raises(RequestError, match="is not JSON"):
        open_checkpoint(folder)


def test_links_such_as_the_hub_cache_has_are_followed(tmp_path: Path, weights: Weights) -> None:
    blobs = write_hugging_face(CONFIG, weights, tmp_path / "blobs")
    snapshot = tmp_path / "models--google--recurrentgemma-2b-it" / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    checkpoint = open_checkpoint(snapshot)
    assert (checkpoint.name, checkpoint.problems) == ("recurrentgemma-2b-it", ())
    assert checkpoint.instruction_tuned is True


@pytest.mark.skipif(sys.platform != "linux", reason="names must be Unicode elsewhere")
def test_a_name_that_is_not_utf8(tmp_path: Path, weights: Weights) -> None:
    folder = write_hugging_face(CONFIG, weights, tmp_path / os.fsdecode(b"mod\xe8le"))
    assert open_checkpoint(folder).name == "mod\ufffdle"
    file = write_deepmind(weights, folder).rename(folder / os.fsdecode(b"\xe8.pt"))
    assert open_checkpoint(file).name == "\ufffd"


@pytest.mark.parametrize(
    ("name", "template", "tuned"),
    [
        ("recurrentgemma-2b", True, False),
        ("recurrentgemma-9b-it", False, True),
        ("something", True, True),
        ("something", False, False),
    ],
)
def test_instruction_tuned(
    tmp_path: Path, weights: Weights, name: str, template: bool, tuned: bool
) -> None:
    folder = write_hugging_face(CONFIG, weights, tmp_path / name)
    settings = {"chat_template": "{{ x }}"} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.instruction_tuned is tuned
    assert checkpoint.tokenizer_files == (folder / "tokenizer_config.json",)


def test_deepmind_folder_and_file(tmp_path: Path, weights: Weights) -> None:
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a model is needed"),
        ({"model": "x", "size": "2b"}, "both a model"),
        ({"size": "3b"}, "--size is '3b'; expected one of demo, 2b, 2b-it, 9b, 9b-it"),
        ({"model": "/no/such/folder"}, "there is no folder /no/such/folder"),
        ({"model": "nothing"}, "there is no folder nothing"),
        ({"model": "~nobody-at-all/x"}, "there is no folder ~nobody-at-all/x"),
        ({"model": "long" * 1000}, "cannot be read: File name too long"),
        ({"model": "nul\0byte"}, "there is no folder nul"),
        ({"size": "2b", "window": 0}, "--window is 0; expected at least 1"),
        ({"size": "2b", "soft_cap": -1.0}, "--soft-cap is -1"),
        ({"size": "2b", "soft_cap": float("nan")}, "--soft-cap is nan"),
    ],
)
def test_wrong_requests(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_checkpoint(**arguments)


def test_folders_that_are_no_checkpoint(tmp_path: Path, weights: Weights) -> None:
    with pytest.raises(RequestError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)
    folder = write_hugging_face(CONFIG, weights, tmp_path / "model")
    with pytest.raises(RequestError, match="is a file; expected a model folder"):
        open_checkpoint(folder / SINGLE)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"has no weights, only pytorch_model\.bin"):
        open_checkpoint(folder)


def test_the_demo(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rgexport" / "griffin"
    monkeypatch.setattr(module, "__file__", str(package / "checkpoint.py"))
    with pytest.raises(RequestError, match="not bundled with this install"):
        open_checkpoint(size="demo")
    repository = write_hugging_face(CONFIG, weights, tmp_path / "demo" / "model")
    assert open_checkpoint(size="demo").path == repository
    installed = write_hugging_face(CONFIG, weights, tmp_path / "rgexport" / "demo_model")
    checkpoint = open_checkpoint(size="demo")
    assert (checkpoint.name, checkpoint.path) == ("demo", installed)
