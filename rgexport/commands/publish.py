"""Commands that bring artifacts to others: to the Hugging Face hub, or as a web page."""

from dataclasses import dataclass
from pathlib import Path

from rgexport.commands.options import argument, command, option, port_option
from rgexport.errors import RequestError
from rgexport.printing import print_result


@dataclass(frozen=True)
class PushArguments:
    artifact: Path = argument()
    repo: str = argument(metavar="OWNER/NAME")
    public: bool = option("--public", help="Make a new repository visible to everybody.")
    force: bool = option("--force", help="Add the artifact to a repository with other contents.")


@command(PushArguments)
def push(arguments: PushArguments) -> None:
    """Uploads ARTIFACT to a repository of the Hugging Face hub.

    Log in first, by `hf auth login`. The repository is private unless --public is given. An upload
    that was interrupted goes on when the command is given again.
    """
    from rgexport.export.hub import PREFIX, push_artifact
    from rgexport.export.opening import open_artifact

    artifact = open_artifact(arguments.artifact, verify=True)
    repo = arguments.repo
    page = push_artifact(artifact, repo, public=arguments.public, force=arguments.force)
    verb = "chat" if artifact.manifest.instruction_tuned else "generate"
    file = f"/{arguments.artifact.name}" if artifact.path.is_file() else ""
    name = PREFIX + repo.removeprefix(PREFIX)
    print_result(f"{page} has it. Try: rgexport {verb} {name}{file}")


@dataclass(frozen=True)
class WebArguments:
    artifacts: tuple[Path, ...] = argument(metavar="ARTIFACT...", required=True)
    output: Path | None = option(
        "-o", "--output", help="The folder to write; any web host can serve it."
    )
    force: bool = option("--force", help="Replace an existing site.")
    serve: bool = option("--serve", help="Serve it on this machine; -o is not needed then.")
    port: int = port_option(8000)
    browse: bool = option("--open", help="With --serve: open a browser.")


@command(WebArguments)
def web(arguments: WebArguments) -> None:
    """Makes a web page that chats, as a static site: the model runs in the browser.

    ARTIFACT is of `rgexport onnx --profile wasm` or `--profile webgpu`. Give one of each to let a
    browser use its graphics card where it can, and the processor where it cannot.
    """
    from rgexport.export.opening import open_artifact
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
        print_result(f"{output} is complete. Put it on any web host, under https.")
    if arguments.serve:
        serve_site(site, arguments.port, browse=arguments.browse)
