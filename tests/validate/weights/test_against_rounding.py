"""What an artifact stores beside what its encoder makes, and what rounding costs at random."""

import numpy as np
import pytest

from rgexport.griffin.layout import input_site, linear_inputs
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import zero_state
from rgexport.quantize.algorithms.statistics import no_statistics
from rgexport.validate.costs import rounding_cost
from rgexport.validate.reference_pass import run_reference
from rgexport.validate.weights.sketch import MIXTURES, MixtureRecorder
from rgexport.validate.weights.weight_limits import reproduce, reproduced_checks
from tests.artifacts import export_random, export_random_coreml, export_random_gguf
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, weight_source

CONFIG = make_config("rra", width=96, heads=2, vocab_size=160, mlp_width=224)
TOKENS = np.random.default_rng(3).integers(0, 160, 80)
MATRIX = "layers.1.mlp_block.up_proj.weight"


def test_mixtures_are_sums_of_the_linears_inputs_with_signs():
    """Whatever the pieces that a text is taken in."""
    weights = weight_source(random_weights(CONFIG))
    one, other = (MixtureRecorder(CONFIG, len(TOKENS)) for _ in range(2))
    seen = []
    model = NumpyReference(CONFIG, weights)
    for recorder, stops in ((one, ()), (other, (7, 40))):
        model.look = recorder.look
        model.run_each([(TOKENS[None], zero_state(CONFIG, 1))], stops=[stops])
    site = input_site(MATRIX)
    model.look = lambda at, op, _, results: seen.append(results[0][0]) if at == site else None
    model.run(TOKENS[None])
    assert one.mixtures.keys() == {*linear_inputs(CONFIG).values()}
    for name, mixture in one.mixtures.items():
        np.testing.assert_allclose(mixture, other.mixtures[name], rtol=1e-4, atol=1e-4)
    signs = np.linalg.lstsq(seen[0].T, one.mixtures[site].T, rcond=None)[0]
    assert signs.shape == (len(TOKENS), MIXTURES)
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-2)


def test_weights_that_cost_more_than_rounding(tmp_path):
    artifact, weights = export_random(CONFIG, tmp_path, "int4")
    rng = np.random.default_rng(0)
    further = weights | {
        name: weights[name] * (1 + 0.3 * rng.standard_normal(weights[name].shape, np.float32))
        for name in linear_inputs(CONFIG)
    }
    stored = run_reference("", CONFIG, artifact.weights, TOKENS)
    ratios = []
    for original in (weights, further):
        passed = run_reference("", CONFIG, weight_source(original), TOKENS)
        cost = rounding_cost(artifact, stored, passed, TOKENS)
        ratios.append(cost.ratio)
        assert cost == rounding_cost(artifact, stored, passed, TOKENS)
    assert 0.2 < ratios[0] < 1.5
    assert ratios[1] > 4


@pytest.mark.parametrize(
    ("export", "precision"),
    [
        (export_random, "int4"),
        (export_random, "int8"),
        (export_random_coreml, "pal4"),
        pytest.param(export_random_gguf, "q4_0", marks=needs_llama_cpp),
    ],
)
def test_encoding_again_gives_the_same_levels(tmp_path, export, precision):
    artifact, weights = export(CONFIG, tmp_path, precision)
    same = reproduce(artifact, weight_source(weights), no_statistics)
    assert {tensor.different for tensor in same} == {0}
    assert all(check.passed for check in reproduced_checks(same))
    changed = weights[MATRIX].copy()
    changed[5] *= np.float32(1.3)
    other = reproduce(artifact, weight_source(weights | {MATRIX: changed}), no_statistics)
    assert [tensor.name for tensor in other if tensor.different] == [MATRIX]
    assert [check.passed for check in reproduced_checks(other)] == [False]
