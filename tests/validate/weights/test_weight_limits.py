import dataclasses

import numpy as np

from rgexport.validate.weights.weight_errors import WeightError
from rgexport.validate.weights.weight_limits import weight_checks


def error(name: str, max_steps: float = 0.5, projection: float = 1.0) -> WeightError:
    return WeightError(
        name=name,
        scheme="int4/128",
        quantized=True,
        values=10_000,
        relative_error=0.1,
        projection=projection,
        clipping=0,
        max_steps=max_steps,
        noise=1.0,
        shift=0.0,
    )


def test_the_nearest_tensor_and_every_failing_one_are_named() -> None:
    table = [error("a", 0.4), error("b", 0.49), error("c", 0.6, 1.02), error("d", np.nan)]
    found = list(weight_checks(table))
    steps = [c.name for c in found if c.name.endswith("max_steps")]
    assert sorted(steps) == ["weights.c.max_steps", "weights.d.max_steps"]
    assert [c.name for c in found if c.name.endswith("projection")] == ["weights.c.projection"]
    clean = list(weight_checks(table[:2]))
    assert {c.kind: c.name for c in clean} == {
        "weights.max_steps": "weights.b.max_steps",
        "weights.noise": "weights.a.noise",
        "weights.shift": "weights.a.shift",
        "weights.projection": "weights.a.projection",
    }
    assert all(c.passed for c in clean)


def test_clipping_is_no_wrong_scale() -> None:
    clipped = dataclasses.replace(error("a", projection=0.95), clipping=-0.05)
    assert all(check.passed for check in weight_checks([clipped]))
