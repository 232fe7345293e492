from contextlib import nullcontext

import numpy as np

from rgexport.griffin.reference import Reference
from rgexport.validate import reference_pass
from rgexport.validate.reference_pass import run_reference, torch_reference
from tests.models import ODD_CONFIGS, random_weights, weight_source

CONFIG = ODD_CONFIGS["irregular"]
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 60)


def test_logits_of_blocks_are_those_of_one_pass():
    weights = weight_source(random_weights(CONFIG))
    taught = run_reference("Running", torch_reference("cpu"), CONFIG, weights, TOKENS)
    reference = Reference(CONFIG, weights)
    hidden, state = reference.run(TOKENS[None])
    whole = reference.logits(hidden)[0]
    assert np.array_equal(taught.logits(0, 60), whole)
    np.testing.assert_allclose(taught.logits(7, 31), whole[7:31], atol=1e-5)
    assert all(np.array_equal(taught.state[name], array) for name, array in state.items())


def test_progress_counts_each_weight_once(monkeypatch):
    totals, done = [], []

    def task(label, total):
        totals.append(total)
        return nullcontext(done.append)

    monkeypatch.setattr(reference_pass, "task", task)
    weights = weight_source(random_weights(CONFIG))
    taught = run_reference("Running", torch_reference("cpu"), CONFIG, weights, TOKENS)
    assert sum(done) == totals[0] > 0
    taught.logits(0, 5)
    assert sum(done) == totals[0], "the head is not part of the pass"
