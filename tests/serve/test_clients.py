"""Clients do not see, hold up or pay for one another; who leaves is noticed at once."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from rgexport.serve import app, clients
from rgexport.serve.clients import ClientSlots, Slot, network_of
from rgexport.serve.server import ServerSettings
from tests.faulty_disk import FAULTS, FaultyDisk
from tests.serve.conftest import COMPLETE, cached, error_of, held, until

PROXIED = {"log": False, "trusted_proxies": ("127.0.0.1",)}
"""The tests stand for a proxy that tells who the clients are."""
ANN, BOB, EVE = ({"X-Forwarded-For": f"10.0.0.{i}"} for i in (1, 2, 3))
IDS = [5, 6, 7, 8, 9]


def complete(server, prompt, client, **headers):
    body = {"prompt": prompt, "max_tokens": 2}
    return cached(server.post(COMPLETE, body, **client, **headers).json())


def act(server, action, name="talk", slot=0, client=None):
    """Saves, restores or erases a state."""
    path = f"/slots/{slot}?action={action}"
    return server.post(path, {"filename": name} if name else {}, **(client or {}))


def test_nothing_tells_that_another_client_has_sent_a_prompt(serve, tmp_path):
    for share, known in ((False, 0), (True, 5)):
        with serve(ServerSettings(**PROXIED, share_prefixes=share)) as server:
            assert [complete(server, IDS, each) for each in (ANN, BOB, ANN)] == [0, known, 5]
    with serve(ServerSettings(**PROXIED, api_key="sesame")) as server:
        key = {"Authorization": "Bearer sesame"}
        one_client = [complete(server, IDS, each, **key) for each in (ANN, BOB)]
        assert one_client == [0, 5], "who has the key"
        assert "without --state-folder" in error_of(act(server, "save", client=key))
    with serve(ServerSettings(**PROXIED), state_folder=tmp_path) as server:
        complete(server, IDS, ANN)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    address = ANN["X-Forwarded-For"]
    assert files and not any(address.encode() in path.read_bytes() for path in files)
    assert not any(address in str(path) for path in files)
    with serve(ServerSettings(**PROXIED), state_folder=tmp_path) as server:
        assert [complete(server, [*IDS, 10], each) for each in (BOB, ANN)] == [0, 5]


def test_slots_and_states_with_names_belong_to_a_client(serve, tmp_path):
    with serve(ServerSettings(**PROXIED, saved=tmp_path)) as server:
        complete(server, "hello there", ANN)
        assert server.get("/slots", **BOB).json() == []
        assert "has seen nothing yet" in error_of(act(server, "save", client=BOB))
        assert act(server, "erase", None, client=BOB).json()["n_erased"] == 0
        assert act(server, "save", client=ANN).status_code == 200
        for action in ("restore", "erase"):
            error_of(act(server, action, client=BOB), 404)
        complete(server, "another one", BOB)
        assert act(server, "save", client=BOB).status_code == 200
        assert len([*tmp_path.glob("*/talk.state")]) == 2, "one of each"
        assert act(server, "restore", slot=7, client=ANN).json()["n_restored"] > 2
        assert act(server, "erase", None, client=ANN).json()["n_erased"] > 0
    with serve(ServerSettings(**PROXIED, saved=tmp_path, share_prefixes=True)) as server:
        complete(server, "hello there", ANN)
        assert act(server, "save", client=ANN).status_code == 200
        assert act(server, "restore", client=BOB).status_code == 200, "shared as prefixes are"
        assert act(server, "erase", None, client=EVE).json()["n_erased"] == 0


def test_a_client_has_one_address_or_64_bits_of_them():
    for one, other in (("10.0.0.1", "::ffff:10.0.0.1"), ("2001:db8::1", "2001:db8::ffff:1")):
        assert network_of(one) == network_of(other)
    for one, other in (("10.0.0.1", "10.0.0.2"), ("2001:db8:0:1::1", "2001:db8:0:2::1")):
        assert network_of(one) != network_of(other)
    assert network_of("fe80::1%eth0") and network_of("") != network_of("testclient")


def test_who_says_to_be_another_client_is_believed_only_by_option(serve, monkeypatch):
    with serve() as server:
        assert [complete(server, IDS, each) for each in (ANN, BOB)] == [0, 5], "both are 127.0.0.1"
    runs = []
    monkeypatch.setattr(app, "_run", lambda server, model: (runs.append(server), model.close()))
    app.serve({}, [], ServerSettings(port=0, grace_seconds=0))
    assert runs[0].config.proxy_headers is False


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_leaves_the_queue_frees_the_place(is_stream, serve):
    """Also while the engine is in the middle of something."""
    body = {"prompt": [5] * 8, "max_tokens": 1, "stream": is_stream}
    with serve(rows=1, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        scheduler = server.model.scheduler
        with held(server) as lengths:
            first = pool.submit(server.post, COMPLETE, body)
            until(lambda: lengths)
            for _ in range(3):
                with server.send(COMPLETE, body | {"prompt": [6] * 9}):
                    until(lambda: scheduler.waiting == 1)
                until(lambda: scheduler.waiting == 0)
            last = pool.submit(server.post, COMPLETE, body | {"prompt": [7] * 7})
            until(lambda: scheduler.waiting == 1)
        assert first.result().status_code == last.result().status_code == 200
        assert lengths == [8, 7], "what the others asked for is not read"


def test_saved_states_have_a_most_of_both(serve, tmp_path):
    """There are so many of each client, and so many bytes of all."""
    killed = tmp_path / "ann" / ".a.state.partial-01234567"
    killed.parent.mkdir()
    killed.write_bytes(b"a killed server left it")
    os.utime(killed, (0, 0))
    with serve(ServerSettings(**PROXIED, saved=tmp_path, most_saved=2)) as server:
        complete(server, "hello", ANN)
        assert [act(server, "save", name, client=ANN).status_code for name in "aba"] == [200] * 3
        refused = error_of(act(server, "save", "c", client=ANN))
        assert "at most 2 of each client (--max-saved-states)" in refused
        assert act(server, "erase", "a", client=ANN).status_code == 200
        assert act(server, "save", "c", client=ANN).status_code == 200
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["b.state", "c.state"]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.state"))
    with serve(ServerSettings(**PROXIED, saved=tmp_path, saved_bytes=size + 99)) as server:
        for client in (ANN, BOB):
            complete(server, "hello", client)
        assert act(server, "save", "b", client=ANN).status_code == 200, "it replaces its own file"
        assert "(--saved-states-size)" in error_of(act(server, "save", client=BOB))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_state_is_acknowledged_when_it_is_on_the_disk(fault, serve, tmp_path, monkeypatch):
    disk = FaultyDisk(tmp_path / "saved", monkeypatch)
    with serve(ServerSettings(saved=disk.folder, share_prefixes=True, log=False)) as server:
        server.chat("hello")
        assert act(server, "save", "before").status_code == 200
        disk.begin(fault)
        answer = act(server, "save", "during")
        restored = act(server, "restore", "before")
        disk.end()
        if fault == "removed":
            assert answer.status_code == 200 and restored.status_code == 404
        else:
            assert str(tmp_path) not in error_of(answer, 503)
            assert act(server, "restore", "during").status_code == 404
            assert act(server, "restore", "before").status_code == 200
        assert restored.status_code in (200, 404, 503)
        assert act(server, "save", "after").status_code == 200
    assert not [*disk.folder.glob(".*")]


def test_a_hanging_disk_holds_up_only_who_needs_it(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "DISK_SECONDS", 0.3)
    disk = FaultyDisk(tmp_path / "saved", monkeypatch)
    settings = ServerSettings(saved=disk.folder, share_prefixes=True, log=False)
    with serve(settings) as server, ThreadPoolExecutor(12) as pool:
        server.chat("hello")
        disk.begin("hanging")
        saves = [pool.submit(act, server, "save", f"a{i}") for i in range(12)]
        server.chat("hello")
        answers = [save.result() for save in saves]
        assert {answer.status_code for answer in answers} <= {429, 503}
        assert "does not answer" in "".join(answer.text for answer in answers)
        assert act(server, "save", "later").status_code == 429, "the queue is still full"
        monkeypatch.setattr(clients, "DISK_SECONDS", 60)
        disk.end()
        until(lambda: act(server, "save", "a").status_code != 429)
        assert act(server, "restore", "a").status_code == 200


def test_a_client_cannot_push_out_the_slots_of_others():
    slots = ClientSlots(3)
    for owner, number in (("ann", 0), ("bob", 0), ("bob", 1), ("bob", 2), ("bob", 3)):
        slots.put((owner, "toy", number), Slot(number, None))
    assert [*slots] == [("ann", "toy", 0), ("bob", "toy", 2), ("bob", "toy", 3)]
