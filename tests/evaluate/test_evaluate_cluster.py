"""Suites on the processes of a Dask cluster: the same figures, also when a worker is lost."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from rgexport.errors import RequestError
from rgexport.evaluate import run as runner
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import open_subject
from rgexport.evaluate.suites.text import documents
from rgexport.runtimes.cluster import connected
from tests.evaluate.small_model import small_model
from tests.evaluate.test_length import without_times

pytestmark = pytest.mark.full  # a cluster's processes each import torch
SUITES = ["text", "memory", "noise", "window", "length"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture
def address() -> Iterator[str]:
    with LocalCluster(
        n_workers=3, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


def request_in(folder: Path) -> Request:
    return Request(folder=folder, trials=8, farthest=64, context=32, limit=200, length=9000)


def evaluated(
    model: Path,
    folder: Path,
    address: str | None = None,
    *,
    suites: Sequence[str] = SUITES,
    text: Path | None = None,
) -> list[object]:
    request = replace(request_in(folder), texts=(text,) if text else ())
    documents.cache_clear()
    with connected(address) as workers:
        subjects = [open_subject(str(model))]
        found = runner.evaluate(subjects, suites, request, threads=1, workers=workers)
    models: list[object] = without_times(found["models"])
    return models


def test_a_killed_worker_changes_nothing(model, address, tmp_path):
    """It dies when some pieces are done; what it was at is done by another one."""
    expected = evaluated(model, tmp_path / "here")
    with Client(address, set_as_default=False) as client:
        processes = list(client.run(os.getpid).values())
    assert len(processes) == 3
    folder, ended = tmp_path / "there", threading.Event()
    killed: list[int] = []

    def kill() -> None:
        while not ended.wait(0.05):
            if not killed and len(list(folder.glob("pieces/*.json"))) >= 10:
                os.kill(processes[0], signal.SIGKILL)
                killed.append(processes[0])

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = evaluated(model, folder, address)
    finally:
        ended.set()
        killer.join()
    assert killed and found == expected
    names = [sorted(p.name for p in f.glob("pieces/*")) for f in (folder, tmp_path / "here")]
    assert names[0] == names[1]


def test_workers_outlive_a_command(model, address, tmp_path):
    """What they have read is read again: texts and models are other ones under the same names."""
    text, folder = tmp_path / "a.txt", tmp_path / "model"
    shutil.copytree(model, folder)
    for number, words in enumerate(("One and two. " * 40, "Three or four? " * 40)):
        text.write_text(words)
        other, *_ = small_model(tmp_path / str(number), seed=number)
        shutil.copy(other / "model.safetensors", folder / "model.safetensors")
        found = [
            evaluated(
                folder, tmp_path / f"{number}{where}", where, suites=["text", "length"], text=text
            )
            for where in (None, address)
        ]
        assert found[0] == found[1]


def test_workers_need_the_files(model, address, tmp_path):
    subject, moved = open_subject(str(model)), model.with_name("moved")
    assert subject.identity and subject.tokenizer  # read before they are gone
    model.rename(moved)
    try:
        with (
            connected(address) as workers,
            pytest.raises(RequestError, match=r"a worker of the cluster cannot open .*model"),
        ):
            runner.evaluate([subject], ["text"], request_in(tmp_path / "r"), workers=workers)
    finally:
        moved.rename(model)
