"""Runs what was opened: the references, one layer at a time, and then the artifact's session."""

from dataclasses import dataclass

from rgexport.griffin.state import State
from rgexport.progress import group, note
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.memory import give_back
from rgexport.runtimes.session import SessionInfo
from rgexport.validate import thresholds
from rgexport.validate.measure import Measurement, measure, with_continuations
from rgexport.validate.opening import Opened
from rgexport.validate.positions import speller
from rgexport.validate.reference.against import AgainstFile, compare_with_file
from rgexport.validate.teacher import Pass, SharedPasses, teach


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What was measured while the artifact's session was open.

    `against_file` is the comparison with the reference file; `before` has the session's states
    before some of the file's positions, for a look at each layer.
    """

    info: SessionInfo
    measured: Measurement
    against_file: AgainstFile | None
    before: dict[int, State]


def run_all(opened: Opened, passes: SharedPasses) -> Ran:
    """Runs the references and the artifact over the text; the session is gone afterwards.

    `passes` has those of originals that ran before, for other artifacts.

    Raises:
        RequestError: the engine is missing or cannot open the artifact.
    """
    taught = _run_references(opened, passes)
    ran = _run_artifact(opened, taught)
    return Ran(
        info=ran.info,
        measured=with_continuations(ran.measured, taught),
        against_file=ran.against_file,
        before=ran.before,
    )


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
    twin = teach("Running the dequantized reference", make, opened.manifest.config, weights, tokens)
    if opened.original is None:
        return [twin]
    return [twin, passes.teach(make, opened.original.checkpoint, tokens)]


def _run_artifact(opened: Opened, taught: list[Pass]) -> Ran:
    give_back()
    session, before = open_session(opened.artifact), dict[int, State]()
    measured = measure(
        session,
        opened.text.tokens,
        taught,
        text_bytes=opened.text.bytes,
        noise=thresholds.tolerance(opened.manifest).rms,
        spell=speller(opened.tokenizer) if opened.tokenizer else None,
    )
    against_file = None
    if (reference := opened.request.reference) is not None:
        kept = before if opened.request.bisect else None
        with group("Comparing with the reference file"):
            against_file = compare_with_file(session, opened.artifact, reference, kept)
    return Ran(info=session.info, measured=measured, against_file=against_file, before=before)
