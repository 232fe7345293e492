"""The self-check that ends an export: a few dozen tokens in the artifact's own engine."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.checked import CheckRecord, skipped
from rgexport.export.manifest import Manifest
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.state import zero_state
from rgexport.progress import task
from rgexport.runtimes.engine import engine_of, open_session
from rgexport.runtimes.memory import give_back
from rgexport.runtimes.session import Session
from rgexport.validate import metrics, thresholds
from rgexport.validate.checks import Check
from rgexport.validate.formats.expected import Schedule, expected_of
from rgexport.validate.reference_pass import ReferenceModel, torch_reference
from rgexport.validate.room import lack_of_room
from rgexport.validate.text import first_tokens
from rgexport.validate.weights.weight_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import weight_checks


def self_check(checkpoint: Checkpoint, path: Path) -> CheckRecord:
    """Compares an artifact with its twin and with the checkpoint that it was made from.

    Its weights are compared with the checkpoint's, too: a few tokens' logits in four bits are as
    near to those of another model. The references run first, one layer at a time, and are gone
    when the engine opens the artifact: beside the engine's memory it takes no more than a layer
    and a few rows of logits.
    """
    try:
        return _checked(open_artifact(path), checkpoint)
    except NotInstalled as error:
        return skipped(_without(path, error))
    except MemoryError:
        return skipped("memory ran out")
    except RequestError as error:
        return CheckRecord(status="unverified", reason=_without(path, error))


def _checked(artifact: Artifact, checkpoint: Checkpoint) -> CheckRecord:
    manifest = artifact.manifest
    engine_of(manifest.kind).require()
    make = torch_reference("cpu")
    if lack := lack_of_room(manifest):
        return skipped(lack)
    schedule = expected_of(manifest.kind).schedule(manifest)
    tokens = first_tokens(artifact, schedule.tokens)
    table = weight_errors(
        checkpoint.weights, artifact.weights, manifest.tensors, weighted=manifest.weighted
    )
    models = (manifest.config, artifact.weights), (checkpoint.config, checkpoint.weights)
    references = _references([make(*model) for model in models], tokens, schedule.positions)
    found, engine = _candidate(artifact, tokens, schedule)
    twin, original = (_rows(reference, found, tokens) for reference in references)
    wrong = _first(_complaints(manifest, table, twin, original))
    return _judged(wrong, schedule, engine, twin, original)


def _references(
    models: Sequence[ReferenceModel], tokens: np.ndarray, rows: int
) -> list[np.ndarray]:
    """The logits of the last `rows` tokens, float32 [rows, vocab], of each model.

    They run side by side: what takes time is to read and dequantize weights, on one thread each.
    """
    ended = threading.Event()
    layers = sum(model.config.num_layers for model in models)
    with task("Self-check", layers, "layers") as advance, ThreadPoolExecutor() as pool:

        def logits(model: ReferenceModel) -> np.ndarray:
            def watch(*_: Any) -> None:
                advance(1)
                if ended.is_set():
                    raise InterruptedError

            text = tokens[None], zero_state(model.config, 1)
            ((hidden, _),) = model.run_each([text], watch=watch)
            return model.logits(hidden[:, -rows:])[0]

        try:
            return list(pool.map(logits, models))
        finally:
            ended.set()  # after an interrupt, none goes on to its end


def _candidate(
    artifact: Artifact, tokens: np.ndarray, schedule: Schedule
) -> tuple[np.ndarray, str]:
    """The artifact's logits of the same tokens, and what ran it.

    Raises:
        NotInstalled: there is no engine that could run it.
        RequestError: the engine cannot open or run it.
    """
    give_back()
    session = open_session(artifact, lean=True)
    engine = session.info.title
    try:
        return _forced(session, tokens, schedule), engine
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # ONNX Runtime raises a dozen types without a common base
        raise RequestError(f"{engine} cannot run it: {' '.join(str(error).split())}") from None
    finally:
        session.close()


def _forced(session: Session, tokens: np.ndarray, schedule: Schedule) -> np.ndarray:
    """A session's logits of the last tokens, [positions, vocab]."""
    with task("Self-check", schedule.tokens, "tokens") as advance:
        logits = [session.prefill(tokens[None, : schedule.chunk], schedule.rows)[0]]
        advance(schedule.chunk)
        for token in tokens[schedule.chunk :]:
            logits.append(session.step(token[None]))
            advance(1)
    return np.concatenate(logits)


def _rows(reference: np.ndarray, found: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    next_tokens = np.append(tokens[1:], -1)[-len(found) :]
    return metrics.compare_logits(reference, found, next_tokens)


def _judged(
    wrong: str, schedule: Schedule, engine: str, twin: np.ndarray, original: np.ndarray
) -> CheckRecord:
    """The verdict on rows of `metrics.ROWS` against both references."""
    kl, error = metrics.kl_summary(original), metrics.logit_error(twin)
    return CheckRecord(
        status="unverified" if wrong else "verified",
        reason=wrong,
        tokens=schedule.tokens,
        positions=schedule.positions,
        kl=_number(kl.mean),
        kl_standard_error=_number(kl.standard_error),
        relative_max=_number(error.relative_max),
        engine=engine,
    )


_NAMED = 3
"""Complaints that are told one by one."""
_WORDS = {
    "twin.logits": "the largest difference from the dequantized reference, of the largest logit,",
    "twin.rms": "the difference from the dequantized reference (RMS, of the logits' spread)",
    "original.rms": "the difference from the original (rms, of the logits' spread)",
}


def _complaints(
    manifest: Manifest, table: Sequence[WeightError], twin: np.ndarray, original: np.ndarray
) -> Iterator[str]:
    """What is beyond its limit, by the thresholds of `validate`; rows are of `metrics.ROWS`."""
    limit, error = thresholds.tolerance(manifest), metrics.logit_error(twin)
    logits = (
        Check(name="twin.logits", value=error.relative_max, limit=limit.logits, reason=""),
        Check(name="twin.rms", value=error.relative_rms, limit=limit.rms, reason=""),
        thresholds.original_rms(manifest, metrics.logit_error(original)),
    )
    for check in (*logits, *weight_checks(table)):
        if check.outcome == "FAIL":
            what = _WORDS.get(check.name, f"{check.name} ({check.reason})")
            yield f"{what} is {check.value:.3g}, beyond {check.limit:.3g}"


def _first(complaints: Iterable[str]) -> str:
    """Some of them in one line, and how many more there are."""
    found = list(complaints)
    rest = [f"{len(found) - _NAMED} more"] if len(found) > _NAMED else []
    return ", and ".join(found[:_NAMED] + rest)


def _number(value: float) -> float | None:
    return value if isfinite(value) else None


def _without(path: Path, error: RequestError) -> str:
    """What an error says, without the artifact's path, which is a passing one."""
    return str(error).replace(f"{path}{os.sep}", "").replace(str(path), "the artifact")
