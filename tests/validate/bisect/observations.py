"""What an artifact has at its sites, made by the reference itself, sound or with a fault."""

from collections.abc import Callable, Mapping

import numpy as np

from rgexport.export.manifest import IoRecord, Manifest, Source
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import State, zero_state
from rgexport.griffin.substitution import substituted
from rgexport.griffin.tensor import WeightSource
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Float, Scheme
from rgexport.runtimes.observation import Observation

FLOAT32 = Float("float32")
Faults = Mapping[str, Callable[[np.ndarray], np.ndarray]]
"""Site → what becomes of its value [1, T, n], for all that follow too."""


def manifest_of(
    config: GriffinConfig, scheme: Scheme = FLOAT32, *, compute: str = "fp32"
) -> Manifest:
    """The manifest of an artifact that stores its weights so; it has no files."""
    return Manifest(
        name="toy",
        created_with={},
        source=Source("toy", "toy", {}),
        config=config,
        precision="toy",
        compute=compute,
        exact=False,
        plan=make_plan(config, scheme, scheme),
        tensors={},
        states=(),
        io=IoRecord((), ()),
        instruction_tuned=None,
        files={},
    )


def state_behind(config: GriffinConfig, weights: WeightSource, tokens: np.ndarray) -> State:
    """The canonical state behind tokens [T]."""
    return Reference(config, weights).run(tokens[None])[1]


def observe(
    config: GriffinConfig,
    weights: WeightSource,
    tokens: np.ndarray,
    state: State | None = None,
    faults: Faults | None = None,
) -> Observation:
    """Takes tokens [T] as an artifact would that computes `config`, with faults at some sites."""
    values: dict[str, np.ndarray] = {}

    def look(site, op, argument, results):
        value = (faults or {}).get(site, lambda value: value)(results[0])
        values[site] = value[0].copy()
        return value

    model = Reference(config, weights)
    with substituted(look):
        hidden, after = model.run(tokens[None], state or zero_state(config, 1))
        model.logits(hidden)
    return Observation(values=values, gates={}, dtypes={}, state=after)
