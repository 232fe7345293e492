"""The collected statistics against DeepMind's model with hooks and autograd."""

from collections import defaultdict
from functools import partial

import numpy as np
import pytest
import torch

from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.planning.layer_pass import head_statistics
from rgexport.planning.passages import Passages
from rgexport.quantize.algorithms import calibration_file
from rgexport.quantize.algorithms.calibration_file import linears
from tests.deepmind import deepmind_model
from tests.models import ODD_CONFIGS, random_weights, weight_source
from tests.planning.collected import checkpoint_of, collected

LENGTHS = (26, 26, 19, 1)  # longer than a window, equal and unequal ones, and a single token
MODULES = {
    **{name: f"recurrent_block.{name}" for name in ("linear_x", "linear_y", "linear_out")},
    **{f"{letter}_proj": f"attention_block.proj_{letter}" for letter in "qkv"},
    "o_proj": "attention_block.proj_final",
    **{"gate_proj": "mlp_block.ffw_up", "up_proj": "mlp_block.ffw_up"},
    "down_proj": "mlp_block.ffw_down",
}
"""Linear → the module of DeepMind's model that computes it, within a block."""


@pytest.fixture(
    scope="module", params=["narrow_lru", "not_by_32", "hawk", "attention_tail", "one_head"]
)
def case(request, tmp_path_factory):
    """A model, and what was collected of it."""
    folder, config = tmp_path_factory.mktemp("case"), ODD_CONFIGS[request.param]
    text, checkpoint = passages(config), checkpoint_of(request.param, folder / "model")
    return config, text, collected(checkpoint, text, folder / "work")


def passages(config):
    tokens = np.random.default_rng(7).integers(0, config.vocab_size, sum(LENGTHS))
    return Passages(tokens.astype(np.int32), np.array(LENGTHS, np.int32))


def sequences(text):
    return np.split(text.tokens.astype(np.int64), np.cumsum(text.lengths)[:-1])


def fresh_model(config):
    """DeepMind's, without hooks."""
    return deepmind_model(config, random_weights(config)).requires_grad_(False)


def module_of(model, tensor):
    _, index, *_, linear, _ = tensor.split(".")
    return model.get_submodule(f"blocks.{index}.{MODULES[linear]}")


def logits_of(model, ids):
    """Of one sequence from a fresh state, [T, V]."""
    logits, _ = model(torch.from_numpy(ids)[None], torch.arange(len(ids))[None])
    return logits[0]


def assert_close(actual, expected, limit=2e-5):
    assert np.abs(actual - expected).max() <= limit * np.abs(expected).max()


def test_hessians_and_probabilities_are_those_of_deepminds_model(case):
    config, text, known = case
    model, seen = fresh_model(config), defaultdict(list)
    for tensor in linears(config):
        module_of(model, tensor).register_forward_pre_hook(
            lambda module, inputs, tensor=tensor: seen[tensor].append(inputs[0])
        )
    model.final_norm.register_forward_hook(lambda m, i, out: seen[EMBEDDING].append(out))
    with torch.no_grad():
        capped = torch.cat([logits_of(model, ids).double() for ids in sequences(text)])
    for tensor in [*linears(config), EMBEDDING]:
        inputs = torch.cat([x.flatten(0, -2) for x in seen[tensor]]).double().numpy()
        expected = inputs.T @ inputs / len(text.tokens)
        (hessian,) = known.hessian(tensor)
        assert_close(hessian, expected)
        assert_close(known.importance(tensor), np.diag(expected))
        np.testing.assert_array_equal(hessian, hessian.T)
    p = capped.softmax(1)
    slope = 1 - (capped / config.soft_cap) ** 2 if config.soft_cap else torch.ones_like(capped)
    assert_close(known.row_probability, p.mean(0).numpy())
    assert_close(known.row_fisher, (p * (1 - p) * slope**2).mean(0).numpy())
    counts = np.bincount(text.tokens, minlength=config.vocab_size) / len(text.tokens)
    np.testing.assert_allclose(known.token_frequency, counts, rtol=1e-6)


def test_wide_inputs_are_cut_into_diagonal_blocks(tmp_path, monkeypatch):
    config = ODD_CONFIGS["not_by_128"]
    text, checkpoint = passages(config), checkpoint_of("not_by_128", tmp_path / "model")
    whole = collected(checkpoint, text, tmp_path / "whole")
    monkeypatch.setattr(calibration_file, "MAX_BLOCK", 256)
    cut = collected(checkpoint, text, tmp_path / "cut")
    for tensor, (_, columns) in linears(config).items():
        (expected,), blocks = whole.hessian(tensor), cut.hessian(tensor)
        assert len(blocks) == (2 if columns > 256 else 1)
        start = 0
        for block in blocks:
            stop = start + len(block)
            assert start % 128 == 0
            assert_close(block, expected[start:stop, start:stop], 1e-6)
            start = stop
        assert start == columns


def test_gradients_are_those_of_deepminds_model(case):
    config, text, known = case
    model, squares = fresh_model(config), defaultdict(float)
    reference = Reference(config, weight_source(random_weights(config)))
    hidden = torch.cat([reference.run(ids[None])[0][0] for ids in sequences(text)])
    drawn = head_statistics(reference, hidden, len(hidden), 0, lambda done: None).labels
    labels = torch.from_numpy(drawn).split(text.lengths.tolist())

    def add(tensor, part, gradient):
        mine = gradient if part is None else gradient[part]
        squares[tensor] += mine.flatten(0, -2).double().square().sum(0)

    for tensor in linears(config):
        part = {"gate_proj": 0, "up_proj": 1}.get(tensor.split(".")[-2])
        watch_gradient(module_of(model, tensor), partial(add, tensor, part))
    model.embedder.input_embedding.requires_grad_(True)
    model.blocks[0].register_forward_pre_hook(
        lambda module, inputs: (inputs[0].register_hook(partial(add, "embedded", None)), None)[1]
    )
    for ids, chosen in zip(sequences(text), labels, strict=True):
        logits = logits_of(model, ids)
        torch.nn.functional.cross_entropy(logits, chosen, reduction="sum").backward()
    for tensor in linears(config):
        expected = (squares[tensor] / len(text.tokens)).numpy()
        assert_close(known.output_sensitivity(tensor), expected, 1e-4)
    embedded = (squares["embedded"] / len(text.tokens)).numpy()
    assert_close(known.lookup_sensitivity, embedded, 1e-4)


def watch_gradient(module, see):
    """Calls `see` with the gradient of what the module returns.

    The model goes on with a copy, because it masks what `linear_x` returns in place.
    """

    def watch(module, inputs, output):
        output.register_hook(see)
        return output.clone()

    module.register_forward_hook(watch)


def test_labels_are_drawn_from_the_models_distribution():
    config, count = ODD_CONFIGS["attention_only"], 20_000
    model = Reference(config, weight_source(random_weights(config)))
    hidden = model.run(np.array([[3, 5, 7]]))[0][0, -1:]
    drawn = head_statistics(model, hidden.expand(count, -1), count, 1, lambda done: None)
    shares = np.bincount(drawn.labels, minlength=config.vocab_size) / count
    p = drawn.probability
    assert np.abs(shares - p).max() <= 5 * np.sqrt((p * (1 - p)).max() / count)
