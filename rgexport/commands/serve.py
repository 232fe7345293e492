"""`rgexport serve`."""

import os
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from rgexport import progress
from rgexport.commands.options import (
    ArtifactsArguments,
    LookupArguments,
    NativeArguments,
    StatePrecisionArguments,
    ThreadsArguments,
    command,
    group,
    option,
    port_option,
)
from rgexport.errors import RequestError
from rgexport.files.paths import read_text, report_os_errors

_KEY = "RGEXPORT_API_KEY"


@dataclass(frozen=True)
class ServeArguments(ArtifactsArguments):
    host: str = option("The address to listen on.", default="127.0.0.1")
    port: int = port_option(8080)
    parallel: int = option(
        "Conversations that are computed together; each takes the memory of one or two states.",
        least=1,
        most=256,
        default=8,
    )
    max_waiting: int = option("Maximum number of requests that wait.", least=0, default=256)
    max_new_tokens: int = option("Maximum number of tokens of a reply.", least=1, default=4096)
    max_prompt_tokens: int = option(
        "Maximum length of a prompt in tokens.", least=1, default=1 << 20
    )
    max_seconds: float = option("Maximum duration of an answer.", least=0.0, default=3600.0)
    cache_size: str = option("Memory for earlier conversations.", default="1GB", metavar="SIZE")
    state_folder: Path | None = option("Keep states in this folder, also for the next start.")
    state_folder_size: str = option(
        "Maximum size of the states in the folder.", default="10GB", metavar="SIZE"
    )
    max_saved_states: int = option(
        "Maximum number of states that a client may save there by name.", least=0, default=100
    )
    saved_states_size: str = option(
        "Maximum size of the states that clients save.", default="10GB", metavar="SIZE"
    )
    precision: StatePrecisionArguments = group()
    api_key: str | None = option(f"The key that clients must present; or set the variable {_KEY}.")
    api_key_file: Path | None = option("A file that holds that key.")
    cors_origin: tuple[str, ...] = option("A web page's origin that may use it; * for all.")
    allowed_host: tuple[str, ...] = option(
        "Another name that requests may give the server; * for all.", metavar="NAME"
    )
    max_connections: int = option("Maximum number of connections.", least=1, default=1024)
    max_connections_per_address: int = option(
        "Maximum number of connections from one address; 0 behind a proxy, where all have one "
        "address.",
        least=0,
        default=512,
    )
    stall_seconds: float = option(
        "Seconds without progress after which /health says 503.", least=0.0, default=60.0
    )
    grace: int = option("Seconds for running replies after Ctrl-C or SIGTERM.", least=0, default=30)
    share_prefixes: bool = option(
        "Let prompts go on from the prompts of other clients; all clients share saved states."
    )
    trusted_proxy: tuple[str, ...] = option(
        "A proxy's address or network; its X-Forwarded-For names the client.", metavar="ADDRESS"
    )
    lookup: LookupArguments = group()
    threads: ThreadsArguments = group()
    engine: NativeArguments = group()


@command(ServeArguments)
def serve(arguments: ServeArguments) -> None:
    """Serves artifacts over HTTP, with OpenAI's interface."""
    from rgexport.artifacts.opening import local_path
    from rgexport.export.request import bytes_of
    from rgexport.serve.app import open_models
    from rgexport.serve.app import serve as run
    from rgexport.serve.exchange import Limits
    from rgexport.serve.guards import Connections
    from rgexport.serve.server import ServerSettings

    settings = ServerSettings(
        api_key=_api_key(arguments.api_key, arguments.api_key_file),
        saved=_saved_folder(arguments.state_folder),
        cors_origins=arguments.cors_origin,
        allowed_hosts=_host_names(arguments.allowed_host),
        limits=Limits(
            new_tokens=arguments.max_new_tokens,
            prompt_tokens=arguments.max_prompt_tokens,
            seconds=arguments.max_seconds,
        ),
        most_saved=arguments.max_saved_states,
        saved_bytes=int(bytes_of("--saved-states-size", arguments.saved_states_size)),
        log=not progress.quiet,
        share_prefixes=arguments.share_prefixes,
        trusted_proxies=_proxies(arguments.trusted_proxy),
        host=arguments.host,
        port=arguments.port,
        connections=Connections(arguments.max_connections, arguments.max_connections_per_address),
        grace_seconds=arguments.grace,
        stall_seconds=arguments.stall_seconds,
    )
    artifacts = [local_path(artifact) for artifact in arguments.artifacts]
    models = open_models(
        artifacts,
        threads=arguments.threads.threads,
        allow_foreign=arguments.engine.allow_foreign,
        rows=arguments.parallel,
        max_waiting=arguments.max_waiting,
        lookup=arguments.lookup.lookup,
        cache_bytes=int(bytes_of("--cache-size", arguments.cache_size)),
        state_folder=arguments.state_folder,
        folder_bytes=int(bytes_of("--state-folder-size", arguments.state_folder_size)),
        state_precision=arguments.precision.state_precision,
    )
    run(models, [path.resolve() for path in artifacts], settings)


def _saved_folder(state_folder: Path | None) -> Path | None:
    if state_folder is None:
        return None
    saved = state_folder / "saved"
    with report_os_errors(saved, "make"):
        saved.mkdir(parents=True, exist_ok=True)
    return saved


def _host_names(names: tuple[str, ...]) -> tuple[str, ...]:
    from rgexport.serve.host_names import ANY, host_name

    for name in names:
        if name != ANY and host_name(name) != name.lower():
            raise RequestError(f"--allowed-host is {name!r}; expected a name such as chat.example")
    return tuple(name.lower() for name in names)


def _proxies(addresses: tuple[str, ...]) -> tuple[str, ...]:
    for address in addresses:
        try:
            ip_network(address)
        except ValueError as error:
            raise RequestError(
                f"--trusted-proxy: {error}; expected an address such as 10.0.0.9 or 10.0.0.0/24"
            ) from None
    return addresses


def _api_key(key: str | None, file: Path | None) -> str | None:
    if key is not None and file is not None:
        raise RequestError("--api-key and --api-key-file exclude each other")
    if file is not None:
        key = read_text(file).strip()
    if key is None:
        key = os.environ.get(_KEY)
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise RequestError("the API key is empty or has other characters than ASCII's")
    return key
