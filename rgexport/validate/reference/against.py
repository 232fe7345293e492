"""Compares an artifact with a reference file: the cost of compression, without the original."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.griffin.state import State
from rgexport.progress import task
from rgexport.runtimes.engine import open_observer
from rgexport.runtimes.session import Session
from rgexport.validate import metrics, thresholds
from rgexport.validate.checks import NO_LIMITS, STANDARD_ERRORS, Check
from rgexport.validate.reference.against_prompt import PromptMeasured, measure_prompt
from rgexport.validate.reference.reference_file import PromptRecord, ReferenceFile
from rgexport.validate.source import config_differences
from rgexport.validate.states import Drift, StateError, worst
from rgexport.validate.weights.sketch_errors import SketchError, sketch_errors
from rgexport.validate.weights.weight_limits import sketch_checks

STATE_BYTES = 256 << 20
"""Budget for the artifact's states before watched positions: 7 of a 2B, in float32."""
SHAPES = (
    "vocab_size",
    "width",
    "mlp_width",
    "lru_width",
    "lru_heads",
    "num_heads",
    "head_dim",
    "block_types",
    "conv_width",
)
"""Fields of the configuration that an artifact and its reference must share."""


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """One prompt; the mean KL is about `kl`, and surely from `kl_low` to `kl_high`.

    `greedy_common` counts the tokens of the reference's continuation, of `greedy_tokens`, that the
    artifact chooses too, up to the first that it does not.
    """

    name: str
    tokens: int
    kl: float
    kl_low: float
    kl_high: float
    top1: float
    worst_state: float
    greedy_tokens: int
    greedy_common: int


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The residual stream after one layer: ‖Δ‖ / ‖reference‖ over some positions.

    It includes the errors of all layers before. So the layer to blame is the first beyond its
    limit, or the one where the error grows most. `worst_position` is where it is largest.
    """

    layer: int
    relative_rms: float
    worst_position: int
    limit: float

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return self.relative_rms <= self.limit


@dataclass(frozen=True, kw_only=True)
class AgainstFile:
    """The artifact against a reference file, over all its prompts.

    KL at each position is about `kl` and surely from `kl_low` to `kl_high`; all three are the same
    where the file has all logits (see `condensed.KLBounds`). `kl_width` is the width of the mean's
    interval relative to the mean. `logits` and `kl_full` are of the `full_positions` only, all else
    is of all positions. Where the artifact's first choice is not among the tokens whose logits the
    file has, `largest_flip_margin` counts less than the reference prefers its own by. `states` are
    those after the prompts, each of the prompt where it is worst; `drift` has the recurrent ones
    inside the longest prompt. `weights` compares the artifact's with the file's sketches. `layers`
    is there if the layers were compared one by one.
    """

    path: str
    model: str
    computed: dict[str, str]
    same_files: bool
    config_differences: tuple[str, ...]
    positions: int
    full_positions: int
    non_finite_positions: int
    logits: metrics.LogitError
    kl: metrics.KL
    kl_low: metrics.KL
    kl_high: metrics.KL
    kl_width: float
    kl_full: metrics.KL
    agreement: metrics.Agreement
    likelihood: metrics.Likelihood | None
    states: list[StateError]
    drift: list[Drift]
    weights: list[SketchError]
    layers: list[LayerError] | None = None
    prompts: list[PromptResult]

    @property
    def greedy(self) -> tuple[int, int]:
        """Tokens of the reference's continuations, and how many the artifact shares."""
        found = [(prompt.greedy_tokens, prompt.greedy_common) for prompt in self.prompts]
        return sum(tokens for tokens, _ in found), sum(common for _, common in found)

    @property
    def kl_interval(self) -> float:
        """How far the mean KL may be from `kl.mean`, because the file lacks logits."""
        return max(self.kl.mean - self.kl_low.mean, self.kl_high.mean - self.kl.mean)


def check_fits(reference: ReferenceFile, manifest: Manifest) -> None:
    """Refuses a reference of a model of another shape.

    Raises:
        RequestError: a field of `SHAPES` differs.
    """
    ours, theirs = manifest.config, reference.header.config
    for name in SHAPES:
        if getattr(ours, name) != getattr(theirs, name):
            raise RequestError(
                f"{reference.path} is of a model of another shape: its {name} is "
                f"{getattr(theirs, name)}, the artifact's {getattr(ours, name)}; give a reference "
                "of the model that the artifact was made from"
            )


def compare_with_file(
    session: Session,
    artifact: Artifact,
    reference: ReferenceFile,
    before: dict[int, State] | None = None,
) -> AgainstFile:
    """Teacher-forces a session with all prompts; logits exist for a block of positions at a time.

    Args:
        session: the artifact's.
        artifact: whose weights are compared too.
        reference: the file.
        before: if given, it is filled with the session's canonical states before some of the
            file's watched positions, for `with_layers`.

    Raises:
        RequestError: see `check_fits`.
    """
    manifest = artifact.manifest
    check_fits(reference, manifest)
    header, measured = reference.header, _measure_all(session, reference, before)
    rows = np.concatenate([found.rows for found in measured])
    low, best, high = map(_kl_summary, np.concatenate([found.bounds for found in measured]).T)
    full = reference.full_positions
    logits, kl_full = metrics.logit_error(rows[full]), metrics.kl_summary(rows[full])
    ours = {record.sha256 for record in manifest.source.files.values()}
    return AgainstFile(
        path=str(reference.path),
        model=header.model,
        computed=header.computed,
        same_files=ours == {record.sha256 for record in header.files.values()},
        config_differences=config_differences(manifest.config, header.config),
        positions=len(rows),
        full_positions=len(full),
        non_finite_positions=int(sum((~found.finite).sum() for found in measured)),
        logits=replace(logits, worst_position=int(full[logits.worst_position])),
        kl=best,
        kl_low=low,
        kl_high=high,
        kl_width=(high.mean - low.mean) / best.mean if best.mean else 0.0,
        kl_full=replace(kl_full, worst_position=int(full[kl_full.worst_position])),
        agreement=metrics.agreement(rows, thresholds.tolerance(manifest).rms),
        likelihood=metrics.likelihood(rows, _bytes(header.prompts)),
        states=_worst_states([found.states for found in measured]),
        drift=[drift for found in measured for drift in found.drift],
        weights=sketch_errors(
            reference, artifact.weights, manifest.tensors, weighted=manifest.weighted
        ),
        prompts=[
            _prompt_result(prompt, found)
            for prompt, found in zip(header.prompts, measured, strict=True)
        ],
    )


def with_layers(
    found: AgainstFile,
    artifact: Artifact,
    reference: ReferenceFile,
    before: Mapping[int, State],
) -> AgainstFile:
    """The same with `layers`: observes the artifact in its engine, a token at each position.

    Args:
        found: the comparison.
        artifact: loaded once more; its session should be closed.
        reference: the file.
        before: watched position → the artifact's canonical state before it, from
            `compare_with_file`.

    Raises:
        RequestError: the engine cannot show values inside the model.
    """
    observer = open_observer(artifact)
    deltas, sizes = [], []
    with task("Looking at the layers", len(before), "positions") as advance:
        for position, state in before.items():
            expected = reference.activations(reference.header.watched.index(position))
            token = reference.tokens[position : position + 1]
            values = observer.observe(token, state).values
            stream = [values[f"layers.{i}.channel_residual"][-1] for i in range(len(expected))]
            with np.errstate(invalid="ignore", over="ignore"):
                delta = np.asarray(stream, np.float64) - expected
                deltas.append(np.square(delta).sum(1))
            sizes.append(np.square(expected, dtype=np.float64).sum(1))
            advance(1)
    limit = thresholds.original_rms(artifact.manifest, found.logits).limit
    layers = _layer_errors(np.array(deltas), np.array(sizes), tuple(before), limit)
    return replace(found, layers=layers)


def _layer_errors(
    deltas: np.ndarray, sizes: np.ndarray, positions: tuple[int, ...], limit: float
) -> list[LayerError]:
    """From sums of squares [positions, layers] of the errors and of the reference."""
    shares = np.sqrt(deltas / np.where(sizes, sizes, 1))
    worst = np.nan_to_num(shares, nan=np.inf).argmax(0).tolist()
    totals = np.sqrt(deltas.sum(0) / np.where(sizes.sum(0), sizes.sum(0), 1)).tolist()
    return [
        LayerError(layer=i, relative_rms=total, worst_position=positions[place], limit=limit)
        for i, (total, place) in enumerate(zip(totals, worst, strict=True))
    ]


def positions_to_look_at(reference: ReferenceFile, state: State) -> tuple[int, ...]:
    """As many of the watched positions as have room for a state of this size each."""
    size = sum(array.nbytes for array in state.values())
    watched = reference.header.watched
    count = min(len(watched), max(1, STATE_BYTES // size))
    places = np.linspace(0, len(watched) - 1, count).round().astype(int)
    return tuple(watched[place] for place in places.tolist())


def _measure_all(
    session: Session, reference: ReferenceFile, before: dict[int, State] | None
) -> list[PromptMeasured]:
    measured = []
    session.reset()
    wanted = () if before is None else positions_to_look_at(reference, session.get_state())
    total = reference.header.positions
    with task("Comparing with the reference file", total, "tokens") as advance:
        for index, prompt, span in reference.spans():
            keep = [place - span.start for place in wanted if span.start <= place < span.stop]
            found = measure_prompt(session, reference, index, span, keep)
            if before is not None:
                before |= {span.start + count: state for count, state in found.before.items()}
            measured.append(found)
            advance(prompt.tokens)
    return measured


def _kl_summary(kl: np.ndarray) -> metrics.KL:
    rows = np.zeros(len(kl), metrics.ROWS)
    rows["kl"] = kl
    return metrics.kl_summary(rows)


def file_checks(
    found: AgainstFile, manifest: Manifest, limits: Mapping[str, float] = NO_LIMITS
) -> Iterator[Check]:
    """Compares what was measured against a reference file with its limits.

    KL has one only where `limits` has. Its margin covers its interval and its standard error.
    """
    yield thresholds.original_rms(manifest, found.logits, "reference.rms")
    if "reference.kl" in limits:
        yield Check(
            name="reference.kl",
            value=found.kl.mean,
            margin=found.kl_interval + STANDARD_ERRORS * found.kl.standard_error,
            limit=limits["reference.kl"],
            reason="mean KL to the reference file, nats",
        )
    yield Check(
        name="reference.finite",
        value=float(found.non_finite_positions),
        limit=0,
        reason="positions whose logits are not finite",
    )
    yield from sketch_checks(found.weights)


def _bytes(prompts: tuple[PromptRecord, ...]) -> int | None:
    """Of all texts together; None where one is unknown."""
    known = [prompt.bytes for prompt in prompts if prompt.bytes is not None]
    return sum(known) if len(known) == len(prompts) else None


def _worst_states(prompts: list[list[StateError]]) -> list[StateError]:
    """Each state's error on the prompt where it is worst; NaN is worst of all."""
    found: dict[str, StateError] = {}
    for error in chain.from_iterable(prompts):
        other = found.get(error.name)
        if other is None or not error.relative_max <= other.relative_max:
            found[error.name] = error
    return list(found.values())


def _prompt_result(prompt: PromptRecord, found: PromptMeasured) -> PromptResult:
    low, best, high = found.bounds.mean(0).tolist()
    return PromptResult(
        name=prompt.name,
        tokens=prompt.tokens,
        kl=best,
        kl_low=low,
        kl_high=high,
        top1=float(found.rows["top1"].mean()),
        worst_state=worst(found.states),
        greedy_tokens=prompt.greedy_tokens,
        greedy_common=found.greedy_common,
    )
