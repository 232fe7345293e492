"""Models of the hub: the cache first, the network only when it must be, and clear refusals."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from rgexport.errors import RequestError
from rgexport.griffin import hub
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.hub import fetch_model
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face

HUB_ID = "google/recurrentgemma-2b"
COMMIT = "0" * 40
CONFIG = ODD_CONFIGS["regular"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a network that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", forbidden)
    return tmp_path


def fill(cache: Path, **options: Any) -> Path:
    """Puts a snapshot into the cache, as the hub's client lays it out."""
    repo = cache / "models--google--recurrentgemma-2b"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    write_hugging_face(CONFIG, random_weights(CONFIG), snapshot, **options)
    (snapshot / "tokenizer.model").write_bytes(b"vocabulary")
    return snapshot


def offer(monkeypatch: pytest.MonkeyPatch, files: dict[str, int]) -> None:
    """Makes the network offer these files, name → size."""
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    info = SimpleNamespace(sha=COMMIT, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)


def test_a_cached_model_is_used_without_the_network(cache: Path) -> None:
    snapshot = fill(cache)
    checkpoint = open_checkpoint(size="2b")
    assert (checkpoint.path, checkpoint.name) == (snapshot, "recurrentgemma-2b")
    assert checkpoint.instruction_tuned is False
    assert open_checkpoint(HUB_ID).path == snapshot


def without_tokenizer(
    cache: Path, monkeypatch: pytest.MonkeyPatch, download: Callable[[Path], None]
) -> tuple[Path, list[dict[str, Any]]]:
    """A snapshot with its tokenizer's settings alone; also gives what the network is asked."""
    snapshot, asked = fill(cache), list[dict[str, Any]]()
    (snapshot / "tokenizer.model").rename(snapshot / "tokenizer_config.json")

    def ask(hub_id: str, **options: Any) -> str:
        if not options.get("local_files_only"):
            asked.append(options)
            download(snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
    return snapshot, asked


def test_a_missing_tokenizer_is_added(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(snapshot: Path) -> None:
        (snapshot / "tokenizer.model").touch()

    snapshot, asked = without_tokenizer(cache, monkeypatch, download)
    assert fetch_model(HUB_ID) == fetch_model(HUB_ID) == snapshot
    assert len(asked) == 1 and asked[0]["revision"] == COMMIT
    assert "tokenizer.model" in asked[0]["allow_patterns"]
    assert "model.safetensors" not in asked[0]["allow_patterns"]


def test_a_copy_without_tokenizer_serves_without_the_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(snapshot: Path) -> None:
        raise ConnectionError("no route\nto host")

    snapshot, asked = without_tokenizer(cache, monkeypatch, fail)
    capsys.readouterr()
    assert fetch_model(HUB_ID) == snapshot and len(asked) == 1
    warning = f"Warning: the tokenizer of {HUB_ID} cannot be downloaded (no route)\n"
    assert capsys.readouterr().err == warning


def test_a_mistyped_folder_is_told_from_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise http_error(errors.RepositoryNotFoundError, 404)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(RequestError, match=r"on the hub.* \(there is no folder models/foo\)$"):
        open_checkpoint("models/foo")


def test_an_incomplete_snapshot_is_completed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill(cache, shard_bytes=100_000)
    shard = sorted(snapshot.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    offer(monkeypatch, {"config.json": 1, "model.safetensors.index.json": 1, shard.name: 1})
    asked: list[dict[str, Any]] = []

    def download(hub_id: str, **options: Any) -> str:
        if not options.get("local_files_only"):
            asked.append(options)
            shard.write_bytes(content)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_model(HUB_ID) == snapshot
    assert open_checkpoint(HUB_ID).problems == ()
    assert [options["revision"] for options in asked] == [COMMIT]


def test_only_the_needed_files_are_requested() -> None:
    wanted = ["model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.model"]
    unwanted = ["2b.pt", "pytorch_model.bin", "modeling.py", "x.gguf", "consolidated.safetensors"]

    def allowed(name: str) -> bool:
        return bool(list(filter_repo_objects([name], allow_patterns=list(hub.ALLOWED))))

    assert all(allowed(name) for name in wanted)
    assert not any(allowed(name) for name in unwanted)


def test_disk_space_is_checked_before_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, {"config.json": 1, "model.safetensors": 1 << 60, "2b.pt": 1 << 61})
    with pytest.raises(RequestError, match="not enough space"):
        fetch_model(HUB_ID)


def test_a_repository_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, {"config.json": 1, "pytorch_model.bin": 1})
    with pytest.raises(RequestError, match=r"has no config\.json with model\.safetensors"):
        fetch_model(HUB_ID)


def http_error(kind: type[Exception], status: int) -> Exception:
    """An error of the client with a response of that status, whatever its HTTP library."""
    error = kind.__new__(kind)
    error.args = ("Client Error\nwith a second line",)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: http_error(errors.GatedRepoError, 401), "is gated: accept its licence at https"),
        (lambda: http_error(errors.HfHubHTTPError, 403), "is gated: accept its licence at https"),
        (lambda: http_error(errors.RepositoryNotFoundError, 404), "there is no model google/"),
        (lambda: errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (lambda: ConnectionError("no route\nto host"), r"cannot be downloaded \(no route\)"),
        (lambda: TimeoutError(), r"cannot be downloaded \(TimeoutError\)"),
    ],
)
def test_refusals_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(RequestError, match=message) as caught:
        open_checkpoint(size="2b")
    assert "-m" in str(caught.value)
    assert "\n" not in str(caught.value)
