"""Commands that write text with an artifact, and those on state files."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rgexport import progress
from rgexport.commands.options import (
    CONTEXT,
    ArtifactArguments,
    LookupArguments,
    NativeArguments,
    StatePrecisionArguments,
    ThreadsArguments,
    argument,
    command,
    group,
    help_if_alone,
    option,
    shared,
)
from rgexport.commands.standard_input import piped_text, read_file_or_stdin
from rgexport.errors import RequestError
from rgexport.printing import print_outcome, print_result, print_sentences

if TYPE_CHECKING:
    from rgexport.chat.model import Model
    from rgexport.chat.reply import ReplyOptions
    from rgexport.chat.sampling import Sampling


_off = partial(option, show_default=False)  # by default, such an option changes nothing


@dataclass(frozen=True)
class DraftArguments(LookupArguments):
    draft_text: Path | None = option("A file that replies quote from; quotes come sooner.")

    def text(self) -> str:
        from rgexport.files.paths import read_text

        if self.draft_text and not self.lookup:
            message = "--draft-text changes nothing with --no-lookup; leave out one of them"
            raise RequestError(message)
        return read_text(self.draft_text) if self.draft_text else ""


@dataclass(frozen=True)
class SamplingArguments(ThreadsArguments):
    max_new_tokens: int = option("Maximum number of tokens of a reply.", "-n", least=1, default=256)
    temperature: float = option(
        "Randomness; 0 takes the most likely token.", "--temperature", "--temp", default=0.0
    )
    top_k: int = _off("Sample from the k most likely tokens.", default=0)
    top_p: float = _off("Sample from the most likely tokens that sum to p.", default=1.0)
    min_p: float = _off("Drop tokens less likely than p times the most likely one.", default=0.0)
    repetition_penalty: float = _off("Makes tokens repeat less, if above 1.", default=1.0)
    presence_penalty: float = _off("Makes tokens of the reply occur less, if above 0.", default=0.0)
    frequency_penalty: float = _off(
        "Makes frequent tokens of the reply rarer, if above 0.", default=0.0
    )
    seed: int | None = option("Seed of the sampling, which makes replies repeatable.")

    def sampling(self) -> "Sampling":
        from rgexport.chat.sampling import Sampling

        sampling = Sampling(**shared(self, Sampling))
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise RequestError(
                "top_k, top_p and min_p change nothing at temperature 0, which takes the most "
                "likely token; pass a temperature too, such as --temperature 0.7"
            )
        return sampling


@dataclass(frozen=True)
class StateArguments(StatePrecisionArguments):
    load_state: Path | None = option("Continue from a state file.")
    save_state: Path | None = option("Write a state file at the end.")


@dataclass(frozen=True)
class ReplyArguments:
    draft: DraftArguments = group()
    sampling: SamplingArguments = group()
    state: StateArguments = group()
    engine: NativeArguments = group()

    def options(self, stop: tuple[str, ...]) -> "ReplyOptions":
        from rgexport.chat.reply import ReplyOptions
        from rgexport.chat.state_file import require_replaceable

        sampling = self.sampling.sampling()
        if self.state.save_state:
            require_replaceable(self.state.save_state)  # before the reply, and again after it
        most = self.sampling.max_new_tokens
        return ReplyOptions(sampling=sampling, max_new_tokens=most, stop=stop)

    def open_model(self, artifact: str, *, chat: bool) -> "Model":
        from rgexport.chat.from_artifact import open_model

        return open_model(
            artifact,
            chat=chat,
            allow_foreign=self.engine.allow_foreign,
            threads=self.sampling.threads,
            state_precision=self.state.state_precision,
            lookup=self.draft.lookup,
        )


@dataclass(frozen=True)
class GenerateArguments(ArtifactArguments):
    prompt: str | None = option("The text to continue; a pipe's text goes before it.", "-p")
    prompt_file: Path | None = option("The text to continue, from a file; - is the standard input.")
    ids: str | None = option("Token ids to continue, such as 2,651,603; prints ids.")
    as_json: bool = option("Print the continuation and its figures as JSON.", "--json")
    stop: tuple[str, ...] = option("A text that ends the continuation. Can be repeated.")
    reply: ReplyArguments = group()


@command(GenerateArguments)
def generate(arguments: GenerateArguments) -> None:
    """Continues a prompt, or a saved state."""
    from rgexport.chat.from_artifact import continue_ids, continued_ids, summary
    from rgexport.chat.terminal import print_pieces

    reply, state = arguments.reply, arguments.reply.state
    options = reply.options(arguments.stop)
    prompt = _prompt(arguments)
    if arguments.ids is not None:
        if state.load_state or state.save_state or reply.draft.draft_text:
            raise RequestError("--ids goes without --load-state, --save-state and --draft-text")
        threads, is_foreign = reply.sampling.threads, reply.engine.allow_foreign
        tokens = continue_ids(arguments.artifact, arguments.ids, options, threads, is_foreign)
        if arguments.as_json:
            print_result(json.dumps({"ids": [*tokens]}))
        else:
            print_pieces((f"{token} " for token in tokens), sys.stdout)
        return
    if prompt is None and state.load_state is None:
        raise RequestError(
            "generate takes a pipe, --prompt, --prompt-file, --ids or --load-state; none was given"
        )
    draft = reply.draft.text()
    with reply.open_model(arguments.artifact, chat=False) as model:
        ids = continued_ids(model, prompt or "", state.load_state)
        stream = model.continue_ids(ids, dataclasses.replace(options, draft=model.draft_of(draft)))
        if arguments.as_json:
            print_result(json.dumps(dataclasses.asdict(stream.reply()), ensure_ascii=False))
        else:
            print_pieces(stream, sys.stdout)
        progress.note(summary(stream.reply()))
        if state.save_state:
            model.save_state(state.save_state, [*ids, *stream.reply().ids])


def _prompt(arguments: GenerateArguments) -> str | None:
    file = arguments.prompt_file
    values = {"--prompt": arguments.prompt, "--prompt-file": file, "--ids": arguments.ids}
    if len(names := [name for name, value in values.items() if value is not None]) > 1:
        raise RequestError(f"generate takes one of {' and '.join(names)}; both were given")
    if file is not None:
        return read_file_or_stdin(file)
    text = "" if arguments.ids is not None else piped_text("--prompt-file")
    return "\n\n".join(filter(None, (text, arguments.prompt))) if text else arguments.prompt


@dataclass(frozen=True)
class ChatArguments(ArtifactArguments):
    prompt: str | None = option("Send this message, after a pipe's text; print the reply.", "-p")
    system: str = option("The system prompt.", default="", show_default=False)
    document: Path | None = option(
        "A file whose text the first message is about; - is the standard input, with -p.", "--read"
    )
    as_json: bool = option("Print the reply and its figures as JSON; with -p.", "--json")
    plain: bool = option("Show replies as they are, without styles, in a terminal.")
    no_history: bool = option("Keep no file of the messages that you type.")
    stop: tuple[str, ...] = option("A text that ends a reply. Can be repeated.")
    reply: ReplyArguments = group()


@command(ChatArguments)
def chat(arguments: ChatArguments) -> None:
    """Chats with an instruction-tuned model.

    In a terminal, /help lists commands. Over a pipe, each line is a message.
    """
    from rgexport.chat.conversation import Conversation
    from rgexport.chat.terminal import load_state, one_message, pipe_chat, terminal_chat

    reply, state, prompt = arguments.reply, arguments.reply.state, arguments.prompt
    options, draft = reply.options(arguments.stop), reply.draft.text()
    if state.load_state and arguments.system:
        raise RequestError(
            "--load-state goes without --system: another system prompt would change how the "
            "conversation begins, and all of it would be read again"
        )
    if prompt is not None and not prompt.strip():
        raise RequestError("-p is empty; give a message")
    if prompt is None and (arguments.as_json or str(arguments.document) == "-"):
        raise RequestError("--json and --read - are for one message; give it with -p")
    if arguments.document:
        document = read_file_or_stdin(arguments.document)
    else:
        document = "" if prompt is None else piped_text("--read")
    with reply.open_model(arguments.artifact, chat=True) as model:
        options = dataclasses.replace(options, draft=model.draft_of(draft))
        conversation = Conversation(model, options)
        conversation.styled = not arguments.plain
        conversation.set_system(arguments.system)
        if state.load_state:
            known = load_state(conversation, state.load_state)
            if prompt is None and not document:
                progress.note(known)
        if document:
            conversation.read(document)
        if prompt is not None:
            one_message(conversation, prompt, sys.stdout, as_json=arguments.as_json)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            terminal_chat(conversation, keeps_history=not arguments.no_history)
        else:
            pipe_chat(conversation, sys.stdin, sys.stdout)
        if state.save_state:
            conversation.save(state.save_state)


@click.group(invoke_without_command=True, context_settings=CONTEXT)
@click.pass_context
def state(context: click.Context) -> None:
    """Saves the state of a model after a text, to go on with later, or elsewhere."""
    help_if_alone(context)


@dataclass(frozen=True)
class SaveArguments(ArtifactArguments):
    text: Path = option(
        "The text to read, from a file; - is the standard input.", "--read", required=True
    )
    plain: bool = option("A text for `generate`, not a document for `chat`.")
    no_text: bool = option("Store only a hash of the text, which must be supplied again later.")
    precision: StatePrecisionArguments = group()
    output: Path = option("The state file.", "-o", required=True)
    threads: ThreadsArguments = group()
    force: bool = option("Replace an existing file.")
    as_json: bool = option("Print the path, size and number of tokens as JSON.", "--json")
    engine: NativeArguments = group()


@command(SaveArguments, parent=state)
def save(arguments: SaveArguments) -> None:
    """Reads a text once, and saves the state."""
    from rgexport.chat.from_artifact import open_model
    from rgexport.chat.state_file import is_state_file
    from rgexport.files.targets import check_file_target
    from rgexport.units import amount

    output, plain = arguments.output, arguments.plain
    check_file_target(output, force=arguments.force, replaceable=is_state_file)
    text = read_file_or_stdin(arguments.text)
    if not text.strip():
        raise RequestError(f"{arguments.text} is empty; there is nothing to read")
    with open_model(
        arguments.artifact,
        chat=not plain,
        allow_foreign=arguments.engine.allow_foreign,
        threads=arguments.threads.threads,
        state_precision=arguments.precision.state_precision,
    ) as model:
        messages = None if plain else [{"role": "user", "content": text}]
        ids = model.text_ids(text) if messages is None else model.opening_ids(messages)
        saved = model.save_state(output, ids, messages, with_text=not arguments.no_text)
    size = amount(output.stat().st_size)
    step = _next_step(arguments.artifact, output, plain=plain, has_text=not arguments.no_text)
    sentence = f"{output} has {saved.count} tokens in {size}. {step}"
    print_outcome(sentence, output, as_json=arguments.as_json, tokens=saved.count)


@dataclass(frozen=True)
class LoadArguments:
    artifact: Path = argument()
    file: Path = argument()
    as_json: bool = option("Print the path, size and number of tokens as JSON.", "--json")


@command(LoadArguments, parent=state)
def load(arguments: LoadArguments) -> None:
    """Checks that ARTIFACT can go on with a state file."""
    from rgexport.artifacts.manifest import identity_of
    from rgexport.artifacts.opening import open_artifact
    from rgexport.chat.artifact_text import open_template
    from rgexport.chat.state_file import read_state, require_same_model
    from rgexport.griffin.state import state_specs

    artifact, file = open_artifact(arguments.artifact), arguments.file
    shapes = {spec.name: spec.shape for spec in state_specs(artifact.manifest.config)}
    saved = read_state(file, shapes)
    require_same_model(file, saved, identity_of(artifact.manifest, open_template(artifact).source))
    has_text = saved.tokens is not None
    step = _next_step(arguments.artifact, file, plain=saved.messages is None, has_text=has_text)
    sentence = f"{file} fits: {saved.count} tokens. {step}"
    print_outcome(sentence, file, as_json=arguments.as_json, tokens=saved.count)


@dataclass(frozen=True)
class InfoArguments:
    file: Path = argument()
    as_json: bool = option("Print one JSON object.", "--json")


@command(InfoArguments, parent=state)
def info(arguments: InfoArguments) -> None:
    """Shows which model and text a state file belongs to, and checks that it is whole."""
    from rgexport.chat.state_file import read_state_header, require_intact
    from rgexport.files.typed_json import to_json

    fields: dict[str, Any] = to_json(read_state_header(arguments.file))
    require_intact(arguments.file)
    if arguments.as_json:
        print_result(json.dumps(fields, ensure_ascii=False))
        return
    for name, value in {
        "model": f"{fields['identity']['name']} (window {fields['identity']['window']})",
        "text": f"{_text_kind(fields)}, {fields['tokens']} tokens",
        "made by": ", ".join(filter(None, (fields["engine"], fields["tool"]))),
    }.items():
        print_sentences(f"{name:<9} {value}")


def _next_step(artifact: Path | str, file: Path, *, plain: bool, has_text: bool) -> str:
    if not has_text:
        return (
            "Go on with the text that it was made from: "
            f"rgexport chat {artifact} --load-state {file} --read TEXT, or, if it was saved with "
            f"--plain, rgexport generate {artifact} --load-state {file} --prompt-file TEXT"
        )
    verb = f"generate {artifact} -p TEXT" if plain else f"chat {artifact}"
    return f"Go on: rgexport {verb} --load-state {file}"


def _text_kind(fields: dict[str, Any]) -> str:
    messages = fields["messages"]
    if not fields["has_text"]:
        return "not stored, only its hash"
    if messages is None:
        return "a plain text"
    if len(messages) % 2 and messages[-1]["role"] == "user":
        return "a text to be asked about"
    return f"a conversation of {len(messages)} messages"
