"""The self-check at the end of an export, on a few dozen tokens in the artifact's engine."""

import os
from collections.abc import Iterator
from math import isfinite, prod
from pathlib import Path

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import CheckRecord, Manifest, skipped
from rgexport.artifacts.opening import open_artifact
from rgexport.errors import NotInstalled, RequestError
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import layer_tensors
from rgexport.progress import task
from rgexport.runtimes.engine import engine_of, open_session
from rgexport.runtimes.machine import available_bytes, release_freed_memory
from rgexport.units import amount
from rgexport.validate import metrics
from rgexport.validate.checks import logit_checks, original_rms, tolerance
from rgexport.validate.formats.expected import Schedule, expected_of
from rgexport.validate.identity import first_names
from rgexport.validate.metrics import LogitError
from rgexport.validate.reference_pass import run_side_by_side
from rgexport.validate.text import first_tokens
from rgexport.validate.weights.weight_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import weight_checks

_REST_BYTES = 384 << 20  # memory for temporaries, a few rows of logits, and libraries


def self_check(checkpoint: Checkpoint, path: Path) -> CheckRecord:
    """Compares an artifact with its checkpoint: logits of a few tokens, and all weights.

    Logits alone cannot prove that the weights are the checkpoint's: with 4 bits, those of a
    fine-tuned model may be as close. The references run one layer at a time, before the engine
    opens the artifact.
    """
    try:
        artifact = open_artifact(path)
        if shortage := _memory_shortage(artifact):
            return skipped(shortage)
        return _check(artifact, checkpoint)
    except NotInstalled as error:
        return skipped(_without_path(error, path))
    except MemoryError:
        return skipped("memory ran out")
    except RequestError as error:
        return CheckRecord(status="unverified", reason=_without_path(error, path))


def _check(artifact: Artifact, checkpoint: Checkpoint) -> CheckRecord:
    manifest = artifact.manifest
    schedule = expected_of(manifest.kind).schedule(manifest)
    tokens = first_tokens(artifact, schedule.chunk + schedule.steps)
    ours, theirs = (manifest.config, artifact.weights), (checkpoint.config, checkpoint.weights)
    references = run_side_by_side("Self-check", [(*ours, False), (*theirs, True)], tokens)
    logits, engine = _run_engine(artifact, tokens, schedule)
    start, following = len(tokens) - len(logits), np.append(tokens[1:], -1)
    dequantized, original = (
        metrics.compare_logits(one.logits(start, len(tokens)), logits, following[start:])
        for one in references
    )
    known, stored, mixtures = checkpoint.weights, artifact.weights, references[1].inputs
    weights = weight_errors(known, stored, manifest.tensors, manifest.weighted, mixtures)
    errors = metrics.logit_error(dequantized), metrics.logit_error(original)
    failures, kl = list(_failures(manifest, *errors, weights)), metrics.kl_summary(original)
    return CheckRecord(
        status="unverified" if failures else "verified",
        reason=first_names(failures),
        tokens=len(tokens),
        positions=schedule.rows + schedule.steps,
        kl=_finite(kl.mean),
        kl_standard_error=_finite(kl.standard_error),
        relative_max=_finite(errors[0].relative_max),
        engine=engine,
    )


def _memory_shortage(artifact: Artifact) -> str | None:
    engine, config = engine_of(artifact.manifest.kind), artifact.manifest.config
    engine.require()
    layers = (layer_tensors(config, index).values() for index in range(config.num_layers))
    layer_bytes = max((sum(4 * prod(spec.shape) for spec in layer) for layer in layers), default=0)
    # Two references, each with two layers in float32: one is still held while the next is read.
    # Measured at 2B: 0.9 GB per reference, and 1.9 GB for ONNX Runtime in int4.
    needed = max(4 * layer_bytes, engine.memory_bytes(artifact.manifest)) + _REST_BYTES
    available = available_bytes()
    if available is None or needed <= available:
        return None
    return f"it takes about {amount(needed)} of memory, and {amount(available)} are free"


def _run_engine(
    artifact: Artifact, tokens: np.ndarray, schedule: Schedule
) -> tuple[np.ndarray, str]:
    """Prefills and decodes; returns the scheduled logits [n, vocab], and the engine's title."""
    release_freed_memory()
    session = open_session(artifact, lean=True)
    engine = session.info.title
    try:
        with task("Self-check", len(tokens), "tokens") as advance:
            logits = [session.prefill(tokens[None, : schedule.chunk], schedule.rows)[0]]
            advance(schedule.chunk)
            for token in tokens[schedule.chunk :]:
                logits.append(session.step(token[None]))
                advance(1)
        return np.concatenate(logits), engine
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # ONNX Runtime raises a dozen types without a common base
        reason = " ".join(str(error).split())
        raise RequestError(f"{engine} cannot run it: {reason}") from None
    finally:
        session.close()


def _failures(
    manifest: Manifest, dequantized: LogitError, original: LogitError, weights: list[WeightError]
) -> Iterator[str]:
    for check in (
        *logit_checks(dequantized, tolerance(manifest)),
        original_rms(manifest, original),
        *weight_checks(weights),
    ):
        if check.outcome == "FAIL":
            yield f"{check.name} is {check.value:.3g}, beyond {check.limit:.3g} ({check.reason})"


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _without_path(error: RequestError, path: Path) -> str:
    return str(error).replace(f"{path}{os.sep}", "").replace(str(path), "the artifact")
