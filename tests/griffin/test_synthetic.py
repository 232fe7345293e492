"""Random checkpoints look like trained ones and are complete model folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from rgexport.errors import RequestError
from rgexport.griffin import checkpoint, synthetic
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.huggingface import INDEX
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.sizes import CONFIG_2B, CONFIG_9B, SIZES, Size
from rgexport.griffin.synthetic import random_weights, write_random
from rgexport.griffin.tensor import DTYPES
from tests.models import ODD_CONFIGS, make_config

CONFIG = make_config("rra", width=256, heads=2, mlp_width=512, vocab_size=4096)


def test_a_folder_in_shards(tmp_path: Path) -> None:
    write_random(CONFIG, tmp_path / "m", shard_bytes=2 << 20)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert (checkpoint.config, checkpoint.problems) == (CONFIG, ())
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {DTYPES["bfloat16"]}
    assert len(require_sound(checkpoint)) == len(checkpoint.weight_files) > 1
    assert all(path.stat().st_size < 2.1 * (1 << 20) for path in checkpoint.weight_files.values())
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in checkpoint.weights.values())
    for name, tensor in random_weights(CONFIG).items():
        np.testing.assert_array_equal(checkpoint.weights[name].whole(), tensor.whole())


@pytest.mark.parametrize("name", ODD_CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_dtype(name: str, dtype: str) -> None:
    config = ODD_CONFIGS[name]
    weights = random_weights(config, dtype=dtype)
    assert {n: t.shape for n, t in weights.items()} == {
        n: spec.shape for n, spec in model_tensors(config).items()
    }
    for tensor in weights.values():
        whole = tensor.whole()
        assert (whole.dtype, whole.shape) == (DTYPES[dtype], tensor.shape)
        assert np.isfinite(whole.astype(np.float32)).all()


def test_rows_do_not_depend_on_how_they_are_read() -> None:
    for name, tensor in random_weights(CONFIG).items():
        whole = random_weights(CONFIG)[name].whole()
        for start, rows in tensor.slabs(1000):
            np.testing.assert_array_equal(rows, whole[start : start + len(rows)], err_msg=name)


def test_the_seed_decides() -> None:
    first, again, other = (random_weights(CONFIG, seed=seed) for seed in (1, 1, 2))
    for name in first:
        np.testing.assert_array_equal(first[name].whole(), again[name].whole())
        assert (first[name].whole() != other[name].whole()).any()


def values(name: str, config: GriffinConfig = CONFIG) -> np.ndarray:
    return random_weights(config)[name].whole().astype(np.float64)


def test_linears_have_unit_gain_and_a_few_loud_columns() -> None:
    scaled = values("layers.0.mlp_block.down_proj.weight") * np.sqrt(CONFIG.mlp_width)
    stds = scaled.std(axis=0)
    assert np.median(stds) == pytest.approx(1, abs=0.05)
    assert (stds > 4).sum() == 1
    assert abs(scaled.mean()) < 0.01
    rows = scaled[:, stds < 4]
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 0.4  # no two rows are nearly the same


def test_embeddings_differ_and_give_sane_logits() -> None:
    embedding = values("embed_tokens.weight")
    assert len(np.unique(embedding, axis=0)) == CONFIG.vocab_size
    hidden = np.random.default_rng(0).standard_normal((8, CONFIG.width))
    assert (hidden @ embedding.T).std() == pytest.approx(1, abs=0.1)


def test_decays_come_near_to_one() -> None:
    config = make_config("r", width=2048, heads=2)
    param = values("layers.0.temporal_block.rg_lru.recurrent_param", config)
    slowness = -np.expm1(-8 * np.log1p(np.exp(param)))  # 1 - a with an open gate
    assert 9e-6 < slowness.min() < 2e-5
    assert 0.08 < slowness.max() < 0.11
    assert (slowness < 1e-4).mean() == pytest.approx(0.25, abs=0.05)


def test_targets_are_guarded(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("3b", {}, "the size is '3b'; expected one of 2b, 2b-it, 9b, 9b-it"),
        (CONFIG, {"dtype": "int8"}, "the dtype is 'int8'"),
        (make_config("r" * 100, width=2**20, heads=2), {}, "not enough space"),
    ],
)
def test_wrong_requests_leave_nothing(
    tmp_path: Path, model: str | GriffinConfig, options: dict[str, str], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        write_random(model, tmp_path / "m", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_those_of_the_released_models() -> None:
    counts = {
        config.width: sum(int(np.prod(s.shape)) for s in model_tensors(config).values())
        for config in (CONFIG_2B, CONFIG_9B)
    }
    assert counts[2560] == pytest.approx(2.683e9, rel=1e-3)
    assert counts[4096] == pytest.approx(8.580e9, rel=1e-3)
    assert CONFIG_2B.block_types[-3:] == ("attention", "recurrent", "recurrent")
    assert (CONFIG_2B.embedding_scale, CONFIG_9B.embedding_scale) == (50.5, 64.0)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny tokenizer, in the place of the demo's."""
    folder = tmp_path / "demo"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to make a few pieces of", "more words"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {"bos_token": "<bos>", "chat_template": "{{ bos_token }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("special_tokens_map.json", "generation_config.json"):
        (folder / name).write_text("{}")
    monkeypatch.setattr(synthetic, "demo_folder", lambda: folder)
    return folder


@pytest.mark.parametrize(("word", "chat"), [("2b", False), ("9b-it", True)])
def test_tokenizer_and_dialect_of_a_size(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, word: str, chat: bool
) -> None:
    monkeypatch.setitem(SIZES, word, Size("", CONFIG, chat))
    write_random(word, tmp_path / "m")
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert ("block_types" in fields, "_block_types" in fields) == (chat, not chat)
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert ("chat_template" in settings) == chat
    old = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    new = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m" / "tokenizer.model"))
    assert new.vocab_size() == CONFIG.vocab_size
    for text in ("some more words", "w350 ▁w350 naïve"):
        assert new.encode(text) == old.encode(text)
    assert new.decode([old.vocab_size() + 7]).strip() == f"w{old.vocab_size() + 7}"


def test_no_tokenizer_where_none_fits(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random(make_config("r", width=32, heads=2, vocab_size=64), tmp_path / "small")
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "no" / "demo" / "here"))
    monkeypatch.setattr(synthetic, "demo_folder", checkpoint.demo_folder)
    write_random(CONFIG, tmp_path / "none")
    for folder in ("small", "none"):
        assert open_checkpoint(tmp_path / folder).tokenizer_files == ()
