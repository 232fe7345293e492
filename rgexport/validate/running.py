"""Runs what was opened: the references, one layer at a time, and then the artifact's session."""

from dataclasses import dataclass, replace

from rgexport.export.manifest import Manifest
from rgexport.griffin.layout import float32_bytes
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.progress import group, note, task
from rgexport.runtimes.engine import engine_of, open_session
from rgexport.runtimes.memory import available_bytes, give_back
from rgexport.runtimes.session import SessionInfo
from rgexport.units import amount
from rgexport.validate import thresholds
from rgexport.validate.continuations import (
    SMALL_BYTES,
    Continuation,
    Prompt,
    continuations,
    prompts_of_file,
    prompts_of_model,
)
from rgexport.validate.measure import Measurement, measure
from rgexport.validate.opening import Opened
from rgexport.validate.portable import longest_call, portable
from rgexport.validate.positions import token_text
from rgexport.validate.reference.against import AgainstFile, compare_with_file
from rgexport.validate.reference_pass import Pass, SharedPasses, run_reference
from rgexport.validate.rounding_cost import RoundingCost, rounding_cost
from rgexport.validate.weights.input_mixtures import Mixtures


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What was measured while the artifact's session was open.

    Attributes:
        info: what ran the artifact.
        measured: over the text.
        against_file: the comparison with the reference file.
        cost: of the weights, where there is an original or a reference file.
        inputs: mixtures of what the original's linears took, where there is an original.
        continuations: of the reference file's prompts, or of those that a small original continued.
    """

    info: SessionInfo
    measured: Measurement
    against_file: AgainstFile | None = None
    cost: RoundingCost | None = None
    inputs: Mixtures | None = None
    continuations: list[Continuation] | None = None


def run_all(opened: Opened, passes: SharedPasses) -> Ran:
    """Runs the references and the artifact over the text; the session is gone afterwards.

    `passes` has those of originals that ran before, for other artifacts.

    Raises:
        RequestError: the engine is missing or cannot open the artifact.
    """
    references = _run_references(opened, passes)
    prompts = _prompts(opened)
    ran = _run_artifact(opened, references, prompts)
    dequantized, original = references[0], references[1] if len(references) > 1 else None
    if runs_natively(opened):
        ran = replace(ran, measured=_with_portable(opened, ran.measured, dequantized))
    if original is not None:
        ran = replace(ran, inputs=original.inputs)
    elif opened.request.reference is None:
        return ran
    tokens = opened.text.tokens
    return replace(ran, cost=rounding_cost(opened.artifact, dequantized, original, tokens))


def _run_references(opened: Opened, passes: SharedPasses) -> list[Pass]:
    """The dequantized reference and, if there is one, the original."""
    tokens, weights, config = opened.text.tokens, opened.artifact.weights, opened.manifest.config
    references = [run_reference("Running the dequantized reference", config, weights, tokens)]
    if opened.original is not None:
        references.append(passes.run_reference(opened.original.checkpoint, tokens))
    return references


def asks_original(opened: Opened) -> bool:
    """Whether the original continues some prompts: a small one, where no reference file did."""
    if opened.tokenizer is None or opened.original is None or opened.request.reference is not None:
        return False
    return float32_bytes(opened.original.checkpoint.config) <= SMALL_BYTES


def runs_natively(opened: Opened) -> bool:
    """Whether native kernels replace what the artifact brings for other runtimes."""
    return engine_of(opened.manifest.kind).has_native(opened.artifact)


def _with_portable(opened: Opened, measured: Measurement, reference: Pass) -> Measurement:
    """Adds what the artifact gives without native kernels, in a session of its own."""
    give_back()
    needed, available = _portable_bytes(opened.manifest), available_bytes()
    if available is not None and needed > available:
        note(
            f"the bodies that other runtimes run were not run: it takes about {amount(needed)} of "
            f"memory, and {amount(available)} are free"
        )
        return measured
    with task("Without native kernels", 1, "text") as advance:
        session = engine_of(opened.manifest.kind).portable_session(opened.artifact)
        same = portable(session, opened.text.tokens, reference, measured.ending)
        session.close()
        advance(1)
    return replace(measured, equivalences=measured.equivalences | {"portable": same})


def _portable_bytes(manifest: Manifest) -> int:
    """Bytes of a session without native kernels: twice those of one with them.

    Measured: 3.9 GB for a 2B in int4.
    """
    return 2 * engine_of(manifest.kind).memory_bytes(manifest)


def _prompts(opened: Opened) -> list[Prompt] | None:
    """Prompts with the reference's continuations; None where nobody continued any."""
    if opened.tokenizer is None:
        return None
    if opened.request.reference is not None:
        return prompts_of_file(opened.request.reference)
    if opened.original is None:
        return None
    checkpoint = opened.original.checkpoint
    if not asks_original(opened):
        note(
            f"answers are not compared: the original's weights take "
            f"{amount(float32_bytes(checkpoint.config))} in float32. `rgexport reference` makes a "
            "file that has its answers, for --reference"
        )
        return None
    model = NumpyReference(checkpoint.config, checkpoint.weights, keep=True)
    return prompts_of_model(model, opened.tokenizer)


def _run_artifact(opened: Opened, references: list[Pass], prompts: list[Prompt] | None) -> Ran:
    give_back()
    session = open_session(opened.artifact)
    spell = token_text(opened.tokenizer) if opened.tokenizer else None
    measured = measure(
        session,
        opened.text.tokens,
        references,
        text_bytes=opened.text.bytes,
        noise=thresholds.tolerance(opened.manifest).rms,
        spell=spell,
        longest=longest_call(opened.manifest.config),
    )
    ran = Ran(info=session.info, measured=measured)
    if (file := opened.request.reference) is not None:
        with group("Comparing with the reference file"):
            ran = replace(ran, against_file=compare_with_file(session, opened.artifact, file))
    if spell is None or prompts is None:
        return ran
    return replace(ran, continuations=list(continuations(session, prompts, spell)))
