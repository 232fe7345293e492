"""Commands that make a llama.cpp which runs RecurrentGemma."""

from dataclasses import dataclass
from pathlib import Path

import click

from rgexport.commands.options import argument, command, help_if_alone, option
from rgexport.printing import print_result


@click.group("llama-cpp", invoke_without_command=True)
@click.pass_context
def llama_cpp(context: click.Context) -> None:
    """Makes a llama.cpp that runs RecurrentGemma."""
    help_if_alone(context)


@dataclass(frozen=True)
class PatchArguments:
    checkout: Path = argument(metavar="DIR")


@command(PatchArguments, parent=llama_cpp)
def patch(arguments: PatchArguments) -> None:
    """Adds RecurrentGemma to a llama.cpp checkout."""
    from rgexport.kernels.llama_cpp.port import patch_checkout

    changed = patch_checkout(arguments.checkout)
    for path in changed:
        print_result(f"{arguments.checkout / path}")
    state = "is patched" if changed else "is patched already"
    print_result(f"{arguments.checkout} {state}. Build it as usual: it runs RecurrentGemma.")


@dataclass(frozen=True)
class BuildArguments:
    output: Path = option("-o", "--output", default=Path("llama-cpp"), help="The folder.")
    no_install: bool = option("--no-install", help="Only build the wheel.")
    tools: bool = option("--tools", help="Build llama-quantize, llama-server and others too.")


@command(BuildArguments, parent=llama_cpp)
def build(arguments: BuildArguments) -> None:
    """Builds llama-cpp-python with RecurrentGemma, and installs it.

    It needs a C++ compiler and takes some minutes. The environment variable CMAKE_ARGS chooses
    what llama.cpp runs on, such as -DGGML_CUDA=on.
    """
    from rgexport.kernels.llama_cpp.build import build as build_wheel

    install = not arguments.no_install
    print_result(build_wheel(arguments.output, tools=arguments.tools, install=install))
