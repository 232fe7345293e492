"""Commands that run artifacts."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from rgexport import progress
from rgexport.commands.options import (
    FOLDER,
    draft_options,
    foreign_option,
    native_option,
    sampling_options,
    state_options,
    verbose,
)
from rgexport.errors import RequestError
from rgexport.printing import print_reply, print_result

FORMS = "table", "md", "json", "csv"


@click.command()
@click.argument("artifact", type=FOLDER)
@click.option("-p", "--prompt", help="The text to continue.")
@click.option("--prompt-file", type=FOLDER, help="The same, from a file; - is the input.")
@click.option("--ids", help="Instead of a text: token ids, such as 2,651,603; prints ids.")
@click.option("--stop", multiple=True, help="A text that ends the continuation; repeatable.")
@draft_options
@sampling_options
@state_options
@foreign_option
@verbose
def generate(
    artifact: Path,
    prompt: str | None,
    prompt_file: Path | None,
    ids: str | None,
    stop: tuple[str, ...],
    draft_text: Path | None,
    lookup: bool,
    max_new_tokens: int,
    threads: int | None,
    load_state: Path | None,
    save_state: Path | None,
    state_precision: str | None,
    allow_foreign: bool,
    **sampling: Any,
) -> None:
    """Continues a prompt, or a saved state."""
    from rgexport.chat.continuation import Continuation
    from rgexport.chat.from_artifact import continue_ids, open_model, summary
    from rgexport.chat.reply import ReplyOptions
    from rgexport.chat.state_file import require_replaceable

    chosen = _sampling(sampling)
    if save_state:
        require_replaceable(save_state)  # before the work, and again after it
    given = {"--prompt": prompt, "--prompt-file": prompt_file, "--ids": ids}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise RequestError(f"generate takes one of {' and '.join(names)}; both were given")
    if prompt_file is not None:
        prompt = _text_of(prompt_file)
    if ids is not None:
        if load_state or save_state or draft_text:
            raise RequestError("--ids goes without --load-state, --save-state and --draft-text")
        for token in continue_ids(
            artifact, ids, chosen, max_new_tokens, threads, allow_foreign=allow_foreign
        ):
            print_result(f"{token} ", end="")
        print_result("")
        return
    if prompt is None and load_state is None:
        raise RequestError(
            "generate takes one of --prompt, --prompt-file, --ids and --load-state; none was given"
        )
    draft = _draft(draft_text, lookup)
    engine: dict[str, Any] = {
        "threads": threads,
        "state_precision": state_precision,
        "lookup": lookup,
        "allow_foreign": allow_foreign,
    }
    with open_model(artifact, chat=False, **engine) as model:
        text = Continuation(model, prompt or "", load_state)
        options = ReplyOptions(
            sampling=chosen,
            max_new_tokens=max_new_tokens,
            stop=stop,
            draft=model.draft_of(draft),
        )
        for piece in text.run(options):
            print_reply(piece)
        print_result("")
        progress.note(summary(text.reply))
        if save_state:
            text.save(save_state)


@click.command()
@click.argument("artifact", type=FOLDER)
@click.option("-p", "--prompt", help="Say this, print the reply, and end.")
@click.option("--system", default="", help="The system prompt.")
@click.option("--read", "document", type=FOLDER, help="A text that the first message is about.")
@click.option("--json", "as_json", is_flag=True, help="With -p: the reply and its figures as JSON.")
@click.option("--stop", multiple=True, help="A text that ends a reply; repeatable.")
@draft_options
@sampling_options
@state_options
@foreign_option
@verbose
def chat(
    artifact: Path,
    prompt: str | None,
    system: str,
    document: Path | None,
    as_json: bool,
    stop: tuple[str, ...],
    draft_text: Path | None,
    lookup: bool,
    max_new_tokens: int,
    threads: int | None,
    load_state: Path | None,
    save_state: Path | None,
    state_precision: str | None,
    allow_foreign: bool,
    **sampling: Any,
) -> None:
    """Chats with an instruction-tuned model.

    In a terminal, /help lists commands. Over a pipe, each line is a message.
    """
    from rgexport.chat.conversation import Conversation
    from rgexport.chat.from_artifact import open_model
    from rgexport.chat.reply import ReplyOptions
    from rgexport.chat.state_file import require_replaceable
    from rgexport.chat.terminal import one_message, pipe_chat, terminal_chat
    from rgexport.files.paths import read_text

    options = ReplyOptions(sampling=_sampling(sampling), max_new_tokens=max_new_tokens, stop=stop)
    draft = _draft(draft_text, lookup)
    if save_state:
        require_replaceable(save_state)
    if load_state and system:
        raise RequestError(
            "--load-state goes without --system: another system prompt would change how the "
            "conversation begins, and all of it would be read again"
        )
    if prompt is not None and not prompt.strip():
        raise RequestError("-p is empty; give a message")
    if as_json and prompt is None:
        raise RequestError("--json is for one message; give it with -p")
    engine: dict[str, Any] = {
        "threads": threads,
        "state_precision": state_precision,
        "lookup": lookup,
        "allow_foreign": allow_foreign,
    }
    with open_model(artifact, chat=True, **engine) as model:
        options = dataclasses.replace(options, draft=model.draft_of(draft))
        conversation = Conversation(model, options)
        if load_state:
            conversation.load(load_state)
        elif system:
            conversation.set_system(system)
        if document:
            conversation.read(read_text(document))
        if prompt is not None:
            one_message(conversation, prompt, sys.stdout, as_json=as_json)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            terminal_chat(conversation)
        else:
            pipe_chat(conversation, sys.stdin, sys.stdout)
        if save_state:
            conversation.save(save_state)


def _draft(file: Path | None, lookup: bool) -> str:
    """The text that replies may repeat, "" for none."""
    from rgexport.files.paths import read_text

    if file and not lookup:
        raise RequestError("--draft-text changes nothing with --no-lookup; leave out one of them")
    return read_text(file) if file else ""


def _text_of(file: Path) -> str:
    """The text of a file, or of the standard input."""
    from rgexport.files.paths import read_text

    if str(file) != "-":
        return read_text(file)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"the input is not UTF-8 text: {error}") from None


def _sampling(options: dict[str, Any]) -> Any:
    """The options of sampling."""
    from rgexport.chat.sampling import Sampling

    found = Sampling(**options)
    if found.temperature == 0 and (found.top_k or found.top_p < 1 or found.min_p):
        raise RequestError(
            "top_k, top_p and min_p change nothing at temperature 0, which takes the most likely "
            "token; pass a temperature too, such as --temperature 0.7"
        )
    return found


@click.command()
@click.argument("artifact", type=FOLDER)
@click.option("-p", "--n-prompt", default="512", show_default=True, help="Lengths of prompts.")
@click.option(
    "-n", "--n-gen", default="128", show_default=True, help="Numbers of tokens to generate."
)
@click.option(
    "-d",
    "--n-depth",
    default="0",
    show_default=True,
    help="Tokens processed before the measurement.",
)
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--synthetic",
    is_flag=True,
    help="Fill the state with random values instead: quick, same cost per token.",
)
@click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, 256),
    help="[default and most: one per usable processor]",
)
@click.option(
    "-o", "--output", "form", type=click.Choice(FORMS), default="table", show_default=True
)
@foreign_option
@native_option
@verbose
def bench(
    artifact: Path,
    n_prompt: str,
    n_gen: str,
    n_depth: str,
    threads: int | None,
    form: str,
    allow_foreign: bool,
    **options: Any,
) -> None:
    """Measures tokens per second, beside how fast the machine reads memory.

    -p, -n and -d take lists such as 128,512; a length of 0 is left out.
    """
    from rgexport.runtimes.bench.measure import BenchRequest, bench_artifact
    from rgexport.runtimes.bench.rows import WRITERS

    request = BenchRequest.parse(n_prompt, n_gen, n_depth, **options)
    rows = bench_artifact(artifact, request, threads=threads, allow_foreign=allow_foreign)
    print_result(WRITERS[form](rows), end="")
