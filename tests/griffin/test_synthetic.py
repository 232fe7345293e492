"""Random checkpoints look like trained ones and are complete model folders."""

import json

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import demo_folder, open_checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.config import SIZES, GriffinConfig, ReleasedModel
from rgexport.griffin.synthetic import random_weights, write_random
from rgexport.griffin.tensor import DTYPES
from tests.models import make_config

CONFIG = make_config("rra", width=256, heads=2, mlp_width=512, vocab_size=4096)


def test_a_folder_in_shards(tmp_path):
    write_random(CONFIG, tmp_path / "m", shard_bytes=2 << 20)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert (checkpoint.config, checkpoint.problems) == (CONFIG, ())
    assert checkpoint.tokenizer_files == ()  # of the demo's 8,192 pieces, none fits
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {DTYPES["bfloat16"]}
    assert len(require_sound(checkpoint)) == len(checkpoint.weight_files) > 1
    assert all(path.stat().st_size < 2.1 * (1 << 20) for path in checkpoint.weight_files.values())


def values(name: str, config: GriffinConfig = CONFIG) -> np.ndarray:
    return random_weights(config)[name].whole().astype(np.float64)


def test_values_are_spread_as_trained_ones():
    """Linears have unit gain and a few loud columns, and decays come near to one."""
    scaled = values("layers.0.mlp_block.down_proj.weight") * np.sqrt(CONFIG.mlp_width)
    stds = scaled.std(axis=0)
    assert np.median(stds) == pytest.approx(1, abs=0.05) and (stds > 4).sum() == 1
    hidden = np.random.default_rng(0).standard_normal((8, CONFIG.width))
    assert (hidden @ values("embed_tokens.weight").T).std() == pytest.approx(1, abs=0.1)
    recurrent = make_config("r", width=2048, heads=2)
    param = values("layers.0.temporal_block.rg_lru.recurrent_param", recurrent)
    slowness = -np.expm1(-8 * np.log1p(np.exp(param)))  # 1 - a with an open gate
    assert 9e-6 < slowness.min() < 2e-5 and 0.08 < slowness.max() < 0.11
    assert (slowness < 1e-4).mean() == pytest.approx(0.25, abs=0.05)


def test_targets_are_guarded(tmp_path):
    target = tmp_path / "m"
    write_random(CONFIG, target)
    with pytest.raises(RequestError, match="exists; pass --force"):
        write_random(CONFIG, target)
    write_random(CONFIG, target, seed=5, force=True)
    assert json.loads((target / "config.json").read_text())["rgexport_random"] == {"seed": 5}
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="holds something else"):
        write_random(CONFIG, trained, force=True)
    assert [path.name for path in trained.iterdir()] == ["config.json"]
    with pytest.raises(RequestError, match="not enough space"):
        write_random(make_config("r" * 100, width=2**20, heads=2), tmp_path / "large")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(("word", "chat"), [("2b", False), ("9b-it", True)])
def test_tokenizer_and_dialect_of_a_size(tmp_path, monkeypatch, word, chat):
    """The demo's pieces, and others up to the size of the vocabulary."""
    config = make_config("r", width=32, heads=2, vocab_size=9000)
    monkeypatch.setitem(SIZES, word, ReleasedModel("", config, chat))
    write_random(word, tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert ("block_types" in fields, "_block_types" in fields) == (chat, not chat)
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert ("chat_template" in settings) == chat
    old, new = (
        SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for folder in (demo_folder(), tmp_path / "m")
    )
    assert new.vocab_size() == 9000
    for text in ("some more words", "w8350 ▁w8350 naïve"):
        assert new.encode(text) == old.encode(text)
    assert new.decode([old.vocab_size() + 7]).strip() == f"w{old.vocab_size() + 7}"
