"""The command line: its group of commands, exit codes and error lines."""

import io
import os
import re
import sys
import traceback
from typing import NoReturn

import click
from click.shell_completion import get_completion_class

from rgexport import progress
from rgexport.commands import exports, measure, publish, serve, text
from rgexport.commands.defaults import read_defaults, source_of
from rgexport.commands.options import CONTEXT, QUIET, VERBOSE, help_if_alone
from rgexport.errors import RequestError, one_line, system_reason
from rgexport.printing import print_result

INTERRUPTED, PIPE_CLOSED = 130, 141
REDIRECTED = "utf-8" if os.name == "nt" and not os.environ.get("PYTHONIOENCODING") else None
"""The encoding of stdin and stdout that are no terminal: Windows' code pages lack most characters
of a model's replies."""
_PACKAGES = {
    "export": ("torch", "onnx", "onnx_ir"),
    "coreml": ("coremltools",),
    "gguf": ("gguf",),
    "serve": "anyio fastapi llguidance prometheus_client pydantic starlette uvicorn".split(),
}
EXTRAS = {package: extra for extra, packages in _PACKAGES.items() for package in packages}
"""Package that the core install lacks → the extra that installs it."""


def main() -> NoReturn:
    """Runs one command; any error ends in one line and an exit code.

    0: done; 1: the answer is no; 2: the request was wrong; 130: interrupted by a key; 141: the
    reader of the output has left.
    """
    _prepare_streams()
    sys.exit(run(sys.argv[1:]))


def _prepare_streams() -> None:
    """Opens the null device for closed streams; makes stdout write `?` for unknown characters.

    The order is that of their numbers, so that no file opened later gets the number of a stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - for the whole process
            setattr(sys, name, stream)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding=REDIRECTED)
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr never fails to encode a character
        sys.stdout.reconfigure(errors="replace")


def run(arguments: list[str]) -> int:
    progress.verbose = progress.quiet = False
    progress.expect_stages(0)
    try:
        defaults = read_defaults(rgexport)
        code = rgexport.main(arguments, "rgexport", standalone_mode=False, default_map=defaults)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except SystemExit as end:  # with code 1 when the reader of our output has left
        return PIPE_CLOSED if end.code else 0
    except click.UsageError as error:
        names = [name for name in arguments[:1] if name in rgexport.commands]
        command = error.ctx.command_path if error.ctx else " ".join(["rgexport", *names])
        parameter = error.param if isinstance(error, click.BadParameter) else None
        source = source_of(error.ctx, parameter) if error.ctx and parameter else ""
        message = error.format_message()
        if (unknown := _UNKNOWN.match(message)) and (habit := _HABITS.get(unknown["word"])):
            message = f"{unknown[0]}; try {habit}."
        return _fail(f"{message}{source} (see {command} --help)")
    except (click.ClickException, RequestError, OSError) as error:
        return _fail(error_line(error))
    except MemoryError as error:
        return _fail(f"there is too little memory ({one_line(str(error)) or 'none is left'})")
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f"this command needs {package}: pip install 'rgexport[{EXTRAS[package]}]'")


def error_line(error: Exception) -> str:
    if isinstance(error, OSError):
        return one_line(f"{error.filename or 'the system'}: {system_reason(error)}")
    return one_line(str(error))


def _fail(message: str) -> int:
    progress.print_error(f"Error: {one_line(message)}")
    progress.detail(traceback.format_exc())
    return 2


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from rgexport._version import __version__
    from rgexport.kernels.onnx.library import kernels
    from rgexport.kernels.rounding.library import unusable

    native = kernels()
    sets = ", ".join(native.instruction_sets)
    built = f"{native.instruction_set} (of {sets} here)" if native.ops else f"none: {native.reason}"
    levels = f"none: {reason}" if (reason := unusable()) else "built"
    print_result(f"rgexport {__version__}\nnative kernels: {built}\nlibrary of levels: {levels}")
    context.exit()


_VERSION = click.Option(
    ["--version"],
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version, and which native libraries were built.",
)


SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Export": (exports.onnx, exports.coreml, exports.gguf, publish.llama_cpp, exports.random),
    "Run": (text.chat, text.generate, serve.serve, text.state, publish.web),
    "Check": (
        *(measure.validate, measure.evaluate, measure.bench),
        *(measure.inspect, measure.reference),
    ),
    "Tune": (exports.calibrate, exports.quantize),
    "Share": (publish.push,),
}
"""Title in `rgexport --help` → its commands."""
_EPILOG = """\b
Examples:
  rgexport onnx --size demo --int4
  rgexport chat demo-int4-onnx

Documentation: docs/index.md in the repository"""

_HABITS = {
    **dict.fromkeys(("convert", "export"), "onnx, coreml or gguf"),
    **dict.fromkeys(("run", "cli"), "chat or generate"),
    **{"compare": "validate", "perplexity": "evaluate", "show": "inspect", "upload": "push"},
    **dict.fromkeys(("--outtype", "--quantize", "--q-bits"), "--type, --precision or --int4"),
    **dict.fromkeys(("--bits", "--target-size", "--size-limit"), "rgexport quantize, then --plan"),
    **dict.fromkeys(("--file", "--document", "--prompt-file", "-f"), "--read FILE"),
    **dict.fromkeys(("-c", "--ctx-size"), "it without: texts may have any length"),
    **{"--outfile": "--output", "--prompt-cache": "--load-state or --save-state"},
}
"""Command or option of another program → ours."""
_UNKNOWN = re.compile(r"No such (command|option) '(?P<word>[^']+)'")


class _Sections(click.Group):
    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        others = self.commands.keys() - {c.name for group in SECTIONS.values() for c in group}
        titled = {**SECTIONS, "Help": tuple(self.commands[name] for name in sorted(others))}
        for title, commands in titled.items():
            with formatter.section(title):
                formatter.write_dl([(str(c.name), c.get_short_help_str(200)) for c in commands])


@click.group(
    cls=_Sections,
    invoke_without_command=True,
    params=[_VERSION, VERBOSE, QUIET],
    context_settings=CONTEXT,
    epilog=_EPILOG,
)
@click.pass_context
def rgexport(context: click.Context) -> None:
    """Exports RecurrentGemma to ONNX, Core ML and GGUF, and checks the result."""
    help_if_alone(context)


@rgexport.command("help", context_settings=CONTEXT)
@click.argument("names", nargs=-1, metavar="[COMMAND]...")
@click.pass_context
def show_help(context: click.Context, names: tuple[str, ...]) -> None:
    """Shows what a command does, and its options."""
    command: click.Command = rgexport
    context = context.find_root()
    for name in names:
        inner = command.get_command(context, name) if isinstance(command, click.Group) else None
        if inner is None:
            raise click.UsageError(f"No such command {name!r}.", context)
        command = inner
        context = click.Context(inner, info_name=name, parent=context)
    print_result(command.get_help(context))


_COMPLETION = """Prints the script that completes commands and options in a shell.

\b
bash: eval "$(rgexport completion bash)"    in ~/.bashrc
zsh:  eval "$(rgexport completion zsh)"     in ~/.zshrc
fish: rgexport completion fish | source     in ~/.config/fish/config.fish"""


@rgexport.command(help=_COMPLETION, context_settings=CONTEXT)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    complete = get_completion_class(shell)
    assert complete, "click completes these shells"
    print_result(complete(rgexport, {}, "rgexport", "_RGEXPORT_COMPLETE").source())


for _commands in SECTIONS.values():
    for _command in _commands:
        rgexport.add_command(_command)
