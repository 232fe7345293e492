"""Names in addresses, and the names that a server has."""

import pytest

from rgexport.serve.host_names import authority_of, host_name, is_allowed
from rgexport.serve.run import _own_names


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("LocalHost.:8080", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]:8080", "::1"),
        *((wrong, None) for wrong in ("", "a b", "user@localhost", "localhost:80:80")),
        *((wrong, None) for wrong in ("localhost:port", "::1", "[evil.test]")),
    ],
)
def test_the_name_in_an_authority(authority, name):
    assert host_name(authority) == name


def test_addresses_and_listed_names_are_allowed():
    for host in ("127.0.0.1:80", "[::1]", "10.0.0.1:8080", "chat.example"):
        assert is_allowed(host, ["chat.example"])
    for host in ("evil.test", "127.0.0.1.evil.test", "chat.example.evil", "1.2.3"):
        assert not is_allowed(host, ["chat.example"]) and is_allowed(host, ["*"])


def test_an_address_of_ipv6_has_brackets():
    assert authority_of("::1", 80) == "[::1]:80"
    assert authority_of("127.0.0.1", 80) == "127.0.0.1:80"


@pytest.mark.parametrize(
    ("host", "key", "names"),
    [
        ("127.0.0.1", None, {"localhost"}),
        ("::1", "sesame", {"localhost"}),
        ("0.0.0.0", None, {"localhost", "0.0.0.0", "mill", "mill.local"}),
        ("Chat.example", None, {"localhost", "chat.example", "mill", "mill.local"}),
        ("0.0.0.0", "sesame", {"*"}),
    ],
)
def test_the_names_of_a_server(host, key, names, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Mill")
    assert _own_names(host, key) == names
