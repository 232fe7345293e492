"""Runs what was opened: the references, one layer at a time, and then the artifact's session."""

from dataclasses import dataclass, replace

from rgexport.griffin.state import State
from rgexport.progress import group, note
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.memory import give_back
from rgexport.runtimes.session import SessionInfo
from rgexport.validate import thresholds
from rgexport.validate.continuations import Continuation, continuations
from rgexport.validate.measure import Measurement, measure, with_continuations
from rgexport.validate.opening import Opened
from rgexport.validate.positions import token_text
from rgexport.validate.reference.against import AgainstFile, compare_with_file
from rgexport.validate.reference_pass import Pass, SharedPasses, run_reference


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What was measured while the artifact's session was open.

    `against_file` is the comparison with the reference file, and `continuations` are its prompts as
    both went on with them; `before` has the session's states
    before some of the file's positions, for a look at each layer.
    """

    info: SessionInfo
    measured: Measurement
    against_file: AgainstFile | None
    continuations: list[Continuation] | None
    before: dict[int, State]


def run_all(opened: Opened, passes: SharedPasses) -> Ran:
    """Runs the references and the artifact over the text; the session is gone afterwards.

    `passes` has those of originals that ran before, for other artifacts.

    Raises:
        RequestError: the engine is missing or cannot open the artifact.
    """
    references = _run_references(opened, passes)
    ran = _run_artifact(opened, references)
    return replace(ran, measured=with_continuations(ran.measured, references))


def _run_references(opened: Opened, passes: SharedPasses) -> list[Pass]:
    """The passes of the twin and, if there is one, of the original; none without torch."""
    make, tokens = opened.make, opened.text.tokens
    if make is None:
        note(
            "torch is not installed, so the dequantized reference is left out: "
            "pip install 'rgexport[export]'"
        )
        return []
    weights = opened.artifact.weights
    twin = run_reference(
        "Running the dequantized reference", make, opened.manifest.config, weights, tokens
    )
    if opened.original is None:
        return [twin]
    return [twin, passes.run_reference(make, opened.original.checkpoint, tokens)]


def _run_artifact(opened: Opened, references: list[Pass]) -> Ran:
    give_back()
    session, before = open_session(opened.artifact), dict[int, State]()
    spell = token_text(opened.tokenizer) if opened.tokenizer else None
    measured = measure(
        session,
        opened.text.tokens,
        references,
        text_bytes=opened.text.bytes,
        noise=thresholds.tolerance(opened.manifest).rms,
        spell=spell,
    )
    against_file, written = None, None
    if (reference := opened.request.reference) is not None:
        kept = before if opened.request.bisect else None
        with group("Comparing with the reference file"):
            against_file = compare_with_file(session, opened.artifact, reference, kept)
        if spell is not None:
            written = list(continuations(session, reference, spell))
    return Ran(
        info=session.info,
        measured=measured,
        against_file=against_file,
        continuations=written,
        before=before,
    )
