"""Commands that make a llama.cpp which runs RecurrentGemma."""

from pathlib import Path

import click

from rgexport.commands.options import FOLDER, help_if_alone, verbose
from rgexport.printing import print_result


@click.group("llama-cpp", invoke_without_command=True)
@click.pass_context
def llama_cpp(context: click.Context) -> None:
    """Makes a llama.cpp that runs RecurrentGemma."""
    help_if_alone(context)


@llama_cpp.command()
@click.argument("checkout", metavar="DIR", type=FOLDER)
@verbose
def patch(checkout: Path) -> None:
    """Adds RecurrentGemma to a llama.cpp checkout."""
    from rgexport.kernels.llama_cpp.port import patch_checkout

    changed = patch_checkout(checkout)
    for path in changed:
        print_result(f"{checkout / path}")
    done = "is patched" if changed else "is patched already"
    print_result(f"{checkout} {done}. Build it as usual: it runs RecurrentGemma.")


@llama_cpp.command()
@click.option(
    "-o", "--output", type=FOLDER, default=Path("llama-cpp"), show_default=True, help="The folder."
)
@click.option("--no-install", is_flag=True, help="Only build the wheel.")
@click.option("--tools", is_flag=True, help="Build llama-quantize, llama-server and others too.")
@verbose
def build(output: Path, no_install: bool, tools: bool) -> None:
    """Builds llama-cpp-python with RecurrentGemma, and installs it.

    It needs a C++ compiler and takes some minutes. The environment variable CMAKE_ARGS chooses
    what llama.cpp runs on, such as -DGGML_CUDA=on.
    """
    from rgexport.kernels.llama_cpp.build import build as build_wheel

    print_result(build_wheel(output, tools=tools, install=not no_install))
