"""The self-check that ends an export: a few dozen tokens in the artifact's own engine."""

import os
from collections.abc import Iterator
from math import isfinite, prod
from pathlib import Path

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.checked import CheckRecord, skipped
from rgexport.export.manifest import Manifest
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import layer_tensors
from rgexport.progress import task
from rgexport.runtimes.engine import engine_of, open_session
from rgexport.runtimes.memory import available_bytes, give_back
from rgexport.runtimes.session import Session
from rgexport.units import amount
from rgexport.validate.formats.expected import Schedule, expected_of
from rgexport.validate.measure import Comparison, ComparisonRecorder
from rgexport.validate.reference_pass import Pass, run_side_by_side
from rgexport.validate.text import first_tokens
from rgexport.validate.thresholds import logit_checks, original_rms, tolerance
from rgexport.validate.weights.tensor_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import weight_checks

_REST_BYTES = 384 << 20
"""Temporaries, a few rows of logits, and libraries that are loaded for the check."""
_MOST_NAMED = 3
_NAMES = {
    "dequantized.logits": (
        "the largest difference from the dequantized reference, of the largest logit,"
    ),
    "dequantized.rms": "the difference from the dequantized reference (RMS, of the logits' spread)",
    "original.rms": "the difference from the original (rms, of the logits' spread)",
}
"""Name of a check → what people read."""


def self_check(checkpoint: Checkpoint, path: Path) -> CheckRecord:
    """Compares an artifact with its dequantized reference, and with its checkpoint.

    Weights are compared with the checkpoint's, too: a few tokens' logits in four bits are as near
    to those of another model. The references run one layer at a time and are gone when the engine
    opens the artifact, so beside the engine's memory it takes a layer and a few rows of logits.
    """
    try:
        artifact = open_artifact(path)
        if lack := _lack(artifact):
            return skipped(lack)
        return _check(artifact, checkpoint)
    except NotInstalled as error:
        return skipped(_without(path, error))
    except MemoryError:
        return skipped("memory ran out")
    except RequestError as error:
        return CheckRecord(status="unverified", reason=_without(path, error))


def _check(artifact: Artifact, checkpoint: Checkpoint) -> CheckRecord:
    manifest = artifact.manifest
    schedule = expected_of(manifest.kind).schedule(manifest)
    tokens = first_tokens(artifact, schedule.chunk + schedule.steps)
    models = [
        (manifest.config, artifact.weights, False),
        (checkpoint.config, checkpoint.weights, True),
    ]
    passes = run_side_by_side("Self-check", models, tokens)
    (dequantized, original), engine = _run_engine(artifact, tokens, schedule, passes)
    weights = weight_errors(
        checkpoint.weights,
        artifact.weights,
        manifest.tensors,
        weighted=manifest.weighted,
        inputs=passes[1].inputs,
    )
    complaints = list(_complaints(manifest, dequantized, original, weights))
    if len(complaints) > _MOST_NAMED:
        complaints[_MOST_NAMED:] = [f"{len(complaints) - _MOST_NAMED} more"]
    return CheckRecord(
        status="unverified" if complaints else "verified",
        reason=", and ".join(complaints),
        tokens=len(tokens),
        positions=schedule.rows + schedule.steps,
        kl=_finite(original.kl.mean),
        kl_standard_error=_finite(original.kl.standard_error),
        relative_max=_finite(dequantized.logits.relative_max),
        engine=engine,
    )


def _lack(artifact: Artifact) -> str | None:
    """Returns a sentence if memory is short; None if it suffices or the system hides it."""
    engine, config = engine_of(artifact.manifest.kind), artifact.manifest.config
    engine.require()
    layers = (layer_tensors(config, index).values() for index in range(config.num_layers))
    largest = max((sum(4 * prod(spec.shape) for spec in layer) for layer in layers), default=0)
    # Two references, each with a layer and the next in float32. Measured: 0.9 GB each at 2B, where
    # ONNX Runtime takes 1.9 GB in int4.
    needed = max(4 * largest, engine.memory_bytes(artifact.manifest)) + _REST_BYTES
    available = available_bytes()
    if available is None or needed <= available:
        return None
    return f"it takes about {amount(needed)} of memory, and {amount(available)} are free"


def _run_engine(
    artifact: Artifact, tokens: np.ndarray, schedule: Schedule, references: list[Pass]
) -> tuple[list[Comparison], str]:
    """Compares the artifact with both references; returns the engine's title, too."""
    give_back()
    session = open_session(artifact, lean=True)
    engine = session.info.title
    try:
        logits, state = _teacher_force(session, tokens, schedule), session.get_state()
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # ONNX Runtime raises a dozen types without a common base
        what = " ".join(str(error).split())
        raise RequestError(f"{engine} cannot run it: {what}") from None
    finally:
        session.close()
    sides = [ComparisonRecorder(reference, tokens) for reference in references]
    for side in sides:
        side.add(len(tokens) - len(logits), logits)
    return [side.comparison(state) for side in sides], engine


def _teacher_force(session: Session, tokens: np.ndarray, schedule: Schedule) -> np.ndarray:
    with task("Self-check", len(tokens), "tokens") as advance:
        logits = [session.prefill(tokens[None, : schedule.chunk], schedule.rows)[0]]
        advance(schedule.chunk)
        for token in tokens[schedule.chunk :]:
            logits.append(session.step(token[None]))
            advance(1)
    return np.concatenate(logits)


def _complaints(
    manifest: Manifest, dequantized: Comparison, original: Comparison, weights: list[WeightError]
) -> Iterator[str]:
    """Yields the values that are beyond the limits of `validate`."""
    for check in (
        *logit_checks(dequantized.logits, tolerance(manifest)),
        original_rms(manifest, original.logits),
        *weight_checks(weights),
    ):
        if check.outcome == "FAIL":
            what = _NAMES.get(check.name, f"{check.name} ({check.reason})")
            yield f"{what} is {check.value:.3g}, beyond {check.limit:.3g}"


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _without(path: Path, error: RequestError) -> str:
    """An error's text without the path of the artifact, which will be renamed."""
    return str(error).replace(f"{path}{os.sep}", "").replace(str(path), "the artifact")
