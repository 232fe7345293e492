"""Commands on state files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import (
    NativeArguments,
    StatePrecisionArguments,
    ThreadsArguments,
    argument,
    command,
    group,
    help_if_alone,
    option,
)
from rgexport.errors import RequestError
from rgexport.printing import print_result


@click.group(invoke_without_command=True)
@click.pass_context
def state(context: click.Context) -> None:
    """Saves the state of a model after a text, to go on with later, or elsewhere."""
    help_if_alone(context)


@dataclass(frozen=True)
class SaveArguments:
    artifact: Path = argument()
    text: Path = option("The text to read.", "--read", required=True)
    plain: bool = option("A text for `generate`, not a document for `chat`.")
    no_text: bool = option(
        "Store only a hash of the text; whoever goes on must supply the text again."
    )
    precision: StatePrecisionArguments = group()
    output: Path = option("The state file.", "-o", required=True)
    threads: ThreadsArguments = group()
    force: bool = option("Replace an earlier one.")
    engine: NativeArguments = group()


@command(SaveArguments, parent=state)
def save(arguments: SaveArguments) -> None:
    """Reads a text once, and saves the state."""
    from rgexport.chat.from_artifact import open_model
    from rgexport.chat.state_file import is_state_file
    from rgexport.files.paths import read_text
    from rgexport.files.targets import check_file_target
    from rgexport.units import amount

    output, plain = arguments.output, arguments.plain
    check_file_target(output, force=arguments.force, replaceable=is_state_file)
    text = read_text(arguments.text)
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
    print_result(f"{output} has {saved.count} tokens in {size}. {step}")


@dataclass(frozen=True)
class LoadArguments:
    artifact: Path = argument()
    file: Path = argument()


@command(LoadArguments, parent=state)
def load(arguments: LoadArguments) -> None:
    """Checks that ARTIFACT can go on with a state file."""
    from rgexport.chat.artifact_text import open_template
    from rgexport.chat.state_file import read_state, require_same_model
    from rgexport.export.identity import identity_of
    from rgexport.export.opening import open_artifact
    from rgexport.griffin.state import state_specs

    artifact, file = open_artifact(arguments.artifact), arguments.file
    shapes = {spec.name: spec.shape for spec in state_specs(artifact.manifest.config)}
    saved = read_state(file, shapes)
    require_same_model(file, saved, identity_of(artifact.manifest, open_template(artifact).source))
    has_text = saved.tokens is not None
    step = _next_step(arguments.artifact, file, plain=saved.messages is None, has_text=has_text)
    print_result(f"{file} fits: {saved.count} tokens. {step}")


@dataclass(frozen=True)
class InfoArguments:
    file: Path = argument()
    as_json: bool = option("As one JSON object.", "--json")


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
    identity = fields["identity"]
    for name, value in {
        "model": f"{identity['name']} (window {identity['window']})",
        "text": f"{_text_kind(fields)}, {fields['tokens']} tokens",
        "made by": ", ".join(filter(None, (fields["engine"], fields["tool"]))),
    }.items():
        print_result(f"{name:<9} {value}")


def _next_step(artifact: Path, file: Path, *, plain: bool, has_text: bool) -> str:
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
