"""Chats in a terminal and over a pipe, with slash commands."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rgexport.chat.conversation import Conversation, Replies
from rgexport.chat.from_artifact import summary
from rgexport.chat.sampling import Sampling
from rgexport.errors import RequestError, one_line, printable
from rgexport.files.paths import read_text
from rgexport.printing import print_reply, printable_reply, terminal_columns
from rgexport.progress import moves_cursor, note, print_error
from rgexport.runtimes.machine import peak_rss_bytes
from rgexport.units import amount

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from rich.console import Console

_SETTINGS = [f.name for f in fields(Sampling) if f.name != "logit_bias"] + ["max_new_tokens"]
_WHOLE = "top_k", "seed", "max_new_tokens"
_SHOWN = 240  # characters of a message that was loaded
_SYNONYMS = {"exit": "quit", "bye": "quit", "?": "help", "reset": "clear", "regen": "retry"}
PROMPT = "> "
GREETING = "Ctrl-C ends a reply and keeps it, Ctrl-D ends the chat. /help lists the commands."
EDITOR = "Enter sends, Alt-Enter begins a new line."
ONE_LINE = "Each line is a message."
NO_EDITOR = f"{ONE_LINE} Long messages, history and completion: pip install 'rgexport[chat]'."


class Quit(Exception):
    pass


@dataclass(frozen=True)
class Command:
    run: Callable[[Conversation, str], str | Replies]
    about: str
    argument: str = ""
    required: bool = False


def run_command(conversation: Conversation, line: str) -> str | Replies:
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
    if argument:
        conversation.set_system("" if argument in ("none", '""') else argument)
    text = conversation.system
    return f"The system prompt: {text}\n/system none removes it." if text else "No system prompt."


def _save(conversation: Conversation, argument: str) -> str:
    path = Path(argument).expanduser()
    saved = conversation.save(path)
    return f"{path} has {saved.count} tokens in {amount(path.stat().st_size)}."


def load_state(conversation: Conversation, file: Path | str) -> str:
    """Loads a state file; says what it has, with a line of each of its last two messages."""
    saved = conversation.load(Path(file).expanduser())
    if saved.tokens is None:
        return f"{saved.count} tokens are known, but not their text: /read it next."
    marks, messages = {"user": PROMPT, "assistant": ""}, saved.messages or ()
    last = [
        marks[m["role"]] + one_line(m["content"], _SHOWN) for m in messages if m["role"] in marks
    ]
    return "\n".join([f"{saved.count} tokens are known, {len(messages)} messages.", *last[-2:]])


def _raw(conversation: Conversation, argument: str) -> str:
    conversation.styled = not conversation.styled
    return "Markdown has styles." if conversation.styled else "Replies are shown as they are."


def _retry(conversation: Conversation, argument: str) -> Replies:
    if conversation.repeats:
        print_error("At temperature 0 the reply is the same; another: /set temperature 0.7")
    return conversation.retry()


def _read(conversation: Conversation, argument: str) -> str:
    path = Path(argument).expanduser()
    count = conversation.read(read_text(path))
    return f"{path.name} is read, the conversation has {count} tokens. Ask about it."


def _stats(conversation: Conversation, argument: str) -> str:
    model, last = conversation.model, conversation.last
    lines = [
        f"{model.name} in {model.info.title}, {model.info.threads} threads",
        f"state: {amount(model.info.state_bytes)} a conversation, "
        f"{amount(model.scheduler.store.nbytes)} for earlier conversations",
        f"memory: {amount(peak_rss_bytes() or 0)} at most so far",
    ]
    return "\n".join([*lines, *([f"last reply: {summary(last)}"] if last else [])])


def _set(conversation: Conversation, argument: str) -> str:
    options = conversation.options
    name, _, value = argument.replace("=", " ").partition(" ")
    name = name.replace("-", "_")
    names = [setting for setting in _SETTINGS if setting.startswith(name)]
    name = names[0] if name and len(names) == 1 else name  # such as `temp`
    if name and name not in _SETTINGS:
        raise RequestError(f"there is no setting {name!r}; expected one of {', '.join(_SETTINGS)}")
    if not value:
        values = vars(options.sampling) | vars(options)
        settings = {n: "random" if values[n] is None else values[n] for n in _SETTINGS}
        return "\n".join(f"{n} {settings[n]}" for n in ([name] if name else _SETTINGS))
    try:
        number: Any = int(value) if name in _WHOLE else float(value)
    except ValueError:
        raise RequestError(f"{name} is {value!r}; expected a number") from None
    changed = {name: number}
    if name != "max_new_tokens":
        changed = {"sampling": replace(options.sampling, **changed)}
    conversation.options = replace(options, **changed)
    return f"{name} is {value}."


COMMANDS: dict[str, Command] = {
    "help": Command(_help, "shows this"),
    "system": Command(_system, "sets the system prompt, or `none`; alone, shows it", "TEXT"),
    "undo": Command(lambda c, _: c.undo(), "takes back a text just read, or the last message"),
    "retry": Command(_retry, "asks for another reply"),
    "edit": Command(Conversation.edit, "says TEXT instead of the last message", "TEXT", True),
    "read": Command(_read, "reads a text that the next message is about", "FILE", True),
    "save": Command(_save, "saves the conversation and its state", "FILE", True),
    "load": Command(load_state, "goes on with a saved one", "FILE", True),
    "clear": Command(_clear, "begins a new conversation"),
    "set": Command(_set, "changes or shows a setting; alone, lists all", "NAME VALUE"),
    "raw": Command(_raw, "shows replies without styles, or with them again"),
    "stats": Command(_stats, "shows speed, memory and state"),
    "quit": Command(_quit, "ends the chat, as Ctrl-D does"),
}


def pipe_chat(conversation: Conversation, lines: TextIO, output: TextIO) -> None:
    """Reads one message a line until the end of `lines`, and streams each reply to `output`.

    Replies end with a newline; the output of commands goes to stderr. Blank lines are skipped.
    """
    with contextlib.suppress(Quit):
        for line in _messages(lines):
            answer = _answer(conversation, line)
            if isinstance(answer, str):
                print_error(answer)
                continue
            print_pieces(answer, output, wraps=conversation.styled)
            _note_cut(conversation)


def print_pieces(pieces: Iterable[str], output: TextIO, *, wraps: bool = True) -> None:
    """Prints a reply as it comes, and ends the line; a terminal's lines break between words."""
    if not (wraps and output.isatty()):
        for piece in chain(pieces, "\n"):
            print_reply(piece, output)
        return
    from rich.console import Console

    from rgexport.chat.styled_reply import StyledReply

    console = Console(file=output, color_system=None, width=terminal_columns(output))
    with contextlib.closing(StyledReply(console)) as reply:
        for piece in pieces:
            reply.add(printable_reply(piece))


def _note_cut(conversation: Conversation) -> None:
    if conversation.last and conversation.last.reason == "length":
        note("The reply is cut; --max-new-tokens allows more.")


def one_message(
    conversation: Conversation, text: str, output: TextIO, *, as_json: bool = False
) -> None:
    """Sends one message; streams the reply, or writes it as JSON at its end."""
    pieces: Iterable[str] = conversation.send(text)
    if as_json:
        "".join(pieces)
        assert conversation.last
        pieces = [json.dumps(asdict(conversation.last), ensure_ascii=False)]
    print_pieces(pieces, output, wraps=conversation.styled and not as_json)
    _note_cut(conversation)


def terminal_chat(
    conversation: Conversation, console: "Console | None" = None, *, keeps_history: bool = True
) -> None:
    from rich.console import Console

    console = console or Console(highlight=False)
    read_message, usage = _editor(keeps_history)
    banner = printable(_banner(conversation))
    console.print(f"{banner}\n{usage} {GREETING}", style="dim", markup=False)
    with contextlib.suppress(Quit, EOFError):
        while True:
            try:
                line = read_message(PROMPT)
                if line.strip():
                    _show(conversation, line, console)
            except KeyboardInterrupt:
                console.print("Ctrl-D or /quit ends the chat.", style="dim")
            except RequestError as error:
                console.print(printable(str(error)), style="red", markup=False)


def _banner(conversation: Conversation) -> str:
    model, temperature = conversation.model, conversation.options.sampling.temperature
    window = model.identity.window
    return (
        f"{model.name} in {model.info.title}; temperature {temperature:g}; texts of any length, "
        + (f"attention to the last {window:,} tokens." if window else "no attention.")
    )


def _answer(conversation: Conversation, line: str) -> str | Replies:
    """Returns the line of a command or the pieces of a reply; `//` escapes a slash."""
    if line.startswith("/") and not line.startswith("//"):
        return run_command(conversation, line.strip())
    return conversation.send(line[1:] if line.startswith("//") else line)


def _show(conversation: Conversation, line: str, console: "Console") -> None:
    from rgexport.chat.styled_reply import StyledReply

    answer = _answer(conversation, line)
    if isinstance(answer, str):
        console.print(printable_reply(answer), style="dim", markup=False)
        return
    styled = StyledReply(console, styled=conversation.styled)
    with contextlib.closing(answer) as reply, contextlib.closing(styled):
        try:
            for piece in reply:
                styled.add(printable_reply(piece))
        except KeyboardInterrupt:
            styled.add(" [stopped]")
    if conversation.last and conversation.last.reason == "length":
        console.print("(cut; /set max_new_tokens NUMBER allows more)", style="dim")


def _editor(keeps_history: bool) -> tuple[Callable[[str], str], str]:
    if not moves_cursor():
        return input, ONE_LINE
    try:
        return _prompt_session(keeps_history).prompt, EDITOR
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prompt_toolkit":
            raise
        return input, NO_EDITOR


def _prompt_session(keeps_history: bool) -> "PromptSession[str]":
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return PromptSession(
        multiline=True,
        key_bindings=keys,
        completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
        complete_while_typing=False,
        prompt_continuation="  ",
        history=_history() if keeps_history else None,
    )


def _history() -> Any:
    import platformdirs
    from prompt_toolkit.history import FileHistory

    path = Path(platformdirs.user_state_dir("rgexport")) / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return None
    return FileHistory(str(path))


def _messages(lines: TextIO) -> Iterator[str]:
    try:
        for line in lines:
            if text := line.strip():
                yield text if text.startswith("/") else line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"the input is not UTF-8 text: {error}") from None
