"""Limits of sound weights, by the algorithm that chose their levels.

Rounding to nearest leaves every weight within half a step; a search for the best scale leaves every
block with at most the error of rounding, but clips single weights; error feedback moves whole rows
further away, so that the errors of their products cancel.
"""

from dataclasses import dataclass, replace

from rgexport.errors import RequestError
from rgexport.quantize.algorithms.registry import ALGORITHMS
from rgexport.quantize.schemes.registry import Uniform
from rgexport.quantize.schemes.steps import Measure

MAX_STEPS = 0.501
"""Half a step, and 1e-5 more for the float32 arithmetic on 255 levels."""
HALF_STEPS = 12 * MAX_STEPS**2
"""Noise of a tensor whose weights are all half a step off, the most of rounding to nearest."""
NOISE = 1.5
"""‖W−Ŵ‖² in units of Σ step²/12, the noise of rounding that is uniform within a step.

Measured by `bench.sweep`: up to 1.1. Levels off by one have 13, shuffled scales 3.2 and more.
"""
WEIGHTED_NOISE = 6.0
"""The same with an importance matrix; measured with one of four orders of magnitude: up to 3.7."""
FEEDBACK_NOISE = 8.0
"""The same where errors are weighed by a Hessian: usually 1 to 2.

Measured up to 5.3, with correlated inputs whose squares differ by two to three orders of magnitude.
"""
OUTPUT_NOISE = 1.25
"""‖(Ŵ−W)X‖² in units of that of rounding to nearest.

Measured: up to 1.05. A search that knows no inputs clips outliers: where the largest inputs meet
them, up to 1.7 in blocks of 32; in blocks of 128 up to 4 on the demo, up to 13 on made-up weights.
With the original, its weights are encoded again to know what the search makes of them.
"""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Limits of the quantities that `weight_limits` explains.

    Attributes:
        why: Reason of `max_steps`.
        measure: The unit whose error `max_steps` limits.
        row_noise: Limit of the `noise` of one row, as its sketch estimates it.
        shrinks: The least and the most that weights become smaller, in units of the relative
            squared error: 0 for unbiased rounding, 1 for the least squared error.
        projection: Distance that the projection may have from that range, besides its own
            uncertainty.
        sketch_output_noise: Limit of the output noise where it differs without the weights.
        embedding_output_noise: Limit of the output noise where the embedding's is larger.
        weighted: Whether levels are chosen by calibration data.
    """

    why: str
    measure: Measure = "weight"
    max_steps: float = MAX_STEPS
    noise: float = NOISE
    row_noise: float = NOISE
    shrinks: tuple[float, float] = (0.0, 0.0)
    projection: float = 0.004
    output_noise: float = OUTPUT_NOISE
    sketch_output_noise: float | None = None
    embedding_output_noise: float = 0.0
    weighted: bool = False

    @property
    def searched(self) -> bool:
        """Whether levels are chosen for the least error, so that all weights are a little small."""
        return self.shrinks != (0.0, 0.0)

    @property
    def bounded(self) -> bool:
        """Whether no weight, or no block, has more error than half a step gives."""
        return self.measure in ("weight", "block") and self.max_steps == MAX_STEPS


_WEIGHED = Expectation(
    why="levels chosen for the least error of the outputs",
    measure="row",
    max_steps=3.0,
    noise=FEEDBACK_NOISE,
    row_noise=10.0,
    shrinks=(0.0, 3.0),
    projection=0.01,
    output_noise=1.0,
    # Rows that cost more in lookups are rounded for those. Measured: up to 1.82, in blocks of 128.
    embedding_output_noise=2.5,
    weighted=True,
)
_WEIGHED_8 = replace(
    _WEIGHED, max_steps=12.0, noise=8 * FEEDBACK_NOISE, row_noise=128.0, projection=0.02
)
"""A step of 8 bits is a sixteenth of one of 4 bits, so feedback moves weights by more steps."""
_SCALES = "scales chosen for the least error of the outputs"
_NEAREST = Expectation(why="rounded to nearest")
_GGML_SEARCH = replace(
    _NEAREST,
    why="rounded to nearest, steps chosen for the least error",
    max_steps=3.0,
    shrinks=(0.0, 1.0),
)
_SEARCH = Expectation(
    why="scales chosen for the least error, no block worse than rounded to nearest",
    measure="block",
    row_noise=2.0,
    noise=2.0,
    shrinks=(1.0, 1.0),
    sketch_output_noise=2.0,
)
_CODEBOOK = replace(
    _WEIGHED,
    why="entries of ggml's tables with the least error, weighed by importances",
    max_steps=0.95,
    noise=2.5,
    row_noise=4.0,
    shrinks=(0.0, 1.5),
    projection=0.06,  # ggml makes some scales up to 3.3 % larger than the least error does
    output_noise=2.0,
)
EXPECTATIONS: dict[str, Expectation] = {
    "cast": _NEAREST,
    "rtn": _NEAREST,
    "ggml": _NEAREST,
    "search": _SEARCH,
    "search, coarse": replace(_SEARCH, sketch_output_noise=5.0),
    "importance": replace(_WEIGHED, why=_SCALES),
    "importance, 8 bits": replace(_WEIGHED_8, why=_SCALES),
    "gptq": _WEIGHED,
    "gptq, 8 bits": _WEIGHED_8,
    "kmeans": Expectation(
        why="levels chosen for the least error, which even levels bound",
        measure="group",
        shrinks=(0.0, 1.0),
    ),
    "codebook": _CODEBOOK,
    "codebook, gptq": replace(_CODEBOOK, max_steps=1.3, noise=3.5, row_noise=1.2, output_noise=1.0),
    "ggml search": _GGML_SEARCH,
    "ggml weighted": replace(
        _GGML_SEARCH,
        why="rounded to nearest, steps chosen for the least error by importances",
        noise=WEIGHTED_NOISE,
        row_noise=WEIGHTED_NOISE,
        projection=0.01,
        weighted=True,
    ),
}
"""Key, see `expectation_key` → limits.

Measured: with `search`, a block has up to 1.00 times the error of rounding to nearest, and weights
shrink by 1.00 times the squared error. With `gptq` and `importance`, and inputs as in
`FEEDBACK_NOISE`, a row had up to 2.4 in the units of `max_steps`, and weights shrank by 0.3 to 2.9
times the squared error, in 8 bits by up to 0.014; two rows that changed places have 4.5 to 9. With
`ggml search`, a few outermost weights clip: up to 1.0 steps, with an importance matrix 2.6.
"""


def expectation(scheme: Uniform, weighted: bool) -> Expectation:
    """Returns the limits of a scheme; `weighted` if an importance matrix was used."""
    return EXPECTATIONS[expectation_key(scheme, weighted)]


def expectation_key(scheme: Uniform, weighted: bool) -> str:
    """Returns the key of `EXPECTATIONS`; RequestError for an algorithm that is not known here."""
    rule = scheme.rounding_rule(weighted)
    if rule not in EXPECTATIONS:
        raise RequestError(
            f"the artifact has levels chosen by {rule!r}, which this version cannot judge; "
            f"expected one of {', '.join(ALGORITHMS)}; validate it with a later rgexport"
        )
    fine_rule = f"{rule}, 8 bits"
    if scheme.bits_per_weight >= 8 and fine_rule in EXPECTATIONS:
        return fine_rule
    return rule
