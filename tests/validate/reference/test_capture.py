import dataclasses
import json
import math
import sys
from typing import Any

import click
import numpy as np
import pytest

from rgexport.commands import proof
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import zero_state
from rgexport.validate.reference import implementations, kept_logits
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.implementations import choose_implementation
from rgexport.validate.reference.kept_logits import choose_layout
from rgexport.validate.reference.reference_reader import read_reference
from rgexport.validate.states import checkpoints
from tests.command_line import rgexport
from tests.validate.toys import counted


@pytest.fixture(scope="module")
def small(checkpoint) -> Checkpoint:
    return open_checkpoint(checkpoint)


def truth(small: Checkpoint, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [T, vocab] and the state of one prompt that runs alone."""
    model = Reference(small.config, small.weights)
    hidden, state = model.run(tokens[None])
    return model.logits(hidden)[0], state


@pytest.mark.parametrize("limit", [kept_logits.LOGITS_BYTES, 60_000, 20_000])
def test_the_file_holds_what_the_reference_computes(small, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(kept_logits, "LOGITS_BYTES", limit)
    monkeypatch.setattr(kept_logits, "FULL", 16)
    monkeypatch.setattr(kept_logits, "BLOCK_BYTES", 10 * 4 * small.config.vocab_size)
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
        for point, inside in found.checkpoints(index).items():
            _, expected = truth(small, tokens[:point])
            assert inside and all(
                np.allclose(array, expected[name], atol=1e-5) for name, array in inside.items()
            )
        again = found.state(index)
        assert again.keys() == state.keys()
        for name, array in state.items():
            assert np.allclose(again[name], array, atol=1e-5), name


def test_the_file_holds_the_stream_after_each_layer(small, tmp_path):
    found = read_reference(capture(small, tmp_path / "r", device="cpu"))
    model = Reference(small.config, small.weights)
    assert len(found.header.watched) == kept_logits.WATCHED
    longest = max(found.header.prompts, key=lambda prompt: prompt.tokens)
    assert longest.checkpoints == tuple(checkpoints(longest.tokens)) != ()
    for index, _, span in found.spans():
        streams: list[np.ndarray] = []
        text = (found.tokens[None, span], zero_state(small.config, 1))
        model.run_each([text], watch=lambda i, j, x, s=streams: s.append(x[0].numpy().copy()))
        for place, position in enumerate(found.header.watched):
            if span.start <= position < span.stop:
                expected = [stream[position - span.start] for stream in streams]
                assert np.allclose(found.activations(place), expected, atol=1e-4), index


@pytest.mark.parametrize("impl", ["deepmind", "hf"])
def test_another_implementation_gives_the_same_file(small, tmp_path, impl):
    """Up to the first position where Hugging Face's window, which is one less, matters."""
    if impl == "hf":
        pytest.importorskip("transformers")
    ours = read_reference(capture(small, tmp_path / "ours", device="cpu"))
    theirs = read_reference(capture(small, tmp_path / "theirs", device="cpu", impl=impl))
    assert ours.header.computed["implementation"].startswith("rgexport ")
    assert theirs.header.computed["implementation"].split()[0] in ("recurrentgemma", "transformers")
    window = small.config.window - (impl == "hf")
    assert theirs.header.config == dataclasses.replace(small.config, window=window)
    assert theirs.header.prompts == ours.header.prompts
    for _, prompt, span in ours.spans():
        alike = prompt.tokens if impl == "deepmind" else min(prompt.tokens, window)
        for position in range(span.start, span.start + alike):
            logits = ours.full_logits(position)
            apart = np.abs(theirs.full_logits(position) - logits).max()
            assert apart <= 1e-5 * max(1, np.abs(logits).max())
    for place in range(len(ours.header.watched)) if impl == "deepmind" else ():
        assert np.allclose(theirs.activations(place), ours.activations(place), atol=1e-4)


@pytest.mark.parametrize(
    ("impl", "package"), [("deepmind", "recurrentgemma"), ("hf", "transformers")]
)
def test_a_missing_package_is_one_line(small, tmp_path, monkeypatch, impl, package):
    monkeypatch.delitem(sys.modules, implementations.PACKAGES[impl].module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    with pytest.raises(RequestError, match=f"pip install .*{package}[^\n]*$"):
        capture(small, tmp_path / "r", device="cpu", impl=impl)


def test_the_command_line_s_options(checkpoint, tmp_path):
    asked = ["reference", "-m", str(checkpoint), "-o", "r", "--device", "cpu"]
    wrong = rgexport(*asked, "--impl", "hf", "--low-memory", folder=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert rgexport(*asked, "--impl", "mlx", folder=tmp_path).returncode == 2
    made = rgexport(*asked, "--low-memory", folder=tmp_path)
    assert made.returncode == 0 and made.stdout.startswith("r is complete")
    impl = next(option for option in proof.reference.params if option.name == "impl")
    assert isinstance(impl.type, click.Choice)
    assert tuple(impl.type.choices) == implementations.NAMES


def test_weights_stay_in_memory_only_where_they_fit(small, monkeypatch, capsys):
    config, weights = small.config, small.weights
    needed = implementations.float32_bytes(config)
    assert needed == sum(4 * math.prod(weights[name].shape) for name in model_tensors(config))

    def keeps(free: int | None, low_memory: bool = False) -> bool:
        monkeypatch.setattr(implementations, "available_bytes", lambda: free)
        make = choose_implementation(implementations.OWN, "cpu", low_memory)
        model = make(config, weights)
        tokens = np.array([[1, 2, 3]])
        model.logits(model.run(tokens)[0])
        return bool(vars(model)["_layers"]) and bool(vars(model)["_head"])

    enough = int(implementations.ROOM * needed) + implementations.WORKING_BYTES + 1
    assert keeps(enough) and not keeps(enough, low_memory=True)
    assert "one layer at a time" not in capsys.readouterr().err
    assert not keeps(enough - 2) and not keeps(None)
    assert "one layer at a time" in capsys.readouterr().err
    keeps(needed - 1)
    with pytest.raises(RequestError, match=r"of memory for the weights alone[^\n]*$"):
        choose_implementation("deepmind", "cpu", low_memory=False)(config, weights)


@pytest.mark.parametrize("keep", [False, True])
def test_all_prompts_read_each_weight_once(small, keep):
    """Once in all where the weights are kept, else once in each pass."""
    reads: list[str] = []
    alone = Reference(small.config, small.weights)
    model = Reference(small.config, counted(small.weights, reads), keep=keep)
    texts = [np.arange(n)[None] for n in (1, 5, 40)]
    for count in (1, 1 if keep else 2):
        together = model.run_each([(text, zero_state(small.config, 1)) for text in texts])
        assert reads.count("layers.0.mlp_block.gate_proj.weight") == count
        for text, (hidden, found) in zip(texts, together, strict=True):
            expected, state = alone.run(text)
            assert np.allclose(hidden.numpy(), expected.numpy(), atol=1e-5)
            assert all(np.allclose(state[name], found[-1][name], atol=1e-5) for name in state)


def test_logits_exist_for_one_block_at_a_time(small, tmp_path, monkeypatch):
    (tmp_path / "p").write_text(json.dumps([[1 + i % 250 for i in range(300)], [5], [6, 7]]))
    monkeypatch.setattr(kept_logits, "BLOCK_BYTES", 20 * 4 * small.config.vocab_size)
    asked: list[int] = []
    compute = Reference.logits

    def counted(self: Reference, hidden: Any) -> np.ndarray:
        asked.append(hidden.shape[1])
        return compute(self, hidden)

    monkeypatch.setattr(Reference, "logits", counted)
    found = read_reference(capture(small, tmp_path / "r", device="cpu", prompts=tmp_path / "p"))
    assert len(found.tokens) == sum(asked) == 303 and max(asked) == 20


def test_how_positions_are_stored_and_watched():
    assert choose_layout([5, 6], 256).full.tolist() == list(range(11))
    demo = choose_layout([35, 51, 71, 107, 62, 28, 1, 2, 49, 576], 8192)
    assert demo.tail_bits == 16 and len(demo.full) == 64
    assert choose_layout([35, 1400], 8192).tail_bits == 8
    large = choose_layout([100] * 10 + [4600], 256_000)
    assert large.tail_bits == 0 and large.most == kept_logits.LEAST_MOST
    assert len(large.full) == 64 and {99, 199, 999, 5599} <= set(large.full.tolist())
    assert len(large.watched) == 16 and {99, 999, 5599} <= set(large.watched.tolist())
    assert (large.watched[11:] > 1000).all()
    assert large.checkpoints == [[]] * 10 + [[64, 128, 256, 512, 1024, 2048, 4096]]
    many = choose_layout([3] * 100, 256_000)
    assert len(many.full) == 64 and many.full.min() == 2 and many.full.max() == 299
    assert set(many.full % 3) == {2}
    many = choose_layout([3] * 100 + [50], 256_000)
    assert len(many.watched) == 16 and (many.watched[-4:] >= 300).all()
    one = choose_layout([1], 256_000)
    assert one.full.tolist() == one.watched.tolist() == [0] and one.checkpoints == [[]]


def test_nothing_is_written_or_replaced_by_a_wrong_request(small, tmp_path):
    with pytest.raises(RequestError, match="device"):
        capture(small, tmp_path / "r", device="no such device")
    assert not list(tmp_path.iterdir())
    (tmp_path / "r").write_text("words")
    with pytest.raises(RequestError, match="something else"):
        capture(small, tmp_path / "r", force=True)
    assert (tmp_path / "r").read_text() == "words"
