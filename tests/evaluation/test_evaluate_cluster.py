"""Suites on the processes of a Dask cluster: the same figures, also when a worker is lost."""

import os
import shutil
import signal
import threading

import pytest
from distributed import Client

from rgexport.evaluation import run as runner
from rgexport.evaluation.models import open_model
from rgexport.evaluation.pieces import EvaluationRequest
from rgexport.evaluation.suites.text import documents
from rgexport.runtimes.cluster import connected
from tests.evaluation.small_model import small_model
from tests.evaluation.test_length import without_times
from tests.planning.test_cluster import address

__all__ = ["address"]
pytestmark = pytest.mark.full  # a cluster's processes each import torch
SUITES = "text", "memory", "noise", "window", "length"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))[0]


def evaluated(model, folder, address, suites, *texts):
    request = EvaluationRequest(
        folder=folder, texts=texts, trials=8, farthest=64, context=32, limit=200, length=9000
    )
    documents.cache_clear()
    with connected(address) as workers:
        subjects = [open_model(str(model))]
        results = runner.evaluate(subjects, suites, request, threads=1, workers=workers)
    return without_times(results["models"])


def test_a_killed_worker_changes_nothing(model, address, tmp_path):
    """It dies when some pieces are done; what it was at is done by another one."""
    expected = evaluated(model, tmp_path / "here", None, SUITES)
    with Client(address, set_as_default=False) as client:
        process, *_ = client.run(os.getpid).values()
    folder, ended = tmp_path / "there", threading.Event()
    killed = []

    def kill():
        while not ended.wait(0.05):
            if not killed and len(list(folder.glob("pieces/*.json"))) >= 10:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = evaluated(model, folder, address, SUITES)
    finally:
        ended.set()
        killer.join()
    assert killed and result == expected
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
        here, there = (
            evaluated(folder, tmp_path / f"{number}{where}", where, ["text", "length"], text)
            for where in (None, address)
        )
        assert here == there
