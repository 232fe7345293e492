"""Commands that bring models to other programs: a hub, a web page, and a llama.cpp for them."""

import json
from dataclasses import dataclass
from pathlib import Path

import click

from rgexport.commands import options
from rgexport.errors import RequestError
from rgexport.printing import print_outcome, print_result, print_sentences
from rgexport.units import amount


@dataclass(frozen=True)
class PushArguments:
    named: tuple[str, ...] = options.argument(
        metavar="[ARTIFACT] OWNER/NAME", type=options.PATH_OR_ID
    )
    model: tuple[str, ...] = options.model_option("Another way to give ARTIFACT.", "ARTIFACT")
    public: bool = options.option("Make a new repository visible to everybody.")
    force: bool = options.option("Add the artifact to a repository with other contents.")
    dry_run: bool = options.option("List the files and their sizes; upload nothing.")
    json: bool = options.option("Print the files and their sizes, or the page, as JSON.")


@options.command(PushArguments)
def push(arguments: PushArguments) -> None:
    """Uploads ARTIFACT to a repository of the Hugging Face hub.

    Log in first, by `hf auth login`. The repository is private unless --public is given. An upload
    that was interrupted goes on when the command is given again.
    """
    from rgexport.artifacts.hub import PREFIX, planned_upload, push_artifact
    from rgexport.artifacts.opening import open_artifact

    path, repo, *rest = *arguments.model, *arguments.named, "", ""
    if not repo or len(rest) != 2:
        raise RequestError("push takes one ARTIFACT and one OWNER/NAME; name each of them once")
    artifact = open_artifact(path, verify=True)
    if arguments.dry_run:
        sizes = planned_upload(artifact, repo)
        total = sum(sizes.values())
        if arguments.json:
            print_result(json.dumps({"repository": repo, "files": sizes, "bytes": total}))
            return
        for file_name, size in sizes.items():
            print_result(f"{amount(size):>10}  {file_name}")
        kind = "public" if arguments.public else "private"
        print_sentences(f"{amount(total)} would go to {repo}, which is made {kind} if it is new.")
        return
    page = push_artifact(artifact, repo, public=arguments.public, force=arguments.force)
    if arguments.json:
        print_result(json.dumps({"page": page}))
        return
    verb = "chat" if artifact.manifest.instruction_tuned else "generate"
    file = f"/{artifact.path.name}" if artifact.path.is_file() else ""
    name = PREFIX + repo.removeprefix(PREFIX)
    print_sentences(f"{page} has it. Try: rgexport {verb} {name}{file}")


@dataclass(frozen=True)
class WebArguments(options.ArtifactsArguments):
    output: Path | None = options.option("The folder to write; any web host can serve it.", "-o")
    force: bool = options.option("Replace an existing site.")
    serve: bool = options.option("Serve it on this machine; -o is not needed then.")
    port: int = options.port_option(8000)
    browse: bool = options.option("Open a browser; with --serve.", "--open")
    json: bool = options.option("Print the site's path and size as JSON.")


@options.command(WebArguments)
def web(arguments: WebArguments) -> None:
    """Makes a web page that chats, as a static site: the model runs in the browser.

    ARTIFACT is of `rgexport onnx --profile wasm` or `--profile webgpu`. Give one of each to let a
    browser use its graphics card where it can, and the processor where it cannot.
    """
    from rgexport.artifacts.opening import open_artifact
    from rgexport.files.targets import check_target
    from rgexport.web_page.local_server import serve_site
    from rgexport.web_page.site import is_site, make_site, write_site

    output, force = arguments.output, arguments.force
    if output is None and not arguments.serve:
        raise RequestError("nothing to do: give -o DIR to write the site, --serve, or both")
    if arguments.browse and not arguments.serve:
        raise RequestError("--open goes with --serve")
    if output:
        check_target(output, force=force, replaceable=is_site)
    site = make_site([open_artifact(path) for path in arguments.artifacts])
    if output:
        write_site(site, output, force=force)
        sentence = f"{output} is complete. Put it on any web host, under https."
        print_outcome(sentence, output, as_json=arguments.json)
    if arguments.serve:
        serve_site(site, arguments.port, browse=arguments.browse)


@click.group("llama-cpp", invoke_without_command=True, context_settings=options.CONTEXT)
@click.pass_context
def llama_cpp(context: click.Context) -> None:
    """Makes a llama.cpp that runs RecurrentGemma."""
    options.help_if_alone(context)


@dataclass(frozen=True)
class PatchArguments:
    checkout: Path = options.argument(metavar="DIR")


@options.command(PatchArguments, parent=llama_cpp)
def patch(arguments: PatchArguments) -> None:
    """Adds RecurrentGemma to a llama.cpp checkout."""
    from rgexport.kernels.llama_cpp.port import patch_checkout

    changed = patch_checkout(arguments.checkout)
    for path in changed:
        print_result(f"{arguments.checkout / path}")
    state = "is patched" if changed else "is patched already"
    print_sentences(f"{arguments.checkout} {state}. Build it as usual: it runs RecurrentGemma.")


@dataclass(frozen=True)
class BuildArguments:
    output: Path = options.option("The folder to build in.", "-o", default=Path("llama-cpp"))
    no_install: bool = options.option("Build the wheel, but do not install it.")
    tools: bool = options.option("Build llama-quantize, llama-server and others too.")


@options.command(BuildArguments, parent=llama_cpp)
def build(arguments: BuildArguments) -> None:
    """Builds llama-cpp-python with RecurrentGemma, and installs it.

    It needs a C++ compiler and takes some minutes. The environment variable CMAKE_ARGS chooses
    what llama.cpp runs on, such as -DGGML_CUDA=on.
    """
    from rgexport.kernels.llama_cpp.build import build as build_wheel

    install = not arguments.no_install
    print_result(build_wheel(arguments.output, tools=arguments.tools, install=install))
