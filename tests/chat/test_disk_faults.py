"""A disk that fails or hangs costs states, but neither answers nor the process."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rgexport.chat import state_folder
from rgexport.chat.model import Model
from tests.chat.conftest import until
from tests.faulty_disk import FAULTS, FaultyDisk
from tests.toy_session import ToySession

MakeModel = Callable[..., Model]


def read(model: Model, *texts: list[int]) -> None:
    for ids in texts:
        assert model.read(ids).result(timeout=30).error is None


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    monkeypatch.setattr(state_folder, "READ_SECONDS", 60.0)  # the machine may be busy
    return FaultyDisk(tmp_path / "states", monkeypatch)


@pytest.mark.parametrize("fault", FAULTS)
def test_requests_are_answered_while_the_disk_fails(fault, disk, make_model, gemma, capsys):
    model = make_model(gemma, state_folder=disk.folder)
    read(model, [5, 6])
    until(lambda: [*disk.folder.glob("*/2-*.state")])
    disk.begin(fault)
    read(model, *([7, i] for i in range(12)))
    model.scheduler.store.clear()
    read(model, [5, 6, 7])
    disk.end()
    ids = [8, 9]
    while not [*disk.folder.glob(f"*/{len(ids)}-*.state")]:
        read(model, ids := [*ids, 9])
        time.sleep(0.02)
        assert len(ids) < 1000, "states are saved again"
    model.close()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len({line.partition(":")[2] for line in warnings}) <= 4, "once a kind"


def test_a_hanging_disk_holds_up_nothing(disk, make_model, gemma, monkeypatch, capsys):
    monkeypatch.setattr(state_folder, "READ_SECONDS", 0.2)
    session = ToySession(gemma.vocab_size)
    with make_model(gemma, state_folder=disk.folder) as earlier:
        read(earlier, [5, 6])
    model = make_model(gemma, session, state_folder=disk.folder, cache_bytes=0)
    disk.begin("hanging")
    read(model, [5, 6, 7])
    until(lambda: disk.calls == 1)
    assert session.fed == 3, "it does not wait for the state for long"
    read(model, *([7, i] for i in range(12)))
    folder = model.scheduler.store._folder
    assert folder and len(folder._waiting) <= 4, "what waits takes bounded memory"
    closing = threading.Thread(target=folder.close, args=(0.1,))
    closing.start()
    closing.join(30)
    assert not closing.is_alive() and "did not answer within 0.1 s" in capsys.readouterr().err
    disk.end()


def test_a_slow_disk_does_not_delay_those_who_write(disk, make_model, gemma):
    """Others go on while the state of one conversation is read."""
    with make_model(gemma, state_folder=disk.folder) as earlier:
        read(earlier, [5, 6])
    model = make_model(gemma, state_folder=disk.folder, rows=2)
    disk.begin("hanging")
    late = model.read([5, 6, 7])
    until(lambda: disk.calls)
    read(model, [8])
    assert not late.done(), "it waits for its state"
    disk.end()
    assert late.result(30).cached_tokens == 2


def choices(model: Model, count: int) -> list[tuple[int, ...]]:
    """Replies to one prompt that are asked for at once."""
    streams = [model.complete("hello " * 30, max_new_tokens=1) for _ in range(count)]
    return [tuple(stream.reply().ids) for stream in streams]


def test_all_choices_share_one_reading_of_the_prompt(disk, make_model, gemma):
    """After a reply of one token, and after a restart."""
    session, again = ToySession(gemma.vocab_size), ToySession(gemma.vocab_size)
    model = make_model(gemma, session, state_folder=disk.folder, rows=4)
    first = choices(model, 1)
    assert choices(model, 16) == 16 * first
    assert session.fed == len(model.text_ids("hello " * 30))
    model.close()
    restarted = make_model(gemma, again, state_folder=disk.folder, rows=4)
    assert choices(restarted, 8) == 8 * first and again.fed == 0


def test_choices_wait_for_the_logits_of_a_state_that_has_none(make_model, gemma):
    session = ToySession(gemma.vocab_size)
    model = make_model(gemma, session, rows=4)
    ids = model.text_ids("hello " * 30)
    model.scheduler.store.put(ids, ToySession(gemma.vocab_size).get_rows(range(1)))
    choices(model, 8)
    assert session.fed == len(ids)
