from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import zero_state
from rgexport.validate import capture as capturing
from rgexport.validate.capture import capture, choose_layout
from rgexport.validate.reference_reader import read_reference

Clean = Callable[[str], Path]


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> Checkpoint:
    return open_checkpoint(checkpoint)


def truth(small: Checkpoint, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [T, vocab] and the state of one prompt that runs alone."""
    model = Reference(small.config, small.weights)
    hidden, state = model.run(tokens[None])
    return model.logits(hidden)[0], state


@pytest.mark.parametrize("limit", [capturing.LOGITS_BYTES, 60_000, 20_000])
def test_the_file_says_what_the_reference_says(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(capturing, "LOGITS_BYTES", limit)
    monkeypatch.setattr(capturing, "FULL_BYTES", 0)
    monkeypatch.setattr(capturing, "BLOCK_BYTES", 10 * 4 * small.config.vocab_size)
    found = read_reference(capture(small, tmp_path / "r", device="cpu"))
    assert found.header.computed["dtype"] == "float32" and found.header.computed["tf32"] == "off"
    for index, prompt, span in found.spans():
        tokens = found.tokens[span]
        logits, state = truth(small, tokens)
        log_p = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=1, keepdims=True)
        following = [-log_p[i, token] for i, token in enumerate(tokens[1:])]
        assert found.sums[span, 1] == pytest.approx([*following, 0], abs=1e-5)
        full = [i for i in range(prompt.tokens) if found.is_full(span.start + i)]
        assert len(full) == prompt.full_positions and prompt.tokens - 1 in full
        for i, expected in enumerate(logits):
            if i in full:
                row = found.full_logits(span.start + i)
                assert np.allclose(row, expected, atol=1e-5)
            else:
                kept = found.condensed(span.start + i)
                assert np.allclose(kept.logits, expected[kept.ids], atol=1e-5)
                assert kept.ids[0] == expected.argmax()
        again = found.state(index)
        assert again.keys() == state.keys()
        for name, array in state.items():
            assert np.allclose(again[name], array, atol=1e-5), name


def test_all_prompts_read_each_weight_once(small: Checkpoint) -> None:
    model = Reference(small.config, small.weights)
    texts = [np.arange(n)[None] for n in (1, 5, 40)]
    alone = [model.run(text) for text in texts]
    read: list[int] = []
    loaded = model._layer
    model._layer = lambda index: read.append(index) or loaded(index)  # type: ignore
    together = model.run_each([(text, zero_state(small.config, 1)) for text in texts])
    assert read == list(range(small.config.num_layers))
    for (one, state), (other, found) in zip(alone, together, strict=True):
        assert np.allclose(one.numpy(), other.numpy(), atol=1e-5)
        assert all(np.allclose(state[name], found[name], atol=1e-5) for name in state)


def test_the_greedy_text_is_the_model_s_own(tmp_path: Path) -> None:
    demo = open_checkpoint(size="demo")
    (tmp_path / "p.txt").write_text("Once upon a time\nIt is a truth\n")
    asked = {"prompts": tmp_path / "p.txt", "device": "cpu"}
    found = read_reference(capture(demo, tmp_path / "r", **asked))  # type: ignore[arg-type]
    model = Reference(demo.config, demo.weights)
    for index, _, span in found.spans():
        expected = found.greedy(index).tolist()
        assert 1 <= len(expected) <= capturing.GREEDY_TOKENS
        ids = [*found.tokens[span].tolist(), *expected]
        hidden, _ = model.run(np.array([ids]))
        chosen = model.logits(hidden)[0].argmax(1).tolist()
        assert chosen[span.stop - span.start - 1 : -1] == expected


def test_how_positions_are_stored() -> None:
    assert choose_layout([5, 6], 256).full.tolist() == list(range(11))
    demo = choose_layout([35, 51, 71, 107, 62, 28, 1, 2, 49, 576], 8192)
    assert demo.tail_bits == 16 and len(demo.full) == 31
    longer = choose_layout([35, 1400], 8192)
    assert longer.tail_bits == 8
    large = choose_layout([100] * 10 + [4600], 256_000)
    assert large.tail_bits == 0 and large.most == capturing.LEAST_MOST and len(large.full) == 15
    many = choose_layout([3] * 100, 256_000)
    assert len(many.full) == 16 and many.full.min() == 2 and many.full.max() == 299
    assert {99, 199, 999} <= set(large.full.tolist()) and large.full.max() == 5599


def test_the_demo_s_file(tmp_path: Path) -> None:
    file = capture(open_checkpoint(size="demo"), tmp_path / "r", device="cpu")
    assert file.stat().st_size < 20_000_000
    assert read_reference(file).header.tail_bits == 16


def test_nothing_is_written_for_a_device_that_is_not_there(
    small: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="device"):
        capture(small, tmp_path / "r", device="no such device")
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_something_else(small: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "r").write_text("words")
    with pytest.raises(RequestError, match="something else"):
        capture(small, tmp_path / "r", force=True)
    assert (tmp_path / "r").read_text() == "words"
