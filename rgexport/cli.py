"""The command line: exit codes and lines of error. The commands are in `commands`."""

import io
import os
import sys
import traceback
from typing import NoReturn

import click

from rgexport import progress
from rgexport.commands import (
    compress,
    evaluate,
    exports,
    hub,
    llama_cpp,
    proof,
    serve,
    state,
    use,
    web,
)
from rgexport.commands.options import help_if_alone, verbose
from rgexport.errors import RequestError, one_line
from rgexport.printing import print_result

INTERRUPTED, PIPE_CLOSED = 130, 141
REDIRECTED = "utf-8" if os.name == "nt" and not os.environ.get("PYTHONIOENCODING") else None
"""The encoding of pipes and files as stdin and stdout, where it is not the system's: Windows' code
pages lack most characters of a model's replies."""
_PACKAGES = {
    "export": ("torch", "onnx", "onnx_ir"),
    "coreml": ("coremltools",),
    "gguf": ("gguf",),
    "serve": (
        *("anyio", "fastapi", "llguidance", "prometheus_client", "pydantic"),
        *("starlette", "uvicorn"),
    ),
}
EXTRAS = {package: extra for extra, packages in _PACKAGES.items() for package in packages}
"""Package that the core install lacks → the extra that brings it."""


def main() -> NoReturn:
    """Runs one command; whatever goes wrong ends in one line and an exit code.

    0: done; 1: the answer is no; 2: the request was wrong; 130 and 141: interrupted, by a key or
    by a reader that left, as shells have it.
    """
    _prepare_streams()
    sys.exit(run(sys.argv[1:]))


def _prepare_streams() -> None:
    """Opens the null device for closed streams; stdout writes `?` for what it cannot encode.

    In the order of their numbers, so that no file opened later gets the number of a stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - for the whole process
            setattr(sys, name, stream)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding=REDIRECTED)
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr never fails on what it cannot encode
        sys.stdout.reconfigure(errors="replace")


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    progress.expect_stages(0)
    try:
        code = rgexport.main(arguments, "rgexport", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except SystemExit:  # click's way of telling that whoever read our output has left
        return PIPE_CLOSED
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "rgexport"
        return _fail(f"{error.format_message()} (see {command} --help)")
    except (click.ClickException, RequestError, OSError) as error:
        return _fail(error_line(error))
    except MemoryError as error:
        return _fail(f"there is too little memory ({one_line(str(error)) or 'none is left'})")
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        install = f"pip install 'rgexport[{EXTRAS[package]}]'"
        return _fail(f"this command needs {package}: {install}")


def error_line(error: Exception) -> str:
    """The line for an error of a request or of the system."""
    if isinstance(error, OSError):
        return one_line(f"{error.filename or 'the system'}: {error.strerror or error}")
    return one_line(str(error))


def _fail(message: str) -> int:
    progress.note(f"Error: {one_line(message)}")
    progress.detail(traceback.format_exc())
    return 2


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    from rgexport._version import __version__
    from rgexport.kernels.onnx.library import kernels
    from rgexport.kernels.rounding.library import unusable

    found = kernels()
    sets = ", ".join(found.instruction_sets)
    built = f"{found.instruction_set} (of {sets} here)" if found.ops else f"none: {found.reason}"
    levels = f"none: {reason}" if (reason := unusable()) else "built"
    print_result(f"rgexport {__version__}\nnative kernels: {built}\nlibrary of levels: {levels}")
    context.exit()


@click.group(invoke_without_command=True)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version, and which native libraries were built.",
)
@verbose
@click.pass_context
def rgexport(context: click.Context) -> None:
    """Exports RecurrentGemma to ONNX, Core ML and GGUF, and checks the result."""
    help_if_alone(context)


for command in (
    *(
        exports.onnx,
        exports.coreml,
        exports.gguf,
        use.generate,
        use.chat,
        serve.serve,
        web.web,
        state.state,
        use.bench,
    ),
    *(proof.inspect, exports.random, proof.reference, proof.validate, evaluate.evaluate),
    llama_cpp.llama_cpp,
    *(compress.calibrate, compress.quantize, hub.push),
):
    rgexport.add_command(command)
