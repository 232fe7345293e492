"""The self-check that ends an export: a few dozen tokens in the artifact's own engine."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.checked import CheckRecord, skipped
from rgexport.export.manifest import Manifest
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import layer_tensors
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import zero_state
from rgexport.progress import task
from rgexport.runtimes.engine import engine_of, open_session
from rgexport.runtimes.memory import available_bytes, give_back
from rgexport.runtimes.session import Session
from rgexport.units import amount
from rgexport.validate import metrics, thresholds
from rgexport.validate.checks import Check
from rgexport.validate.formats.expected import Schedule, expected_of
from rgexport.validate.text import first_tokens
from rgexport.validate.weights.input_mixtures import MixtureRecorder, Mixtures
from rgexport.validate.weights.weight_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import weight_checks

_REST_BYTES = 384 << 20
"""Temporaries, a few rows of logits, and libraries that are loaded for the check."""


@dataclass(frozen=True)
class _Opened:
    """What is checked, on what, and against what."""

    artifact: Artifact
    checkpoint: Checkpoint
    schedule: Schedule
    tokens: np.ndarray
    references: tuple[NumpyReference, NumpyReference]
    """With the artifact's weights, dequantized, and with the checkpoint's."""


@dataclass(frozen=True)
class _Ran:
    """Logits of the last tokens, float32 [positions, vocab]; mixtures of the linears' inputs."""

    dequantized: np.ndarray
    original: np.ndarray
    artifact: np.ndarray
    engine: str
    inputs: Mixtures


@dataclass(frozen=True)
class _Compared:
    """The artifact's logits beside both references', as rows of `metrics.ROWS`; and its weights."""

    dequantized: np.ndarray
    original: np.ndarray
    weights: list[WeightError]


def self_check(checkpoint: Checkpoint, path: Path) -> CheckRecord:
    """Compares an artifact with its dequantized reference, and with its checkpoint.

    Like `validate`, it opens, runs, compares and judges. Weights are compared with the
    checkpoint's, too: a few tokens' logits in four bits are as near to those of another model.
    The references run one layer at a time and are gone when the engine opens the artifact, so
    beside the engine's memory it takes no more than a layer and a few rows of logits.
    """
    try:
        if lack := _lack(artifact := open_artifact(path)):
            return skipped(lack)
        opened = _open(artifact, checkpoint)
        ran = _run(opened)
        return _judge(opened, ran.engine, _compare(opened, ran))
    except NotInstalled as error:
        return skipped(_without(path, error))
    except MemoryError:
        return skipped("memory ran out")
    except RequestError as error:
        return CheckRecord(status="unverified", reason=_without(path, error))


def _lack(artifact: Artifact) -> str | None:
    """Returns a sentence if memory is short; None where there is enough or the system hides it."""
    engine = engine_of(artifact.manifest.kind)
    engine.require()
    references = _reference_bytes(artifact.manifest.config)
    needed = max(references, engine.memory_bytes(artifact.manifest)) + _REST_BYTES
    available = available_bytes()
    if available is None or needed <= available:
        return None
    return f"it takes about {amount(needed)} of memory, and {amount(available)} are free"


def _reference_bytes(config: GriffinConfig) -> int:
    """Two references, each with the weights of a layer, and of the next, in float32.

    Measured: 0.9 GB each at 2B, where ONNX Runtime takes 1.9 GB in int4.
    """
    layers = (layer_tensors(config, index).values() for index in range(config.num_layers))
    return 4 * max((sum(4 * prod(spec.shape) for spec in layer) for layer in layers), default=0)


def _open(artifact: Artifact, checkpoint: Checkpoint) -> _Opened:
    schedule = expected_of(artifact.manifest.kind).schedule(artifact.manifest)
    return _Opened(
        artifact,
        checkpoint,
        schedule,
        first_tokens(artifact, schedule.tokens),
        (
            NumpyReference(artifact.manifest.config, artifact.weights),
            NumpyReference(checkpoint.config, checkpoint.weights),
        ),
    )


def _run(opened: _Opened) -> _Ran:
    tokens, schedule = opened.tokens, opened.schedule
    recorder = MixtureRecorder(opened.checkpoint.config, len(tokens))
    opened.references[1].look = recorder.look
    dequantized, original = _references(opened.references, tokens, schedule.positions)
    artifact, engine = _candidate(opened.artifact, tokens, schedule)
    return _Ran(dequantized, original, artifact, engine, recorder.mixtures)


def _compare(opened: _Opened, ran: _Ran) -> _Compared:
    next_tokens = np.append(opened.tokens[1:], -1)[-len(ran.artifact) :]
    manifest = opened.artifact.manifest
    return _Compared(
        metrics.compare_logits(ran.dequantized, ran.artifact, next_tokens),
        metrics.compare_logits(ran.original, ran.artifact, next_tokens),
        weight_errors(
            opened.checkpoint.weights,
            opened.artifact.weights,
            manifest.tensors,
            weighted=manifest.weighted,
            inputs=ran.inputs,
        ),
    )


def _judge(opened: _Opened, engine: str, compared: _Compared) -> CheckRecord:
    wrong = _first(_complaints(opened.artifact.manifest, compared))
    kl = metrics.kl_summary(compared.original)
    return CheckRecord(
        status="unverified" if wrong else "verified",
        reason=wrong,
        tokens=opened.schedule.tokens,
        positions=opened.schedule.positions,
        kl=_number(kl.mean),
        kl_standard_error=_number(kl.standard_error),
        relative_max=_number(metrics.logit_error(compared.dequantized).relative_max),
        engine=engine,
    )


def _references(
    models: Sequence[NumpyReference], tokens: np.ndarray, rows: int
) -> list[np.ndarray]:
    """The logits of the last `rows` tokens, float32 [rows, vocab], of each model.

    They run side by side: what takes time is to read and dequantize weights, on one thread each.
    """
    ended = threading.Event()
    layers = sum(model.config.num_layers for model in models)
    with task("Self-check", layers, "layers") as advance, ThreadPoolExecutor() as pool:

        def logits(model: NumpyReference) -> np.ndarray:
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


_NAMED = 3
"""Complaints that are told one by one."""
_WORDS = {
    "twin.logits": "the largest difference from the dequantized reference, of the largest logit,",
    "twin.rms": "the difference from the dequantized reference (RMS, of the logits' spread)",
    "original.rms": "the difference from the original (rms, of the logits' spread)",
}


def _complaints(manifest: Manifest, compared: _Compared) -> Iterator[str]:
    """What is beyond its limit, by the thresholds of `validate`."""
    limit, error = thresholds.tolerance(manifest), metrics.logit_error(compared.dequantized)
    logits = (
        Check(name="twin.logits", value=error.relative_max, limit=limit.logits, reason=""),
        Check(name="twin.rms", value=error.relative_rms, limit=limit.rms, reason=""),
        thresholds.original_rms(manifest, metrics.logit_error(compared.original)),
    )
    for check in (*logits, *weight_checks(compared.weights)):
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
