"""Finds a model of the Hugging Face hub: in the local cache, else by download."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.files.targets import require_free_disk
from rgexport.griffin.huggingface import CONFIG, INDEX, SINGLE, find_shards
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES, has_tokenizer
from rgexport.progress import warn

ALLOWED = (SINGLE, "model-*.safetensors", INDEX, CONFIG, *TOKENIZER_FILES)
"""Patterns of the files that are downloaded: no pickles and no code."""


def fetch_model(hub_id: str) -> Path:
    """Returns the folder of a hub id from the cache, or by download; adds a missing tokenizer.

    Raises RequestError: no such model, no permission, network or disk space, or no safetensors.
    """
    folder = cached_model(hub_id)
    if folder is None:
        return _download(hub_id)
    if not has_tokenizer(folder):
        try:
            snapshot(hub_id, folder.name, TOKENIZER_FILES)
        except Exception as error:  # as in `explained`
            warn(f"the tokenizer of {hub_id} cannot be downloaded ({_reason(error)})")
    return folder


def cached_model(hub_id: str) -> Path | None:
    """Returns the newest snapshot in the hub's cache, if nothing is missing from it."""
    from huggingface_hub import snapshot_download

    try:
        name = snapshot_download(hub_id, local_files_only=True, allow_patterns=list(ALLOWED))
        folder = Path(name)
        find_shards(folder)
    except (OSError, ValueError, RequestError):
        return None
    return folder if (folder / CONFIG).is_file() else None


def _download(hub_id: str) -> Path:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    with explained(hub_id, "download", "or pass a folder with -m"):
        info = HfApi().model_info(hub_id, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if CONFIG not in sizes or not sizes.keys() & {SINGLE, INDEX}:
            need = f"{CONFIG} with {SINGLE} or {INDEX}"
            raise RequestError(f"{hub_id} has no {need}; expected a RecurrentGemma model")
        missing = sum(
            size
            for name, size in sizes.items()
            if any(fnmatch(name, pattern) for pattern in ALLOWED)
            and not isinstance(try_to_load_from_cache(hub_id, name, revision=info.sha), str)
        )
        require_free_disk(Path(constants.HF_HUB_CACHE), missing)
        return snapshot(hub_id, None, ALLOWED)  # by a hash, the cache would not find it again


@contextmanager
def explained(hub_id: str, action: str, advice: str) -> Iterator[None]:
    """Raises RequestError for any error in an `action` such as `download`, with `advice`."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # the hub's client raises its HTTP library's errors as they are
        raise RequestError(_explain(hub_id, error, action, advice)) from None


def snapshot(
    hub_id: str, revision: str | None, patterns: Sequence[str], target: Path | None = None
) -> Path:
    from huggingface_hub import snapshot_download

    hide_bars_in_files()
    folder = snapshot_download(
        hub_id, revision=revision, allow_patterns=list(patterns), local_dir=target
    )
    return Path(folder)


def hide_bars_in_files() -> None:
    """Turns the bars of the hub's client off where no terminal shows them."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def _explain(hub_id: str, error: Exception, action: str, advice: str) -> str:
    from huggingface_hub import errors

    log_in = "log in (`hf auth login`, or set HF_TOKEN)"
    page = f"https://huggingface.co/{hub_id}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if action == "upload" and status in (401, 403):
        return f"the hub refuses the upload to {hub_id}: {log_in} with a token that may write there"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{hub_id} is gated: accept its licence at {page}, then {log_in}, {advice}"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        missing = f"there is no model {hub_id} on the hub, or it is private"
        return f"{missing}; check the name, {log_in}, {advice}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id} has no such revision; check the name, {advice}"
    failed = f"{hub_id} is not in the local cache and cannot be downloaded"
    if action == "upload":
        failed = f"the upload to {hub_id} failed"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{failed}: HF_HUB_OFFLINE is set; unset it, {advice}"
    network = "" if action == "upload" and status else "check the network, "
    return f"{failed} ({_reason(error)}); {network}{advice}"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
