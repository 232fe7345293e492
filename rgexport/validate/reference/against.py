"""Compares an artifact with a reference file: the cost of compression, without the original."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest
from rgexport.errors import RequestError
from rgexport.progress import task
from rgexport.runtimes.session import Session, blocks, whole_chunks
from rgexport.validate import metrics
from rgexport.validate.checks import Check, cost_checks, tolerance
from rgexport.validate.reference.reference_file import PromptRecord, ReferenceFile
from rgexport.validate.source import config_differences
from rgexport.validate.weights.sketch_errors import SketchError, sketch_errors
from rgexport.validate.weights.weight_limits import sketch_checks

SHAPES = (
    "vocab_size width mlp_width lru_width lru_heads num_heads head_dim block_types conv_width"
).split()
"""Fields of the configuration that an artifact and its reference must share."""


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """One prompt; `kl` (nats) and `top1` are means over the `positions` with logits in the file.

    The artifact chooses the first `greedy_common` of `greedy_tokens` of the reference's
    continuation.
    """

    name: str
    tokens: int
    positions: int
    kl: float
    top1: float
    worst_state: float
    greedy_tokens: int
    greedy_common: int


@dataclass(frozen=True, kw_only=True)
class AgainstFile:
    """The artifact against a reference file, over all its prompts.

    Logits are compared at the `positions` that the file has, of `tokens` in all, which
    `worst_position` counts through. `states` are those after the prompts, each of the prompt where
    it is worst; `drift` has the recurrent ones inside the longest prompt.
    """

    path: str
    model: str
    computed: dict[str, str]
    same_files: bool
    config_differences: tuple[str, ...]
    tokens: int
    positions: int
    non_finite_positions: int
    logits: metrics.LogitError
    kl: metrics.KL
    agreement: metrics.Agreement
    likelihood: metrics.Likelihood | None
    states: list[metrics.StateError]
    drift: list[metrics.Drift]
    weights: list[SketchError]
    prompts: list[PromptResult]


def check_fits(reference: ReferenceFile, manifest: Manifest) -> None:
    """Raises RequestError for a file of a model of another shape."""
    theirs, ours = reference.header.config, manifest.config
    for name in SHAPES:
        if getattr(theirs, name) != getattr(ours, name):
            raise RequestError(
                f"{reference.path} is of a model of another shape: its {name} is "
                f"{getattr(theirs, name)}, the artifact's {getattr(ours, name)}; give a reference "
                "of the model that the artifact was made from"
            )


def compare_with_file(
    session: Session, artifact: Artifact, reference: ReferenceFile
) -> AgainstFile:
    """Teacher-forces an artifact's session with all prompts, and compares its weights."""
    manifest, header = artifact.manifest, reference.header
    check_fits(reference, manifest)
    forced, positions = [], []
    with task("Comparing with the reference file", header.tokens, "tokens") as advance:
        for index, prompt, span in reference.spans():
            forced.append(_force(session, reference, index, prompt, span))
            positions += [span.start + position for position in prompt.positions]
            advance(prompt.tokens)
    prompts, rows_of_each, non_finite, states, drift = zip(*forced, strict=True)
    rows = np.concatenate(rows_of_each)
    logits, kl = metrics.logit_error(rows), metrics.kl_summary(rows)
    sizes = [prompt.bytes for prompt in header.prompts]
    complete = len(rows) == header.tokens and None not in sizes
    ours = {record.sha256 for record in manifest.source.files.values()}
    return AgainstFile(
        path=str(reference.path),
        model=header.model,
        computed=header.computed,
        same_files=ours == {record.sha256 for record in header.files.values()},
        config_differences=config_differences(manifest.config, header.config),
        tokens=header.tokens,
        positions=len(rows),
        non_finite_positions=sum(non_finite),
        logits=replace(logits, worst_position=positions[logits.worst_position]),
        kl=replace(kl, worst_position=positions[kl.worst_position]),
        agreement=metrics.agreement(rows, tolerance(manifest).rms),
        likelihood=metrics.likelihood(rows, sum(filter(None, sizes)) if complete else None),
        states=_worst_states(chain.from_iterable(states)),
        drift=[*chain.from_iterable(drift)],
        weights=sketch_errors(reference, artifact.weights, manifest.tensors, manifest.weighted),
        prompts=[*prompts],
    )


def _force(
    session: Session, reference: ReferenceFile, index: int, prompt: PromptRecord, span: slice
) -> tuple[PromptResult, np.ndarray, int, list[metrics.StateError], list[metrics.Drift]]:
    """Returns the result, its rows, positions that are not finite, states after it, and inside."""
    tokens, inside = reference.tokens[span], reference.checkpoints(index)
    following, positions = np.append(tokens[1:], -1), np.array(prompt.positions)
    compared, drift, non_finite, logits = [], [], 0, np.empty((1, 0))
    session.reset()
    for start, stop in blocks(session, {len(tokens)} | whole_chunks(session, inside)):
        logits = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
        non_finite += int((~np.isfinite(logits).all(1)).sum())
        first, last = np.searchsorted(positions, (start, stop)).tolist()
        at, expected = positions[first:last], reference.logits(index, first, last)
        compared.append(metrics.compare_logits(expected, logits[at - start], following[at]))
        if stop in inside:
            errors = metrics.state_errors(inside[stop], session.get_state())
            drift.append(metrics.Drift(position=stop, states=errors))
    rows = np.concatenate(compared)
    states = metrics.state_errors(reference.state(index), session.get_state())
    result = PromptResult(
        name=prompt.name,
        tokens=prompt.tokens,
        positions=len(positions),
        kl=float(rows["kl"].mean()),
        top1=float(rows["top1"].mean()),
        worst_state=metrics.worst(states),
        greedy_tokens=prompt.greedy_tokens,
        greedy_common=_count_common(session, logits[-1], reference.greedy(index)),
    )
    return result, rows, non_finite, states, drift


def _count_common(session: Session, logits: np.ndarray, expected: np.ndarray) -> int:
    for count, token in enumerate(expected.tolist()):
        if int(logits.argmax()) != token:
            return count
        if count + 1 < len(expected):
            logits = session.step(np.array([token], np.int64))[0]
    return len(expected)


def _worst_states(errors: Iterable[metrics.StateError]) -> list[metrics.StateError]:
    worst_of: dict[str, metrics.StateError] = {}
    for error in errors:
        earlier = worst_of.setdefault(error.name, error)
        if math.isnan(error.relative_max) or error.relative_max > earlier.relative_max:
            worst_of[error.name] = error
    return list(worst_of.values())


def file_checks(
    result: AgainstFile, manifest: Manifest, limits: Mapping[str, float]
) -> Iterator[Check]:
    yield from cost_checks("reference", manifest, result.logits, result.kl, limits)
    broken, reason = result.non_finite_positions, "positions whose logits are not finite"
    yield Check(name="reference.finite", value=float(broken), limit=0, reason=reason)
    yield from sketch_checks(result.weights)
