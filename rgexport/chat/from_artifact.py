"""Text from an artifact: what `rgexport generate` and `rgexport chat` run."""

from collections.abc import Iterator
from pathlib import Path

from rgexport.chat.artifact_text import open_template, open_tokenizer
from rgexport.chat.conversation import Conversation
from rgexport.chat.generation import GenerationStats, generate, prompt_ids
from rgexport.chat.sampling import Sampler
from rgexport.chat.tokenizer import StreamDecoder, Tokenizer
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.opening import open_artifact
from rgexport.progress import amount, detail, warn
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.session import Session


def continue_prompt(
    path: Path,
    *,
    prompt: str | None,
    ids: str | None,
    sampler: Sampler,
    max_new_tokens: int,
    threads: int | None = None,
) -> tuple[Iterator[str], GenerationStats]:
    """Opens an artifact and continues a text, or ids such as `2,651,603`.

    Returns:
        The pieces of the continuation, and figures that are complete after the last piece. After
        ids, the pieces are ids too, and no token ends the continuation early.

    Raises:
        RequestError: no sound artifact, no tokenizer where it takes one, or not exactly one of
            `prompt` and `ids`.
    """
    if (prompt is None) == (ids is None):
        found = "neither" if prompt is None else "both"
        raise RequestError(f"generate takes either --prompt or --ids; {found} was given")
    artifact, stats = _open(path), GenerationStats()
    tokenizer = None if prompt is None else open_tokenizer(artifact)
    if tokenizer is None:
        start, stop_ids = _parse_ids(str(ids)), frozenset[int]()
    else:
        start, stop_ids = prompt_ids(tokenizer, str(prompt)), tokenizer.stop_ids
    session = _open_session(artifact, threads)
    tokens = generate(session, start, sampler, max_new_tokens, stop_ids, stats)
    return (_decoded(tokens, tokenizer) if tokenizer else (f"{t} " for t in tokens)), stats


def open_conversation(
    path: Path, *, sampler: Sampler, max_new_tokens: int, threads: int | None = None
) -> Conversation:
    """Opens an artifact for a chat; warns where the model was not tuned for one.

    Raises:
        RequestError: no sound artifact, or a tokenizer that is missing or has no turn tokens.
    """
    artifact = _open(path)
    tokenizer, template = open_tokenizer(artifact), open_template(artifact)
    if artifact.manifest.instruction_tuned is False:
        warn(f"{artifact.manifest.name} is a base model: it continues text, but answers poorly")
    session = _open_session(artifact, threads)
    return Conversation(session, tokenizer, template, sampler, max_new_tokens)


def summary(stats: GenerationStats) -> str:
    """The speed of a generation, in one line."""
    return (
        f"{stats.prompt_tokens} prompt tokens at {stats.prefill_rate:.1f}/s, "
        f"{stats.new_tokens} new tokens at {stats.decode_rate:.1f}/s"
    )


def _open(path: Path) -> Artifact:
    """Opens an artifact; warns if the self-check of its export failed."""
    artifact = open_artifact(path)
    if (found := artifact.manifest.check).status == "unverified":
        warn(f"what {path} says may be wrong. {found.sentence}")
    return artifact


def _open_session(artifact: Artifact, threads: int | None) -> Session:
    session = open_session(artifact, threads=threads)
    info = session.info
    detail(
        f"{info.title}, {info.threads} threads; one step reads "
        f"{amount(info.weight_bytes)} of weights and {amount(info.state_bytes)} of state"
    )
    return session


def _decoded(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer)
    for token in tokens:
        yield decoder.add(token)
    yield decoder.finish()


def _parse_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise RequestError(f"--ids is {text!r}; expected token ids such as 2,651,603")
    return [int(word) for word in words]
