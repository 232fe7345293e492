"""`rgexport serve`."""

import os
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import click

from rgexport.commands.options import (
    FOLDER,
    foreign_option,
    native_option,
    no_lookup,
    port_option,
    state_precision,
    threads_option,
    verbose,
)
from rgexport.errors import RequestError

_KEY = "RGEXPORT_API_KEY"


@click.command()
@click.argument("artifacts", type=FOLDER, nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@port_option(8080)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Conversations that are computed together; each takes the memory of one or two states.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(0),
    default=256,
    show_default=True,
    help="Requests that may wait for their turn.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Most tokens of a reply.",
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(1),
    default=1 << 20,
    show_default=True,
    help="Most tokens of a prompt.",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(0, min_open=True),
    default=3600.0,
    show_default=True,
    help="Longest time of an answer.",
)
@click.option(
    "--cache-size",
    default="1GB",
    show_default=True,
    metavar="SIZE",
    help="Memory for states of earlier conversations.",
)
@click.option("--state-folder", type=FOLDER, help="Keep states here, for the next start, too.")
@click.option(
    "--state-folder-size",
    default="10GB",
    show_default=True,
    metavar="SIZE",
    help="Most bytes of the states there.",
)
@click.option(
    "--max-saved-states",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Most states that a client may save there by name.",
)
@click.option(
    "--saved-states-size",
    default="10GB",
    show_default=True,
    metavar="SIZE",
    help="Most bytes of the states that clients save.",
)
@state_precision
@click.option("--api-key", help=f"What clients must present; or the variable {_KEY}.")
@click.option("--api-key-file", type=FOLDER, help="The same, in a file.")
@click.option(
    "--cors-origin", multiple=True, help="A web page's origin that may use it; * for all."
)
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="Another name that requests may give the server; * for all.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Connections at once.",
)
@click.option(
    "--max-connections-per-address",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="The same, from one address; 0 behind a proxy, where all have one address.",
)
@click.option(
    "--stall-seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds without progress after which /health says 503.",
)
@click.option(
    "--grace",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that running replies have when it ends.",
)
@click.option(
    "--share-prefixes",
    is_flag=True,
    help="Let prompts go on from what other clients have sent; states with names are everybody's.",
)
@click.option(
    "--trusted-proxy",
    multiple=True,
    metavar="ADDRESS",
    help="A proxy's address or network; its X-Forwarded-For names the client.",
)
@no_lookup
@threads_option
@click.option("--quiet", is_flag=True, help="No line per request.")
@foreign_option
@native_option
@verbose
def serve(
    artifacts: tuple[Path, ...],
    host: str,
    port: int,
    cache_size: str,
    state_folder: Path | None,
    state_folder_size: str,
    saved_states_size: str,
    api_key: str | None,
    api_key_file: Path | None,
    cors_origin: tuple[str, ...],
    allowed_host: tuple[str, ...],
    **options: Any,
) -> None:
    """Serves artifacts over HTTP, as OpenAI's interface does."""
    from rgexport.export.request import bytes_of
    from rgexport.serve.app import Settings
    from rgexport.serve.connections import Connections
    from rgexport.serve.exchange import Limits
    from rgexport.serve.run import Listening, open_models, openers
    from rgexport.serve.run import serve as run
    from rgexport.serve.text_process import TextProcess

    key = _key(api_key, api_key_file)
    saved = state_folder and state_folder / "saved"
    if saved:
        try:
            saved.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"--state-folder: cannot make the folder {saved}: {error.strerror}"
            ) from None
    limits = Limits(
        new_tokens=options["max_new_tokens"],
        prompt_tokens=options["max_prompt_tokens"],
        seconds=options["max_seconds"],
    )
    settings = Settings(
        api_key=key,
        cors_origins=cors_origin,
        allowed_hosts=_host_names(allowed_host),
        limits=limits,
        saved=saved,
        most_saved=options["max_saved_states"],
        saved_bytes=int(bytes_of("--saved-states-size", saved_states_size)),
        log=not options["quiet"],
        share_prefixes=options["share_prefixes"],
        trusted_proxies=_proxies(options["trusted_proxy"]),
    )
    models = open_models(
        list(artifacts),
        threads=options["threads"],
        allow_foreign=options["allow_foreign"],
        rows=options["parallel"],
        max_waiting=options["max_waiting"],
        lookup=options["lookup"],
        cache_bytes=int(bytes_of("--cache-size", cache_size)),
        state_folder=state_folder,
        folder_bytes=int(bytes_of("--state-folder-size", state_folder_size)),
        state_precision=options["state_precision"],
    )
    text_process = TextProcess(openers(models, list(artifacts), limits.prompt_tokens))
    connections = Connections(options["max_connections"], options["max_connections_per_address"])
    listening = Listening(host, port, options["grace"], connections, options["stall_seconds"])
    run(models, settings, text_process, listening)


def _host_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names in lower case.

    Raises:
        RequestError: one has a port, or is no name.
    """
    from rgexport.serve.host_names import ANY, host_name

    for name in names:
        if name != ANY and host_name(name) != name.lower():
            raise RequestError(f"--allowed-host is {name!r}; expected a name such as chat.example")
    return tuple(name.lower() for name in names)


def _proxies(addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Raises RequestError for a text that is no address and no network."""
    for address in addresses:
        try:
            ip_network(address)
        except ValueError as error:
            raise RequestError(
                f"--trusted-proxy: {error}; expected an address such as 10.0.0.9 or 10.0.0.0/24"
            ) from None
    return addresses


def _key(given: str | None, file: Path | None) -> str | None:
    """The key, from wherever it is."""
    if given is not None and file is not None:
        raise RequestError("--api-key and --api-key-file exclude each other")
    if file is not None:
        try:
            given = file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise RequestError(f"cannot read {file}: {error}") from None
    key = given if given is not None else os.environ.get(_KEY)
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise RequestError("the API key is empty or has other characters than ASCII's")
    return key
