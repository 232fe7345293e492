"""`rgexport web`."""

from pathlib import Path

import click

from rgexport.commands.options import FOLDER, port_option, verbose
from rgexport.errors import RequestError
from rgexport.printing import print_result


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", type=FOLDER, nargs=-1, required=True)
@click.option("-o", "--output", type=FOLDER, help="The folder to write; any web host can serve it.")
@click.option("--force", is_flag=True, help="Replace an existing site.")
@click.option("--serve", is_flag=True, help="Serve it on this machine; -o is not needed then.")
@port_option(8000)
@click.option("--open", "browse", is_flag=True, help="With --serve: open a browser.")
@verbose
def web(
    artifacts: tuple[Path, ...],
    output: Path | None,
    force: bool,
    serve: bool,
    port: int,
    browse: bool,
) -> None:
    """Makes a web page that chats, as a static site: the model runs in the browser.

    ARTIFACT is of `rgexport onnx --profile wasm` or `--profile webgpu`. Give one of each to let a
    browser use its graphics card where it can, and the processor where it cannot.
    """
    from rgexport.export.opening import open_artifact
    from rgexport.files.targets import check_target
    from rgexport.web_page.local_server import serve_site
    from rgexport.web_page.site import is_site, make_site, write_site

    if output is None and not serve:
        raise RequestError("nothing to do: give -o DIR to write the site, --serve, or both")
    if browse and not serve:
        raise RequestError("--open goes with --serve")
    if output:
        check_target(output, force=force, replaceable=is_site)
    site = make_site([open_artifact(path) for path in artifacts])
    if output:
        write_site(site, output, force=force)
        print_result(f"{output} is complete. Put it on any web host, under https.")
    if serve:
        serve_site(site, port, browse=browse)
