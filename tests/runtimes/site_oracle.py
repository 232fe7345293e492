"""The values of the step model at every site, and the checks of all observers."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rgexport.export.artifact import Artifact
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.reference import Reference
from rgexport.griffin.sites import HEAD_SITES
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.observation import Observation, Observer
from rgexport.runtimes.session import Session
from tests.sessions import distance, random_tokens

FP32 = 1e-4
"""Largest difference of a value in float32, as a share of the largest at its site."""


class _Sites(TorchDispatchMode):
    """Keeps the first result of every op of the op set."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, np.ndarray] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.namespace == "griffin":
            first: torch.Tensor = result[0] if isinstance(result, tuple) else result
            self.values[args[-1].removesuffix(".weight")] = first[0].float().numpy().copy()
        return result


def expected_values(
    artifact: Artifact, tokens: np.ndarray, state: State
) -> tuple[dict[str, np.ndarray], State]:
    """Site → value [T, n] of the dequantized reference for tokens [T], and the state after them."""
    reference = Reference(artifact.manifest.config, artifact.weights)
    kept = _Sites()
    with torch.inference_mode(), kept:
        hidden, after = reference.run(tokens[None], state)
        reference.logits(hidden)
    last = kept.values[f"layers.{reference.config.num_layers - 1}.channel_residual"]
    return kept.values | {"last_tokens": last}, after


def begun(session: Session, config: GriffinConfig) -> tuple[State, np.ndarray]:
    """A state after more than a window, and tokens [64] that follow."""
    tokens = random_tokens(config, 1, 2 * config.window + 5 + 64)
    session.prefill(tokens[:, :-64])
    return session.get_state(), tokens[0, -64:]


def check_observer(
    artifact: Artifact, session: Session, observer: Observer, needed: set[str]
) -> list[Observation]:
    """Observes calls of every length; compares their values with the dequantized reference's."""
    state, tokens = begun(session, artifact.manifest.config)
    observations = []
    for length in observer.lengths:
        found = observer.observe(tokens[:length], state)
        expected, _ = expected_values(artifact, tokens[:length], state)
        _require_near(found, expected, needed)
        session.set_state(state)
        session.prefill(tokens[None, :length])
        _require_same(found.state, session.get_state())
        observations.append(found)
    return observations


def _require_near(found: Observation, expected: dict[str, np.ndarray], needed: set[str]) -> None:
    assert needed <= found.values.keys() | found.gates.keys()
    assert found.values.keys() | found.gates.keys() <= expected.keys()
    assert not found.values.keys() & found.gates.keys()
    for site, value in found.values.items():
        _require_value(site, value, expected[site])
    for site, value in found.gates.items():
        _require_value(site, value, 1 / (1 + np.exp(-expected[site])))


def _require_value(site: str, found: np.ndarray, expected: np.ndarray) -> None:
    if site in HEAD_SITES and len(found) == 1:
        expected = expected[-1:]
    assert found.dtype == np.float32 and found.shape == expected.shape, site
    assert distance(found, expected) <= FP32, site


def _require_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert found[POSITION] == expected[POSITION]
    for name, array in expected.items():
        assert found[name].shape == array.shape and found[name].dtype == array.dtype
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
