"""Commands on state files."""

from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import FOLDER, native_option, verbose


@click.group()
def state() -> None:
    """Saves what a model remembers of a text, to go on with later, or elsewhere."""


@state.command()
@click.argument("artifact", type=FOLDER)
@click.option("--read", "text", type=FOLDER, required=True, help="The text to read.")
@click.option("--plain", is_flag=True, help="To be continued, not to be asked about in a chat.")
@click.option(
    "--no-text", is_flag=True, help="Keep a hash of the text alone: for who has the text anyway."
)
@click.option("--precision", metavar="fp32|fp16", help="[default: what the engine computes with]")
@click.option("-o", "--output", type=FOLDER, required=True, help="The state file.")
@click.option("--threads", type=click.IntRange(1), help="[default: one per core]")
@click.option("--force", is_flag=True, help="Replace an earlier one.")
@native_option
@verbose
def save(
    artifact: Path,
    text: Path,
    plain: bool,
    no_text: bool,
    precision: str | None,
    output: Path,
    threads: int | None,
    force: bool,
) -> None:
    """Reads a text once, and saves the state."""
    from rgexport.chat.from_artifact import open_model
    from rgexport.chat.state_file import is_state_file
    from rgexport.files.atomic import check_file_target
    from rgexport.files.regular_file import read_text
    from rgexport.progress import amount

    check_file_target(output, force=force, replaceable=is_state_file)
    written = read_text(text)
    with open_model(artifact, chat=not plain, threads=threads, state_precision=precision) as model:
        messages = None if plain else [{"role": "user", "content": written}]
        ids = model.text_ids(written) if messages is None else model.opening_ids(messages)
        saved = model.save_state(output, ids, messages, with_text=not no_text)
    verb = f"generate {artifact} -p TEXT" if plain else f"chat {artifact}"
    again = f"; then give it {text} again" if no_text else ""
    click.echo(
        f"{output} has {saved.count} tokens in {amount(output.stat().st_size)}. "
        f"Go on: rgexport {verb} --load-state {output}{again}"
    )


@state.command()
@click.argument("artifact", type=FOLDER)
@click.argument("file", type=FOLDER)
@verbose
def load(artifact: Path, file: Path) -> None:
    """Checks that ARTIFACT can go on with a state file."""
    from rgexport.chat.artifact_text import open_template
    from rgexport.chat.state_file import identity_of, read_state, require_same_model
    from rgexport.export.opening import open_artifact
    from rgexport.griffin.state import state_specs

    opened = open_artifact(artifact)
    shapes = {spec.name: spec.shape for spec in state_specs(opened.manifest.config)}
    saved = read_state(file, shapes)
    require_same_model(file, saved, identity_of(opened, open_template(opened)))
    verb = "generate" if saved.messages is None else "chat"
    click.echo(
        f"{file} fits: {saved.count} tokens. Go on: rgexport {verb} {artifact} --load-state {file}"
    )


@state.command()
@click.argument("file", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def info(file: Path, as_json: bool) -> None:
    """Says what a state file is of."""
    import json

    from rgexport.chat.state_file import read_fields

    fields = read_fields(file)
    if as_json:
        click.echo(json.dumps(fields, ensure_ascii=False))
        return
    for name, value in _lines(fields).items():
        click.echo(f"{name:<9} {value}")


def _lines(fields: dict[str, Any]) -> dict[str, str]:
    identity, messages = fields["identity"], fields["messages"]
    if not fields["has_text"]:
        kind = "its hash alone"
    elif messages is None:
        kind = "a plain text"
    elif len(messages) % 2 and messages[-1]["role"] == "user":
        kind = "a text to be asked about"
    else:
        kind = f"a conversation of {len(messages)} messages"
    return {
        "model": f"{identity['name']} (window {identity['window']})",
        "text": f"{kind}, {fields['tokens']} tokens",
        "made by": f"{fields['engine']}, {fields['tool']}",
    }
