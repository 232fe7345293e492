"""Slash commands of a chat."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rgexport.chat.conversation import Conversation
from rgexport.chat.from_artifact import summary
from rgexport.errors import RequestError
from rgexport.files.paths import read_text
from rgexport.runtimes.memory import peak_rss_bytes
from rgexport.units import amount

Replies = Generator[str, None, None]


class Quit(Exception):
    pass


@dataclass(frozen=True)
class Command:
    """A command and its description; `run` returns a line, or the pieces of a reply."""

    run: Callable[[Conversation, str], str | Replies]
    about: str
    argument: str = ""
    required: bool = False


def run_command(conversation: Conversation, line: str) -> str | Replies:
    """Runs a line that begins with a slash.

    Raises:
        Quit: the chat ends.
        RequestError: there is no such command, or it fails.
    """
    name, _, argument = line[1:].partition(" ")
    command = COMMANDS.get(_SYNONYMS.get(name, name))
    if command is None:
        raise RequestError(f"there is no command /{name}; /help lists them")
    if command.required and not argument.strip():
        raise RequestError(f"/{name} needs {command.argument}")
    return command.run(conversation, argument.strip())


def _help(conversation: Conversation, argument: str) -> str:
    usages = {f"/{name} {c.argument}".rstrip(): c.about for name, c in COMMANDS.items()}
    width = max(map(len, usages))
    return "\n".join(f"{usage:<{width}}  {about}" for usage, about in usages.items())


def _quit(conversation: Conversation, argument: str) -> str:
    raise Quit


def _clear(conversation: Conversation, argument: str) -> str:
    conversation.clear()
    return "A new conversation."


def _system(conversation: Conversation, argument: str) -> str:
    conversation.set_system(argument)
    return "The system prompt is set." if argument else "There is no system prompt now."


def _undo(conversation: Conversation, argument: str) -> str:
    conversation.undo()
    return "The last message and its reply are gone."


def _save(conversation: Conversation, argument: str) -> str:
    path = Path(argument).expanduser()
    saved = conversation.save(path)
    return f"{path} has {saved.count} tokens in {amount(path.stat().st_size)}."


def _load(conversation: Conversation, argument: str) -> str:
    saved = conversation.load(Path(argument).expanduser())
    if saved.tokens is None:
        return f"{saved.count} tokens are known, but not their text: /read it next."
    return f"{saved.count} tokens are known, {len(conversation.messages)} messages."


def _read(conversation: Conversation, argument: str) -> str:
    path = Path(argument).expanduser()
    count = conversation.read(read_text(path))
    return f"{path.name} is read, the conversation has {count} tokens. Ask about it."


def _stats(conversation: Conversation, argument: str) -> str:
    model, last = conversation.model, conversation.last
    lines = [
        f"{model.name} in {model.info.title}, {model.info.threads} threads",
        f"state: {amount(model.info.state_bytes)} a conversation, "
        f"{amount(model.scheduler.store.nbytes)} of earlier ones kept",
        f"memory: {amount(peak_rss_bytes() or 0)} at most so far",
    ]
    return "\n".join([*lines, *([f"last reply: {summary(last)}"] if last else [])])


def _set(conversation: Conversation, argument: str) -> str:
    options = conversation.options
    values = vars(options.sampling) | vars(options)
    if not argument:
        return "\n".join(f"{name} {values[name]}" for name in _SETTINGS)
    name, _, value = argument.partition(" ")
    name = name.replace("-", "_")
    if name not in _SETTINGS:
        raise RequestError(f"there is no setting {name!r}; expected one of {', '.join(_SETTINGS)}")
    try:
        number: Any = _SETTINGS[name](value)
    except ValueError:
        raise RequestError(f"{name} is {value!r}; expected a number") from None
    if name == "max_new_tokens":
        conversation.options = replace(options, max_new_tokens=number)
    else:
        sampling = replace(options.sampling, **{name: number})
        conversation.options = replace(options, sampling=sampling)
    return f"{name} is {value}."


_SETTINGS: dict[str, Callable[[str], int | float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_new_tokens": int,
}
_SYNONYMS = {"exit": "quit", "reset": "clear", "regen": "retry"}
"""Name of a command in other programs → its name."""
COMMANDS: dict[str, Command] = {
    "help": Command(_help, "shows this"),
    "system": Command(_system, "sets the system prompt; without TEXT, removes it", "TEXT"),
    "undo": Command(_undo, "takes the last message and its reply back"),
    "retry": Command(lambda conversation, _: conversation.retry(), "asks for another reply"),
    "edit": Command(Conversation.edit, "says TEXT instead of the last message", "TEXT", True),
    "read": Command(_read, "reads a text that the next message is about", "FILE", True),
    "save": Command(_save, "saves the conversation and its state", "FILE", True),
    "load": Command(_load, "goes on with a saved one", "FILE", True),
    "clear": Command(_clear, "begins a new conversation"),
    "set": Command(_set, "changes a setting; alone, it lists them", "NAME VALUE"),
    "stats": Command(_stats, "shows speed, memory and state"),
    "quit": Command(_quit, "ends the chat, as Ctrl-D does"),
}
