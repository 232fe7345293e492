"""Commands on state files."""

from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import (
    FOLDER,
    foreign_option,
    help_if_alone,
    native_option,
    state_precision,
    threads_option,
    verbose,
)
from rgexport.errors import RequestError
from rgexport.printing import print_result


@click.group(invoke_without_command=True)
@click.pass_context
def state(context: click.Context) -> None:
    """Saves what a model remembers of a text, to go on with later, or elsewhere."""
    help_if_alone(context)


@state.command()
@click.argument("artifact", type=FOLDER)
@click.option("--read", "text", type=FOLDER, required=True, help="The text to read.")
@click.option("--plain", is_flag=True, help="A text for `generate`, not a document for `chat`.")
@click.option(
    "--no-text",
    is_flag=True,
    help="Store only a hash of the text; whoever goes on must supply the text again.",
)
@state_precision
@click.option("-o", "--output", type=FOLDER, required=True, help="The state file.")
@threads_option
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@foreign_option
@native_option
@verbose
def save(
    artifact: Path,
    text: Path,
    plain: bool,
    no_text: bool,
    state_precision: str | None,
    output: Path,
    threads: int | None,
    force: bool,
    allow_foreign: bool,
) -> None:
    """Reads a text once, and saves the state."""
    from rgexport.chat.from_artifact import open_model
    from rgexport.chat.state_file import is_state_file
    from rgexport.files.paths import read_text
    from rgexport.files.targets import check_file_target
    from rgexport.units import amount

    check_file_target(output, force=force, replaceable=is_state_file)
    written = read_text(text)
    if not written.strip():
        raise RequestError(f"{text} is empty; there is nothing to read")
    engine: dict[str, Any] = {
        "threads": threads,
        "state_precision": state_precision,
        "allow_foreign": allow_foreign,
    }
    with open_model(artifact, chat=not plain, **engine) as model:
        messages = None if plain else [{"role": "user", "content": written}]
        ids = model.text_ids(written) if messages is None else model.opening_ids(messages)
        saved = model.save_state(output, ids, messages, with_text=not no_text)
    told = f"{output} has {saved.count} tokens in {amount(output.stat().st_size)}. "
    print_result(told + _next_step(artifact, output, plain=plain, has_text=not no_text))


@state.command()
@click.argument("artifact", type=FOLDER)
@click.argument("file", type=FOLDER)
@verbose
def load(artifact: Path, file: Path) -> None:
    """Checks that ARTIFACT can go on with a state file."""
    from rgexport.chat.artifact_text import open_template
    from rgexport.chat.state_file import read_state, require_same_model
    from rgexport.export.identity import identity_of
    from rgexport.export.opening import open_artifact
    from rgexport.griffin.state import state_specs

    opened = open_artifact(artifact)
    shapes = {spec.name: spec.shape for spec in state_specs(opened.manifest.config)}
    saved = read_state(file, shapes)
    require_same_model(file, saved, identity_of(opened.manifest, open_template(opened).source))
    step = _next_step(
        artifact, file, plain=saved.messages is None, has_text=saved.tokens is not None
    )
    print_result(f"{file} fits: {saved.count} tokens. {step}")


@state.command()
@click.argument("file", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def info(file: Path, as_json: bool) -> None:
    """Shows which model and text a state file belongs to, and checks that it is whole."""
    import json

    from rgexport.chat.state_file import read_state_header, require_intact
    from rgexport.files.typed_json import to_json

    fields: dict[str, Any] = to_json(read_state_header(file))
    require_intact(file)
    if as_json:
        print_result(json.dumps(fields, ensure_ascii=False))
        return
    for name, value in _lines(fields).items():
        print_result(f"{name:<9} {value}")


def _next_step(artifact: Path, file: Path, *, plain: bool, has_text: bool) -> str:
    """How to go on with a state file."""
    if not has_text:
        return (
            "Go on with the text that it was made from: "
            f"rgexport chat {artifact} --load-state {file} --read TEXT, or, if it was saved with "
            f"--plain, rgexport generate {artifact} --load-state {file} --prompt-file TEXT"
        )
    verb = f"generate {artifact} -p TEXT" if plain else f"chat {artifact}"
    return f"Go on: rgexport {verb} --load-state {file}"


def _lines(fields: dict[str, Any]) -> dict[str, str]:
    identity, messages = fields["identity"], fields["messages"]
    if not fields["has_text"]:
        kind = "not stored, only its hash"
    elif messages is None:
        kind = "a plain text"
    elif len(messages) % 2 and messages[-1]["role"] == "user":
        kind = "a text to be asked about"
    else:
        kind = f"a conversation of {len(messages)} messages"
    return {
        "model": f"{identity['name']} (window {identity['window']})",
        "text": f"{kind}, {fields['tokens']} tokens",
        "made by": ", ".join(filter(None, (fields["engine"], fields["tool"]))),
    }
