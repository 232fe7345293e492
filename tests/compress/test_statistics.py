"""The collected statistics against DeepMind's model with hooks and autograd."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recurrentgemma.torch import Griffin

from rgexport.compress.head import head_statistics
from rgexport.compress.passages import Passages
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.quantize import calibration_format
from rgexport.quantize.calibration import Calibration
from rgexport.quantize.calibration_format import linears
from tests.compress.collected import (
    checkpoint_of,
    collected,
    module_of,
    passages,
    run,
    sequences,
)
from tests.deepmind import deepmind_model
from tests.models import ODD_CONFIGS, random_weights, weight_source


def close(found: np.ndarray, expected: np.ndarray, limit: float = 2e-5) -> bool:
    return float(np.abs(found - expected).max()) <= limit * float(np.abs(expected).max())


@dataclass(frozen=True)
class Case:
    config: GriffinConfig
    text: Passages
    found: Calibration


@pytest.fixture(scope="module", params=ODD_CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model of each shape, and what was collected of it."""
    folder, config = tmp_path_factory.mktemp("case"), ODD_CONFIGS[request.param]
    text, checkpoint = passages(config), checkpoint_of(request.param, folder / "model")
    return Case(config, text, collected(checkpoint, text, folder / "work"))


def fresh_model(config: GriffinConfig) -> Griffin:
    """DeepMind's, without hooks."""
    return deepmind_model(config, random_weights(config)).requires_grad_(False)


def test_hessians_are_those_of_deepminds_inputs(case: Case) -> None:
    config, text, found, model = case.config, case.text, case.found, fresh_model(case.config)
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    watched = {tensor: module_of(model, tensor) for tensor in linears(config)}
    watched[EMBEDDING] = model.final_norm
    for tensor, module in watched.items():
        if tensor == EMBEDDING:
            module.register_forward_hook(lambda m, i, out: seen[EMBEDDING].append(out))
        else:
            module.register_forward_pre_hook(lambda m, i, t=tensor: seen[t].append(i[0]))
    with torch.no_grad():
        run(model, text)

    for tensor in watched:
        inputs = torch.cat([x.flatten(0, -2) for x in seen[tensor]]).double().numpy()
        expected = inputs.T @ inputs / len(text.tokens)
        (hessian,) = found.hessian(tensor) or []
        assert close(hessian, expected), tensor
        assert close(found.importance(tensor), np.diag(expected)), tensor
        np.testing.assert_array_equal(hessian, hessian.T)


def test_wide_inputs_are_cut_into_diagonal_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "not_by_128"
    config, text = ODD_CONFIGS[name], passages(ODD_CONFIGS[name])
    checkpoint = checkpoint_of(name, tmp_path / "model")
    whole = collected(checkpoint, text, tmp_path / "whole")
    monkeypatch.setattr(calibration_format, "MAX_BLOCK", 256)
    cut = collected(checkpoint, text, tmp_path / "cut")
    for tensor, (_, columns) in linears(config).items():
        (expected,), blocks = whole.hessian(tensor) or [], cut.hessian(tensor) or []
        assert len(blocks) == (2 if columns > 256 else 1)
        start = 0
        for block in blocks:
            stop = start + len(block)
            assert start % 128 == 0 and close(block, expected[start:stop, start:stop], 1e-6)
            start = stop
        assert start == columns


def test_gradients_are_those_of_deepminds_model(case: Case) -> None:
    config, text, found, model = case.config, case.text, case.found, fresh_model(case.config)
    labels = labels_of(Reference(config, weight_source(random_weights(config))), text)
    squares: dict[str, torch.Tensor | float] = defaultdict(float)

    def add(tensor: str, part: int | None, gradient: torch.Tensor) -> None:
        own = gradient if part is None else gradient[part]
        squares[tensor] += own.flatten(0, -2).double().square().sum(0)

    for tensor in linears(config):
        part = {"gate_proj": 0, "up_proj": 1}.get(tensor.split(".")[-2])
        watch_gradient(module_of(model, tensor), partial(add, tensor, part))
    model.embedder.input_embedding.requires_grad_(True)
    model.blocks[0].register_forward_pre_hook(
        lambda module, inputs: (inputs[0].register_hook(partial(add, "embedded", None)), None)[1]
    )

    def back(number: int, logits: torch.Tensor) -> None:
        loss = torch.nn.functional.cross_entropy(logits[0], labels[number], reduction="sum")
        loss.backward()

    run(model, text, back)
    count = len(text.tokens)
    for tensor in linears(config):
        expected = (squares[tensor] / count).numpy()
        assert close(found.output_sensitivity(tensor), expected, 1e-4), tensor
        assert found.sensitivity(tensor) == pytest.approx(expected.mean(), rel=1e-4)
    assert close(found.lookup_sensitivity, (squares["embedded"] / count).numpy(), 1e-4)


def watch_gradient(module: torch.nn.Module, see: Callable[[torch.Tensor], None]) -> None:
    """Calls `see` with the gradient of what the module returns.

    The model goes on with a copy, because it masks what `linear_x` returns in place.
    """

    def watch(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output.register_hook(see)
        return output.clone()

    module.register_forward_hook(watch)


def labels_of(model: Reference, text: Passages) -> list[torch.Tensor]:
    """The labels that the pass draws, by sequence."""
    hidden = torch.cat([model.run(ids[None])[0][0] for ids in sequences(text)])
    drawn = head_statistics(model, hidden, len(hidden), 0, lambda done: None).labels
    return list(torch.from_numpy(drawn).split(text.lengths.tolist()))


def test_rows_of_the_head_have_deepminds_probabilities(case: Case) -> None:
    config, text, found, model = case.config, case.text, case.found, fresh_model(case.config)
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        run(model, text, lambda number, values: logits.append(values[0].double()))
    capped = torch.cat(logits)
    p = capped.softmax(1)
    slope = 1 - (capped / config.soft_cap) ** 2 if config.soft_cap else torch.ones_like(capped)
    assert close(found.row_probability, p.mean(0).numpy())
    assert close(found.row_fisher, (p * (1 - p) * slope**2).mean(0).numpy())
    counts = np.bincount(text.tokens, minlength=config.vocab_size) / len(text.tokens)
    np.testing.assert_allclose(found.token_frequency, counts, rtol=1e-6)
    assert found.sensitivity(EMBEDDING) == pytest.approx(float(found.row_fisher.mean()))


def test_only_the_first_sequences_have_gradients(tmp_path: Path) -> None:
    text = passages(ODD_CONFIGS["regular"], (20, 30, 40))
    checkpoint = checkpoint_of("regular", tmp_path / "model")
    first = collected(checkpoint, text, tmp_path / "first", gradients=55)
    assert first.provenance.gradient_tokens == 50
    alone = collected(checkpoint, text.first(50), tmp_path / "alone")
    for tensor in linears(ODD_CONFIGS["regular"]):
        assert close(first.output_sensitivity(tensor), alone.output_sensitivity(tensor), 1e-5)


def test_labels_are_drawn_from_the_models_distribution() -> None:
    config = ODD_CONFIGS["attention_only"]
    model = Reference(config, weight_source(random_weights(config)))
    hidden = model.run(np.array([[3, 5, 7]]))[0][0, -1:]
    count = 20_000
    found = head_statistics(model, hidden.expand(count, -1), count, 1, lambda done: None)
    shares = np.bincount(found.labels, minlength=config.vocab_size) / count
    p = found.probability
    assert np.abs(shares - p).max() <= 5 * np.sqrt((p * (1 - p)).max() / count)


def test_sensitivities_predict_what_noise_in_a_linear_costs(case: Case) -> None:
    """½ · mean(g²) · tr(ΔW H ΔWᵀ) is the mean KL, within the scatter of a short text."""
    config, text, weights = case.config, case.text, random_weights(case.config)
    exact = log_probabilities(Reference(config, weight_source(weights)), text)
    rng, ratios = np.random.default_rng(0), []
    for tensor, shape in list(linears(config).items())[::3]:
        noise = (3e-3 * rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        changed = weights | {tensor: weights[tensor] + noise}
        other = log_probabilities(Reference(config, weight_source(changed)), text)
        measured = float((np.exp(exact) * (exact - other)).sum(1).mean())
        (hessian,) = case.found.hessian(tensor) or []
        sensitivity = case.found.sensitivity(tensor) or 0.0
        ratios.append(measured / (0.5 * sensitivity * float(np.sum(noise @ hessian * noise))))
    assert 0.6 < np.median(ratios) < 1.6, ratios


def log_probabilities(model: Reference, text: Passages) -> np.ndarray:
    logits = [model.logits(model.run(ids[None])[0])[0] for ids in sequences(text)]
    return torch.from_numpy(np.concatenate(logits)).double().log_softmax(1).numpy()
