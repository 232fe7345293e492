import pytest

from rgexport.export.trace import trace
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.state import state_specs
from tests.models import ODD_CONFIGS


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_program_has_the_weights_and_states_of_the_contract(name: str) -> None:
    config = ODD_CONFIGS[name]
    program = trace(config)

    shapes = {weight: value.shape for weight, value in program.weights.items()}
    assert shapes == {weight: spec.shape for weight, spec in model_tensors(config).items()}
    states = {n: (i.shape, i.dtype, o.shape, o.dtype) for n, (i, o) in program.states.items()}
    assert states == {s.name: (("batch_size", *s.shape), s.dtype) * 2 for s in state_specs(config)}
    assert program.input_ids.shape == ("batch_size", "tokens")
    assert program.logits.shape == ("batch_size", "num_logits", config.vocab_size)


def test_half_precision_stays_where_it_belongs() -> None:
    program = trace(ODD_CONFIGS["irregular"], "float16")
    dtypes = {node.site: node.outputs[0].dtype for node in program.nodes}
    float32 = ("_norm", "residual", "rg_lru", "_gate", "conv_1d", "embed_tokens", "logits")
    for site, dtype in dtypes.items():
        if site.endswith(float32):
            assert dtype == "float32", site
        elif site.rpartition(".")[2] in ("linear_x", "q_proj", "rope_q", "attention", "up_proj"):
            assert dtype == "float16", site
    kinds = {name.split(".")[2]: value.dtype for name, (value, _) in program.states.items()}
    assert kinds == {"rg_lru": "float32", "conv1d": "float16", "key": "float16", "value": "float16"}
