"""Work on the processes of a Dask cluster: the same files, also when a worker is lost."""

import os
import signal

import pytest
from distributed import Client, LocalCluster

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.planning.calibrate import CalibrationOptions, calibrate
from rgexport.planning.plan_request import PlanOptions, make_plans
from rgexport.runtimes.cluster import connected
from tests.command_line import rgexport
from tests.models import make_config, random_weights, write_hugging_face

pytestmark = pytest.mark.full
OPTIONS = CalibrationOptions(tokens=400, gradient_tokens=100, device="cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = make_config("rra", width=64, lru_width=96, heads=2, vocab_size=600)
    return write_hugging_face(config, random_weights(config), tmp_path_factory.mktemp("m") / "toy")


@pytest.fixture(scope="module")
def address():
    with LocalCluster(
        n_workers=3, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    return calibrate(open_checkpoint(model), OPTIONS, tmp_path_factory.mktemp("c") / "toy")


def test_a_calibration_is_the_same(model, address, calibration, tmp_path):
    with connected(address) as workers:
        spread = calibrate(open_checkpoint(model), OPTIONS, tmp_path / "toy", workers=workers)
    assert spread.read_bytes() == calibration.read_bytes()


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_an_export_is_the_same(kind, model, address, calibration, tmp_path):
    asked = kind, "-m", model, "--int4", "--no-check", "--calibration", calibration, "-o"
    for name, more in (("here", ()), ("there", ("--cluster", address))):
        run = rgexport(*asked, tmp_path / name, *more, folder=tmp_path)
        assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def contents(artifact):
    files = sorted(artifact.rglob("*")) if artifact.is_dir() else [artifact]
    return {f.name if f != artifact else "": f.read_bytes() for f in files if f.suffix != ".json"}


def test_a_killed_worker_changes_nothing(model, address, calibration, tmp_path):
    checkpoint, options = open_checkpoint(model), PlanOptions(calibration=calibration, bits=5)
    make_plans(checkpoint, [options], tmp_path / "here")
    with Client(address, set_as_default=False) as client:
        processes = list(client.run(os.getpid).values())
    assert len(processes) == 3
    with connected(address) as workers:
        start, jobs = workers.start, 0

        def start_or_kill(*arguments):
            nonlocal jobs
            jobs += 1
            if jobs == 40:
                os.kill(processes[0], signal.SIGKILL)
            return start(*arguments)

        workers.start = start_or_kill
        make_plans(checkpoint, [options], tmp_path / "there", workers=workers)
    assert jobs > 80
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_a_wrong_address_is_one_line(monkeypatch):
    monkeypatch.setattr("rgexport.runtimes.cluster._SECONDS", 1)
    for address, message in (
        ("tcp://127.0.0.1:9", r"where no Dask scheduler answers \(.*dask scheduler"),
        ("localhost:8786", r"give its address, such as tcp"),
    ):
        with pytest.raises(RequestError, match=message), connected(address):
            pass
