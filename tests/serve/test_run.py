"""Where a server listens, and the names that it has there."""

import pytest

from rgexport.serve.run import _own_names

MACHINE = "Mill"


@pytest.mark.parametrize(
    ("host", "key", "names"),
    [
        ("127.0.0.1", None, {"localhost"}),
        ("::1", "sesame", {"localhost"}),
        ("localhost", None, {"localhost"}),
        ("0.0.0.0", None, {"localhost", "0.0.0.0", "mill", "mill.local"}),
        ("Chat.example", None, {"localhost", "chat.example", "mill", "mill.local"}),
        ("0.0.0.0", "sesame", {"*"}),
    ],
)
def test_the_names_of_a_server(
    host: str, key: str | None, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: MACHINE)
    assert _own_names(host, key) == names
