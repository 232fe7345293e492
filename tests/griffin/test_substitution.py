import numpy as np
import torch

from rgexport.griffin.reference import Reference
from rgexport.griffin.sites import sites
from rgexport.griffin.substitution import substituted
from tests.models import make_config, random_weights, weight_source

CONFIG = make_config("ra", width=48, heads=4, vocab_size=60, window=8)
WEIGHTS = random_weights(CONFIG)
TOKENS = np.arange(11)[None]


def reference() -> Reference:
    return Reference(CONFIG, weight_source(WEIGHTS))


def test_every_op_is_seen_in_the_order_of_computation():
    seen: list[tuple[str, str, list[tuple[int, ...]]]] = []

    def look(site, op, argument, results):
        seen.append((site, op, [result.shape for result in results]))

    with substituted(look):
        hidden, _ = reference().run(TOKENS)
        reference().logits(hidden)
    assert [site for site, _, _ in seen] == [s for s in sites(CONFIG) if s != "last_tokens"]
    shapes = {site: (op, shape) for site, op, shape in seen}
    assert shapes["embed_tokens"] == ("embedding", [(1, 11, 48)])
    assert shapes["layers.0.temporal_block.rg_lru"] == ("rg_lru_scan", [(1, 11, 48), (1, 48)])
    attention = "local_attention", [(1, 11, 48), (1, 8, 12), (1, 8, 12)]
    assert shapes["layers.1.temporal_block.attention"] == attention
    assert shapes["logits"] == ("soft_cap", [(1, 11, 60)])


def test_observing_changes_nothing_and_ends_with_the_block():
    seen: list[str] = []
    expected = reference().run(TOKENS)[0]
    with substituted(lambda site, *_: seen.append(site)):
        assert torch.equal(reference().run(TOKENS)[0], expected)
    count = len(seen)
    reference().run(TOKENS)
    assert len(seen) == count > 0


def test_later_ops_take_the_replaced_result():
    gate = "layers.0.temporal_block.rg_lru.input_gate"
    closed = np.full((1, 11, 48), -np.inf, np.float32)
    taken: dict[str, np.ndarray] = {}

    def look(site, op, argument, results):
        if site == "layers.0.temporal_block.rg_lru":
            taken["gate"], taken["h"], taken["state"] = argument(1), *results
        return closed if site == gate else None

    with substituted(look):
        _, state = reference().run(TOKENS)
    assert np.array_equal(taken["gate"], closed)
    assert not taken["h"].any() and not state["layers.0.rg_lru"].any()


def test_other_results_of_the_op_are_kept():
    conv = "layers.0.temporal_block.conv_1d"
    expected = reference().run(TOKENS)[1]["layers.0.conv1d"]

    def look(site, op, argument, results):
        return 0 * results[0] if site == conv else None

    with substituted(look):
        _, state = reference().run(TOKENS)
    assert np.array_equal(state["layers.0.conv1d"], expected)
    assert expected.any()
