import numpy as np
import pytest

from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.validate import metrics
from rgexport.validate.bisect.layer_costs import TOKENS, layer_costs
from tests.models import make_config, random_weights, weight_source
from tests.validate.toys import counted

CONFIG = make_config("rar", width=48, heads=4, lru_width=64, vocab_size=90, window=12)
WEIGHTS = random_weights(CONFIG)
TEXT = np.random.default_rng(3).integers(0, CONFIG.vocab_size, TOKENS + 9)
PARTS = ("embed_tokens", "layers.0", "layers.1", "layers.2", "final_norm")


def rounded(part: str = "") -> dict[str, np.ndarray]:
    """The weights, those of one part (or all) with a step as large as 4 bits have."""
    changed = dict(WEIGHTS)
    for name, array in WEIGHTS.items():
        if name.startswith(f"{part}.") or not part:
            step = np.abs(array).max() / 7
            changed[name] = (np.round(array / step) * step).astype(np.float32)
    return changed


def logits(weights: dict[str, np.ndarray]) -> np.ndarray:
    model = Reference(CONFIG, weight_source(weights))
    return model.logits(model.run(TEXT[None, :TOKENS])[0])[0]


def test_a_cost_is_that_of_a_model_with_one_part_replaced():
    costs = layer_costs(
        CONFIG, weight_source(WEIGHTS), weight_source(rounded()), TEXT, device="cpu"
    )
    assert tuple(cost.part for cost in costs) == PARTS
    unknown = np.full(TOKENS, -1)
    for cost in costs:
        rows = metrics.compare_logits(logits(WEIGHTS), logits(rounded(cost.part)), unknown)
        assert cost.kl == pytest.approx(rows["kl"].mean(), rel=1e-4)
        assert cost.kl > 1e-5
        assert cost.standard_error == pytest.approx(metrics.kl_summary(rows).standard_error, 1e-4)
        assert cost.top1 == rows["top1"].mean()


def test_logits_come_in_blocks(monkeypatch):
    both = weight_source(WEIGHTS), weight_source(rounded())
    whole = layer_costs(CONFIG, *both, TEXT, device="cpu")
    monkeypatch.setattr("rgexport.validate.bisect.layer_costs._LOGITS_BYTES", 6 * 4 * 90 * 5)
    cut = layer_costs(CONFIG, *both, TEXT, device="cpu")
    assert [cost.kl for cost in cut] == pytest.approx([cost.kl for cost in whole], rel=1e-5)


def test_one_layer_of_both_is_read_at_a_time():
    reads: list[str] = []
    both = (counted(weight_source(weights), reads) for weights in (WEIGHTS, rounded()))
    layer_costs(CONFIG, *both, TEXT, device="cpu")
    layers = [name.split(".")[1] for name in reads if name.startswith("layers.")]
    assert layers == sorted(layers)
    assert {reads.count(name) for name in WEIGHTS if name != EMBEDDING} == {2}, "once of each"
