"""Models of the hub: the cache first, the network only when it must be, and clear refusals."""

from types import SimpleNamespace
from unittest.mock import Mock

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
def cache(tmp_path, monkeypatch):
    """An empty cache, and a network that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    forbidden = Mock(side_effect=AssertionError("the network was asked"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", forbidden)
    return tmp_path


def fill(cache, **options):
    """Puts a snapshot into the cache, as the hub's client lays it out."""
    refs = cache / "models--google--recurrentgemma-2b" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    snapshot = refs.with_name("snapshots") / COMMIT
    write_hugging_face(CONFIG, random_weights(CONFIG), snapshot, **options)
    (snapshot / "tokenizer.model").write_bytes(b"vocabulary")
    return snapshot


def offer(monkeypatch, files):
    """Makes the network offer these files, name → size."""
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    info = SimpleNamespace(sha=COMMIT, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)


def serve(monkeypatch, snapshot, download):
    """Lets `download` stand for a download into a snapshot; returns what will be asked for."""
    asked = []

    def ask(hub_id, **options):
        if not options.get("local_files_only"):
            asked.append(options)
            download()
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)
    return asked


def test_a_cached_model_is_used_without_the_network(cache):
    snapshot = fill(cache)
    checkpoint = open_checkpoint(size="2b")
    assert (checkpoint.path, checkpoint.name) == (snapshot, "recurrentgemma-2b")
    assert checkpoint.instruction_tuned is False
    assert open_checkpoint(HUB_ID).path == snapshot


def test_a_missing_tokenizer_is_added(cache, monkeypatch, capsys):
    snapshot = fill(cache)
    (snapshot / "tokenizer.model").rename(snapshot / "tokenizer_config.json")
    serve(monkeypatch, snapshot, Mock(side_effect=ConnectionError("no route\nto host")))
    capsys.readouterr()
    assert fetch_model(HUB_ID) == snapshot
    warning = f"Warning: the tokenizer of {HUB_ID} cannot be downloaded (no route)\n"
    assert capsys.readouterr().err == warning
    asked = serve(monkeypatch, snapshot, (snapshot / "tokenizer.model").touch)
    assert fetch_model(HUB_ID) == fetch_model(HUB_ID) == snapshot
    assert len(asked) == 1 and asked[0]["revision"] == COMMIT
    assert "tokenizer.model" in asked[0]["allow_patterns"]
    assert "model.safetensors" not in asked[0]["allow_patterns"]


def test_an_incomplete_snapshot_is_completed(cache, monkeypatch):
    snapshot = fill(cache, shard_bytes=100_000)
    shard = sorted(snapshot.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    offer(monkeypatch, {"config.json": 1, "model.safetensors.index.json": 1, shard.name: 1})
    asked = serve(monkeypatch, snapshot, lambda: shard.write_bytes(content))
    assert open_checkpoint(HUB_ID).problems == ()
    assert [options["revision"] for options in asked] == [None], "so that refs/main is written"


def test_only_the_needed_files_are_requested():
    wanted = ["model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.model"]
    unwanted = ["2b.pt", "pytorch_model.bin", "modeling.py", "x.gguf", "consolidated.safetensors"]
    names = filter_repo_objects(wanted + unwanted, allow_patterns=list(hub.ALLOWED))
    assert list(names) == wanted


def test_files_are_checked_before_a_download(monkeypatch):
    offer(monkeypatch, {"config.json": 1, "model.safetensors": 1 << 60, "2b.pt": 1 << 61})
    with pytest.raises(RequestError, match="not enough space"):
        fetch_model(HUB_ID)
    offer(monkeypatch, {"config.json": 1, "pytorch_model.bin": 1})
    with pytest.raises(RequestError, match=r"has no config\.json with model\.safetensors"):
        fetch_model(HUB_ID)


def http_error(kind, status):
    """An error of the client with a response of that status, whatever its HTTP library."""
    error = kind.__new__(kind)
    error.args = ("Client Error\nwith a second line",)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


MISSING = http_error(errors.RepositoryNotFoundError, 404)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (HUB_ID, http_error(errors.GatedRepoError, 401), "is gated: accept its licence at https"),
        (HUB_ID, MISSING, "there is no model google/"),
        ("models/foo", MISSING, r"on the hub.* \(there is no folder models/foo\)$"),
        (HUB_ID, errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (HUB_ID, ConnectionError("no route\nto host"), r"cannot be downloaded \(no route\)"),
    ],
)
def test_refusals_say_what_to_do(monkeypatch, model, error, message):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", Mock(side_effect=error))
    with pytest.raises(RequestError, match=message) as caught:
        open_checkpoint(model)
    assert "-m" in str(caught.value) and "\n" not in str(caught.value)
