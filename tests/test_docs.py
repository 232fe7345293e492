"""README.md and the pages of docs/: links lead somewhere, and commands are commands."""

import re
import shlex
from itertools import groupby

import click
import pytest

from rgexport.cli import rgexport as command_line
from rgexport.commands.options import CONTEXT
from tests.command_line import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
OUTSIDE = [
    ROOT / f"{name}.md"
    for name in ("README", "CONTRIBUTING", "CHANGELOG", "CODE_OF_CONDUCT", "SECURITY")
]
"""What mkdocs does not look at; `make docs` checks the links of all others."""


def anchors(path):
    """The anchors that GitHub and mkdocs both give to headings."""
    headings = re.findall(r"^#+(.*)", path.read_text("utf-8").lower(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each).strip().replace(" ", "-") for each in headings}


def commands(path):
    """Commands of rgexport in indented or fenced blocks, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text("utf-8"))
    for block, lines in groupby(text.splitlines(), lambda line: line.startswith(("    ", "$ "))):
        for line in lines if block else ():
            stripped = line.strip().removeprefix("$ ")
            if stripped.startswith("rgexport "):
                yield stripped


EXAMPLES = [
    pytest.param(line, id=f"{path.name}: {line}")
    for path in [*OUTSIDE, *PAGES]
    for line in commands(path)
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", path.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{path.name} links to {target}"


def test_there_are_examples_of_every_command():
    shown = {param.values[0].split()[1] for param in EXAMPLES}
    assert shown >= {"onnx", "coreml", "gguf", "llama-cpp", "chat", "validate", "reference"}


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_are_commands(line):
    words = shlex.split(line, comments=True)[1:]
    command, context = command_line, click.Context(command_line, **CONTEXT)
    while isinstance(command, click.Group):
        command = command.get_command(context, words.pop(0))
        assert command is not None, f"not a command: {line}"
        context = click.Context(command, **CONTEXT)
    values, _, _ = command.make_parser(context).parse_args(args=words)
    for option in command.params:
        if isinstance(option.type, click.Choice) and isinstance(values.get(option.name), str):
            assert values[option.name] in option.type.choices


def test_command_page_lists_every_command():
    page = (ROOT / "docs/commands.md").read_text("utf-8")
    for name in command_line.commands:
        assert f"(#rgexport-{name})" in page
